"""Measure which layers of a model are cheapest to lose, one after another (the source of `REMOVAL_ORDER`).

The teacher answers a few prompts; each round leaves out the layer without which the smaller model's distribution
stays closest to the teacher's, in forward KL per answer token, given what earlier rounds left out. The first two and
the last three layers always stay.

    python -m examples.smollm2.order_layers --keep 18
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Give me a short tip for sleeping better.",
    "Write a two-line poem about the sea.",
    "Rewrite politely: Send me the file now.",
    "What does a thermometer measure?",
)
ANSWER_TOKENS = 32
FIRST_KEPT, LAST_KEPT = 2, 3


@dataclass(frozen=True)
class Yardstick:
    """The teacher's answers and its distribution over each of their tokens."""

    hidden: Tensor  # [answers, length, hidden]  the input of the first layer
    layer_arguments: dict[str, Any]  # what every layer is called with beside it
    predicts_answer: Tensor  # [answers, length - 1]  true where the next token is the teacher's
    teacher_logprobs: Tensor  # [tokens, vocabulary]


def main() -> None:
    """Print the layers in the order in which they can go, with the distance after each."""
    parser = argparse.ArgumentParser(description="Measure which layers are cheapest to lose.")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--keep", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        yardstick = make_yardstick(model, AutoTokenizer.from_pretrained(arguments.model, padding_side="left"))
        kept = list(range(model.config.num_hidden_layers))
        while len(kept) > arguments.keep:
            layer, distance = cheapest_layer(model, yardstick, kept)
            kept.remove(layer)
            print(f"without layer {layer}: {len(kept)} layers, forward KL {distance:.3f} nats per token", flush=True)


def cheapest_layer(model: PreTrainedModel, yardstick: Yardstick, kept: Sequence[int]) -> tuple[int, float]:
    """Return the kept layer whose loss costs least, and the distance without it."""
    distances = {}
    hidden = run_layers(model, yardstick, yardstick.hidden, kept[:FIRST_KEPT])
    for position in range(FIRST_KEPT, len(kept) - LAST_KEPT):
        rest = run_layers(model, yardstick, hidden, kept[position + 1 :])
        distances[kept[position]] = forward_kl(yardstick, logprobs(model, rest, yardstick.predicts_answer))
        hidden = run_layers(model, yardstick, hidden, kept[position : position + 1])
    layer = min(distances, key=distances.__getitem__)
    return layer, distances[layer]


def make_yardstick(model: PreTrainedModel, tokenizer: Any) -> Yardstick:
    """Let the teacher answer the prompts, and keep what comparing with it needs; the tokenizer pads on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sequences = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=ANSWER_TOKENS)
    answers = sequences[:, prompts["input_ids"].shape[1] :]
    is_end = answers == tokenizer.eos_token_id
    is_answer = is_end.cumsum(1) - is_end.long() == 0  # up to and with the first end of turn
    attention_mask = torch.cat([prompts["attention_mask"], is_answer.long()], dim=1)
    predicts_answer = torch.cat([torch.zeros_like(prompts["attention_mask"]).bool(), is_answer], dim=1)[:, 1:]
    hidden, layer_arguments = layer_inputs(model, sequences, attention_mask)
    unscored = Yardstick(hidden, layer_arguments, predicts_answer, torch.empty(0))
    final = run_layers(model, unscored, hidden, range(model.config.num_hidden_layers))
    return Yardstick(hidden, layer_arguments, predicts_answer, logprobs(model, final, predicts_answer))


def layer_inputs(model: PreTrainedModel, sequences: Tensor, attention_mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return what the first layer is called with: its hidden states and its keyword arguments."""
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _layer, inputs, keywords: calls.append((inputs, keywords)), with_kwargs=True
    )
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    model.model(sequences, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    handle.remove()
    inputs, keywords = calls[0]
    return inputs[0], keywords


def run_layers(model: PreTrainedModel, yardstick: Yardstick, hidden: Tensor, layers: Sequence[int]) -> Tensor:
    """Pass hidden states through some of the layers."""
    for layer in layers:
        hidden = model.model.layers[layer](hidden, **yardstick.layer_arguments)
    return hidden


def logprobs(model: PreTrainedModel, hidden: Tensor, predicts_answer: Tensor) -> Tensor:
    """Return fp32 log-probabilities [tokens, vocabulary] at the answer tokens."""
    logits: Tensor = model.lm_head(model.model.norm(hidden)[:, :-1][predicts_answer])
    return logits.float().log_softmax(-1)


def forward_kl(yardstick: Yardstick, student_logprobs: Tensor) -> float:
    """Return KL(teacher || student) in nats, the mean over answer tokens."""
    teacher = yardstick.teacher_logprobs
    return (teacher.exp() * (teacher - student_logprobs)).sum(-1).mean().item()


if __name__ == "__main__":
    main()
