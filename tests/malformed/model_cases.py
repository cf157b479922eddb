"""Model directories that are damaged: what is done to a whole one, to whose, and words of the error."""

from dataclasses import dataclass
from typing import Literal

import torch

from tests.malformed.damage import (
    EMBEDDING,
    INDEX,
    WEIGHTS,
    Spoil,
    a_folder,
    adapter,
    another_head,
    as_pickle,
    bytes_replaced,
    configured,
    cut,
    edited,
    first_shard,
    header_replaced,
    holding,
    in_shards,
    linked_to_itself,
    rows,
    tensors,
    without,
)


@dataclass(frozen=True)
class ModelCase:
    """One way to damage a model."""

    spoil: Spoil
    says: str
    whose: Literal["student", "teacher"] = "student"


CUSTOM = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
MODELS: dict[str, ModelCase] = {
    "no config.json": ModelCase(without("config.json"), "config.json: cannot read the model file: No such file"),
    "config.json empty": ModelCase(holding("config.json", ""), "config.json is not valid JSON"),
    "config.json cut": ModelCase(cut("config.json", 100), "config.json is not valid JSON"),
    "config.json a list": ModelCase(holding("config.json", "[]"), "config.json holds list; expected an object"),
    "config.json null": ModelCase(holding("config.json", "null"), "config.json holds NoneType; expected an object"),
    "config.json an empty object": ModelCase(holding("config.json", "{}"), "model_type in config.json is None"),
    "config.json of bytes": ModelCase(
        holding("config.json", b"\xff\x00\xfe"), "config.json: the model file is not UTF-8"
    ),
    "config.json in utf-16": ModelCase(holding("config.json", "{}".encode("utf-16")), "begins with a byte order mark"),
    "config.json deep": ModelCase(holding("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "config.json of a long number": ModelCase(holding("config.json", "9" * 5_000), "config.json is not valid JSON"),
    "config.json a folder": ModelCase(
        a_folder("config.json"), "config.json: cannot read the model file: Is a directory"
    ),
    "config.json a loop": ModelCase(
        linked_to_itself("config.json"), "config.json: cannot read the model file: Too many"
    ),
    "model_type unknown": ModelCase(configured(model_type="x"), "model_type in config.json is 'x', which transformers"),
    "model_type a number": ModelCase(configured(model_type=3), "model_type in config.json is 3, which transformers"),
    "model_type a list": ModelCase(configured(model_type=[]), "model_type in config.json is [], which transformers"),
    "code of its own": ModelCase(configured(model_type="x", auto_map=CUSTOM), "set trust_remote_code = true"),
    "code of the teacher's own": ModelCase(
        configured(model_type="x", auto_map=CUSTOM), "teacher': runs code", "teacher"
    ),
    "an encoder": ModelCase(configured(model_type="bert"), "its weights are of another kind of model"),
    "encoder and decoder": ModelCase(configured(model_type="t5"), "is an encoder with a decoder"),
    "vocabulary a text": ModelCase(configured(vocab_size="a"), "Field 'vocab_size' expected int, got str"),
    "vocabulary 0": ModelCase(
        configured(vocab_size=0, pad_token_id=None, eos_token_id=None), "vocab_size in its config"
    ),
    "vocabulary below the tokenizer's": ModelCase(configured(vocab_size=10), "is 10, but its tokenizer has 112 tokens"),
    "vocabulary above the embedding": ModelCase(
        configured(vocab_size=200), f"'{EMBEDDING}' is [112, 64], but config.json"
    ),
    "width of another model": ModelCase(
        configured(hidden_size=128), f"'{EMBEDDING}' is [112, 64], but config.json makes"
    ),
    "width 0": ModelCase(configured(hidden_size=0), f"'{EMBEDDING}' is [112, 64], but config.json makes it [112, 0]"),
    "inner width of another model": ModelCase(configured(intermediate_size=97), "mlp.down_proj.weight' is [64, 96]"),
    "no heads": ModelCase(configured(num_attention_heads=0), "its config.json describes no causal language model"),
    "three heads of two": ModelCase(configured(num_attention_heads=3), "self_attn.o_proj.weight' is [64, 64]"),
    "head of odd width": ModelCase(configured(head_dim=31), "cannot read its model configuration"),
    "more layers than weights": ModelCase(
        configured(num_hidden_layers=3, layer_types=["full_attention"] * 3), "num_hidden_layers = 3, but layer 2 has no"
    ),
    "a billion layers": ModelCase(
        configured(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers in its config.json is 1000000000"
    ),
    "context 0": ModelCase(configured(max_position_embeddings=0), "max_position_embeddings in its config.json is 0"),
    "context negative": ModelCase(configured(max_position_embeddings=-1), "max_position_embeddings in its config.json"),
    "context null": ModelCase(configured(max_position_embeddings=None), "cannot read its model configuration"),
    "dtype unknown": ModelCase(configured(dtype="float99"), "cannot read its model configuration"),
    "quantisation a number": ModelCase(configured(quantization_config=3), "cannot read its model configuration"),
    "tie a text": ModelCase(configured(tie_word_embeddings="yes"), "cannot read its model configuration"),
    "quantised": ModelCase(
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised (gptq, quantization_config in its config.json), and a student learns in whole weights",
    ),
    "a LoRA adapter": ModelCase(
        adapter(), "is a LoRA adapter of Qwen/Qwen3-8B (adapter_config.json); merge it into Qwen/Qwen3-8B first"
    ),
    "a LoRA adapter for a teacher": ModelCase(adapter(), "teacher': is a LoRA adapter of Qwen/Qwen3-8B", "teacher"),
    "a LoRA adapter beside a model": ModelCase(
        holding("adapter_config.json", '{"base_model_name_or_path": "base"}'), "is a LoRA adapter of base"
    ),
    "a head of its own that is tied": ModelCase(
        tensors(another_head), "config.json says tie_word_embeddings = true, but 'lm_head.weight' in its files differs"
    ),
    "a teacher's head of its own that is tied": ModelCase(
        tensors(another_head), "but 'lm_head.weight' in its files differs from 'model.embed_tokens.weight'", "teacher"
    ),
    "generation_config.json of a text": ModelCase(
        holding("generation_config.json", '{"eos_token_id": "</s>"}'), "eos_token_id is '</s>'; expected the id"
    ),
    "no tokenizer": ModelCase(without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer; copy"),
    "no tokenizer.json": ModelCase(without("tokenizer.json"), "has no tokenizer; copy its tokenizer.json there"),
    "tokenizer.json empty": ModelCase(holding("tokenizer.json", ""), "tokenizer.json is not valid JSON"),
    "tokenizer.json cut": ModelCase(cut("tokenizer.json", 500), "tokenizer.json is not valid JSON"),
    "tokenizer.json a list": ModelCase(
        holding("tokenizer.json", "[]"), "tokenizer.json holds list; expected an object"
    ),
    "tokenizer.json an empty object": ModelCase(holding("tokenizer.json", "{}"), "cannot read its tokenizer"),
    "tokenizer.json without model": ModelCase(
        edited("tokenizer.json", lambda x: x.pop("model")), "cannot read its tokenizer"
    ),
    "tokenizer.json of another kind": ModelCase(
        edited("tokenizer.json", lambda x: x["model"].update(type="Foo", vocab=3)), "cannot read its tokenizer"
    ),
    "tokenizer.json a loop": ModelCase(
        linked_to_itself("tokenizer.json"), "tokenizer.json: cannot read the model file"
    ),
    "tokenizer_config.json cut": ModelCase(cut("tokenizer_config.json", 30), "tokenizer_config.json is not valid JSON"),
    "tokenizer_config.json null": ModelCase(
        holding("tokenizer_config.json", "null"), "tokenizer_config.json holds NoneType"
    ),
    "generation_config.json cut": ModelCase(
        cut("generation_config.json", 9), "generation_config.json is not valid JSON"
    ),
    "token of another id": ModelCase(
        edited("tokenizer.json", lambda x: x["model"]["vocab"].update(w4=5, w5=4)),
        "teachers.main: its tokenizer is not the student's: token 'w4' has id 4",
        "teacher",
    ),
    "token of the teacher's own": ModelCase(
        edited("tokenizer.json", lambda x: x["model"]["vocab"].update(w999=0) or x["model"]["vocab"].pop("w111")),
        "teachers.main: its tokenizer is not the student's",
        "teacher",
    ),
    "vocabularies of different models": ModelCase(
        lambda model: (
            (configured(vocab_size=150)(model), tensors(lambda x: x.update({EMBEDDING: torch.zeros(60, 64)}))(model))
        ),
        "LM head 'model.embed_tokens.weight' is [60, 64], but config.json says vocab_size = 150",
        "teacher",
    ),
    "no weights": ModelCase(without(WEIGHTS), "found neither model.safetensors nor model.safetensors.index.json; save"),
    "no weights of the teacher": ModelCase(without(WEIGHTS), "teacher': found neither model.safetensors", "teacher"),
    "a pickle": ModelCase(as_pickle("pytorch_model.bin"), "only pytorch_model.bin, which is not loaded because"),
    "a pickle of the teacher": ModelCase(as_pickle("pytorch_model.bin"), "only pytorch_model.bin", "teacher"),
    "a pickle in parts": ModelCase(
        as_pickle("pytorch_model-00001-of-00002.bin"), "only pytorch_model-00001-of-00002.bin"
    ),
    "a pickle of another name": ModelCase(as_pickle("consolidated.00.pth"), "only consolidated.00.pth"),
    "weights a folder": ModelCase(a_folder(WEIGHTS), "model.safetensors is missing or no file"),
    "weights a loop": ModelCase(linked_to_itself(WEIGHTS), "model.safetensors is missing or no file"),
    "weights empty": ModelCase(holding(WEIGHTS, b""), "cannot read model.safetensors"),
    "weights of 7 bytes": ModelCase(cut(WEIGHTS, 7), "cannot read model.safetensors"),
    "header cut": ModelCase(cut(WEIGHTS, 50), "cannot read model.safetensors"),
    "header cut of the teacher": ModelCase(cut(WEIGHTS, 50), "teacher': cannot read model.safetensors", "teacher"),
    "last byte lost": ModelCase(
        lambda model: cut(WEIGHTS, (model / WEIGHTS).stat().st_size - 1)(model), "cannot read model"
    ),
    "one byte more": ModelCase(
        lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes() + b"\0"),
        "cannot read model",
    ),
    "header length huge": ModelCase(
        lambda model: (model / WEIGHTS).write_bytes(b"\xff" * 8 + (model / WEIGHTS).read_bytes()[8:]),
        "header too",
    ),
    "header length 0": ModelCase(holding(WEIGHTS, bytes(8)), "cannot read model.safetensors"),
    "header no JSON": ModelCase(header_replaced(b"hello"), "cannot read model.safetensors"),
    "header a list": ModelCase(header_replaced(b"[]"), "cannot read model.safetensors"),
    "header not UTF-8": ModelCase(header_replaced(b'{"\xff":{}}'), "cannot read model.safetensors"),
    "header without tensors": ModelCase(header_replaced(b"{}"), "its safetensors hold no tensor"),
    "dtype of the header unknown": ModelCase(bytes_replaced(b'"F32"', b'"F99"'), "cannot read model.safetensors"),
    "offsets that overlap": ModelCase(
        bytes_replaced(b'"data_offsets":[0,', b'"data_offsets":[4,'), "cannot read model"
    ),
    "shape flipped": ModelCase(
        bytes_replaced(b'"shape":[112,64]', b'"shape":[113,64]'), "cannot read model.safetensors"
    ),
    "shape negative": ModelCase(
        bytes_replaced(b'"shape":[112,64]', b'"shape":[-12,64]'), "cannot read model.safetensors"
    ),
    "HTML for weights": ModelCase(
        holding(WEIGHTS, "<!DOCTYPE html><html>not found</html>"), "cannot read model.safetensors"
    ),
    "pointer for weights": ModelCase(
        holding(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "cannot read model"
    ),
    "no LM head": ModelCase(
        tensors(lambda x: x.pop(EMBEDDING)), "its embedding, which is also its LM head, was not found", "teacher"
    ),
    "LM head of too few rows": ModelCase(
        tensors(rows(50)), "LM head 'model.embed_tokens.weight' is [50, 64]", "teacher"
    ),
    "LM head of another width": ModelCase(
        tensors(lambda x: x.update({EMBEDDING: torch.zeros(112, 32)})), "is [112, 32], but config.json", "teacher"
    ),
    "LM head of one dimension": ModelCase(
        tensors(lambda x: x.update({EMBEDDING: torch.zeros(112)})), "is [112], but config.json", "teacher"
    ),
    "LM head untied and missing": ModelCase(
        configured(tie_word_embeddings=False), "its LM head was not found", "teacher"
    ),
    "student's embedding of too few rows": ModelCase(
        tensors(rows(50)), f"'{EMBEDDING}' is [50, 64], but config.json makes"
    ),
    "layer lost": ModelCase(
        tensors(lambda x: [x.pop(name) for name in list(x) if ".layers.1." in name]), "but layer 1 has no weights"
    ),
    "layer of the teacher lost": ModelCase(
        tensors(lambda x: [x.pop(name) for name in list(x) if ".layers.0." in name]),
        "but layer 0 has no weights",
        "teacher",
    ),
    "index empty": ModelCase(holding(INDEX, ""), f"{INDEX} is not valid JSON"),
    "index cut": ModelCase(holding(INDEX, '{"weight_map": {"a"'), f"{INDEX} is not valid JSON"),
    "index a list": ModelCase(holding(INDEX, "[]"), f"{INDEX} holds list; expected an object"),
    "index without map": ModelCase(holding(INDEX, '{"metadata": {}}'), f"{INDEX} has no weight_map"),
    "index with an empty map": ModelCase(holding(INDEX, '{"weight_map": {}}'), f"{INDEX} has no weight_map"),
    "index with a map of numbers": ModelCase(holding(INDEX, '{"weight_map": {"a": 1}}'), f"{INDEX} has no weight_map"),
    "index to elsewhere": ModelCase(
        holding(INDEX, '{"weight_map": {"a": "../b"}}'), "names '../b', which is no file of its"
    ),
    "index to a NUL": ModelCase(
        holding(INDEX, '{"weight_map": {"a": "b\\u0000"}}'), "which is no file of its own folder"
    ),
    "index a loop": ModelCase(lambda model: (model / INDEX).symlink_to(INDEX), f"{INDEX}: cannot read the model file"),
    "shard missing": ModelCase(
        in_shards(lambda model, _: first_shard(model).unlink()), "a.safetensors is missing or no file"
    ),
    "shard of the teacher missing": ModelCase(
        in_shards(lambda model, _: first_shard(model).unlink()), "teacher': a.safetensors is missing", "teacher"
    ),
    "shard cut": ModelCase(in_shards(lambda model, _: cut("a.safetensors", 99)(model)), "cannot read a.safetensors"),
    "shard empty": ModelCase(in_shards(lambda model, _: cut("b.safetensors", 0)(model)), "cannot read b.safetensors"),
    "shard a pickle": ModelCase(
        in_shards(lambda model, _: torch.save({}, first_shard(model))), "cannot read a.safetensors"
    ),
    "shard without its tensor": ModelCase(
        in_shards(lambda _, index: index["weight_map"].update({"lost.weight": "a.safetensors"})),
        "a.safetensors lacks the tensor 'lost.weight'",
    ),
}
