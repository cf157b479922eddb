"""Models of published shapes with random weights, and the sizes of a measurement: a card's, or tiny ones."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

VOCABULARY = 151_936
CONTEXT_TOKENS = 4_096  # of 40,960: what the measurements need
INITIALIZER_RANGE = 0.02
# Deviation of the logits. Weights as they are drawn give nearly uniform probabilities; with this one the entropy is
# about 4 nats, like that of text, and rounding shows in log-probabilities as it does in trained models.
LOGIT_DEVIATION = 4.0
EOS = 1
CONSTANT = 0.5  # several times the other numbers of an embedding, so that it stays visible, and does not drown them
PROMPTS = "prompts.jsonl"
# No multiple of the 16 tokens of vLLM's cache blocks: were the whole prompt cached, a teacher would lack the position
# that predicts the first completion token, and read all of it a second time.
PROMPT_TOKENS = 200
PROMPT_WORDS = 256  # different ones; each is a token


@dataclass(frozen=True)
class Shape:
    """A Qwen3 by the numbers of its published config.json."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool
    head_width: int = 128
    vocabulary: int = VOCABULARY


QWEN3_06B = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, tied=True)
QWEN3_17B = Shape("Qwen3-1.7B", 2048, 6144, 28, 16, 8, tied=True)
QWEN3_8B = Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, tied=False)
TINY_STUDENT = Shape("tiny student", 64, 96, 2, 2, 1, tied=True, head_width=32, vocabulary=512)
TINY_TEACHER = Shape("tiny teacher", 96, 128, 2, 2, 1, tied=True, head_width=32, vocabulary=512)


@dataclass(frozen=True)
class Scale:
    """How much is measured, and on what."""

    device: torch.device
    dtype: torch.dtype
    student: Shape
    teacher: Shape  # of the loop
    scored_teachers: tuple[Shape, ...]
    num_prompts: int  # of a step
    samples_per_prompt: int
    prompt_tokens: int
    mean_tokens: int  # of a completion, were there no longest
    max_tokens: int  # of a completion
    num_scored: int  # trajectories that teachers read
    micro_batch_tokens: int
    repeats: int
    has_bars: bool

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16"]:
        """Return the dtype as run files spell it."""
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"


def card_scale() -> Scale:
    """Return the sizes for a card of 140 GB; the learner keeps some 45 GB of activations beside the two engines."""
    return Scale(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        student=QWEN3_06B,
        teacher=QWEN3_17B,
        scored_teachers=(QWEN3_17B, QWEN3_8B),
        num_prompts=32,
        samples_per_prompt=4,
        prompt_tokens=PROMPT_TOKENS,
        mean_tokens=384,
        max_tokens=2048 - PROMPT_TOKENS,
        num_scored=24,
        micro_batch_tokens=16_384,
        repeats=3,
        has_bars=True,
    )


def dry_scale() -> Scale:
    """Return sizes with which everything runs within a minute on two CPU cores."""
    return Scale(
        device=torch.device("cpu"),
        dtype=torch.float32,
        student=TINY_STUDENT,
        teacher=TINY_TEACHER,
        scored_teachers=(TINY_TEACHER,),
        num_prompts=4,
        samples_per_prompt=2,
        prompt_tokens=8,
        mean_tokens=12,
        max_tokens=40,
        num_scored=8,
        micro_batch_tokens=256,
        repeats=1,
        has_bars=False,
    )


def model_folder(scale: Scale, shape: Shape, folder: Path) -> Path:
    """Return the folder of a model of this shape, which is written when it is first asked for."""
    target = folder / shape.name.replace(" ", "-")
    if (target / "config.json").exists():
        return target
    torch.manual_seed(shape.hidden)
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(qwen3_config(shape), dtype=scale.dtype)
    end_by_chance(model, scale.mean_tokens)
    _write_tokenizer(target)
    model.save_pretrained(target)
    del model
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself, engines in other processes could not take
    return target


def head_folder(scale: Scale, shape: Shape, folder: Path) -> Path:
    """Return the folder of a model whose files have the LM head alone; vLLM draws the rest (`load_format = "dummy"`).

    An 8B's 16 GB would take longer to write and to read than to measure.
    """
    target = folder / f"{shape.name.replace(' ', '-')}-head"
    if (target / "config.json").exists():
        return target
    torch.manual_seed(shape.hidden)
    config = qwen3_config(shape)
    config.architectures = ["Qwen3ForCausalLM"]
    config.dtype = scale.dtype_name
    _write_tokenizer(target)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=scale.device) * INITIALIZER_RANGE
    name = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    save_file({name: weight.to(scale.dtype).cpu()}, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    return target


@torch.no_grad()
def end_by_chance(model: PreTrainedModel, mean_tokens: int) -> None:
    """Give the end of text about the same probability everywhere, so that a few completions are many times longer.

    The first number of every hidden state is made a constant, which only the head's row of that token looks at.
    """
    embedding, head, norm = model.get_input_embeddings().weight, model.get_output_embeddings().weight, model.model.norm
    norm.weight.fill_(LOGIT_DEVIATION / (INITIALIZER_RANGE * math.sqrt(embedding.shape[1])))
    embedding[:, 0] = CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(3, len(embedding), (4, 64), device=embedding.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    wanted_logit = (hidden @ head.t()).float().logsumexp(-1).mean() - math.log(mean_tokens)
    head[EOS] = 0.0
    head[EOS, 0] = wanted_logit / hidden[:, 0].float().mean()


def qwen3_config(shape: Shape) -> Qwen3Config:
    """Return the model's configuration."""
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_width,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_theta=1_000_000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=shape.tied,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )


def write_prompts(scale: Scale, folder: Path) -> Path:
    """Write prompts of as many words as they shall have tokens, for some steps."""
    words = np.random.default_rng(0).integers(3, PROMPT_WORDS, (16 * scale.num_prompts, scale.prompt_tokens))
    lines = [json.dumps({"prompt": " ".join(f"w{word}" for word in row)}) for row in words]
    path = folder / PROMPTS
    path.write_text("\n".join(lines) + "\n")
    return path


def _write_tokenizer(folder: Path) -> None:
    """Write one that knows the prompts' words; nobody reads the completions."""
    vocabulary = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {f"w{index}": index for index in range(3, PROMPT_WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
