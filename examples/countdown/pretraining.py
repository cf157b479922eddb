"""Next-token training of one tiny Qwen3 model from nothing, and its accuracy on held-out problems."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from examples.countdown.task import (
    BOS,
    EOS,
    PAD,
    VOCABULARY_SIZE,
    Problems,
    Transcripts,
    answer_patterns,
    build_tokenizer,
    prompt_ids,
)

HEAD_DIM = 32
MAX_POSITIONS = 128
MAX_COMPLETION_TOKENS = 48  # eight tries
STEPS_BETWEEN_REPORTS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    hidden_size: int
    num_layers: int
    intermediate_size: int


@dataclass(frozen=True)
class Phase:
    """One stretch of training at one kind of transcript."""

    steps: int
    draw_batch: Callable[[np.random.Generator], Transcripts]
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.35  # of the steps, at the end, linearly to zero

    def lr_scale(self, step: int) -> float:
        """Return the factor on both learning rates: linear warm-up, plateau, linear decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.steps - step) / (self.steps * self.decay_fraction))
        return warmup * decay


def new_model(shape: Shape, seed: int) -> Qwen3ForCausalLM:
    """Make an untrained fp32 model with tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, phase: Phase, rng: np.random.Generator) -> None:
    """Train the model in place: Muon for the matrices of the layers, AdamW for embeddings and norms."""
    optimizers = _optimizers(model, phase)
    started = time.monotonic()
    for step in range(phase.steps):
        loss = _loss(model, phase.draw_batch(rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak_lr in optimizers:
            optimizer.param_groups[0]["lr"] = peak_lr * phase.lr_scale(step)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % STEPS_BETWEEN_REPORTS == 0:
            logger.info("step %d loss %.4f, %.0f s", step + 1, loss.item(), time.monotonic() - started)


def accuracy(model: Qwen3ForCausalLM, problems: Problems, do_sample: bool = True) -> tuple[float, float]:
    """Return the share of problems solved, and the share solved at the first try, at temperature 1 or greedily."""
    tokenizer = build_tokenizer()
    prompts = torch.from_numpy(prompt_ids(problems))
    output = model.generate(prompts, do_sample=do_sample, top_k=VOCABULARY_SIZE, max_new_tokens=MAX_COMPLETION_TOKENS)
    completions = output[:, prompts.shape[1] :].tolist()
    solved, first = 0, 0
    for token_ids, pattern in zip(completions, answer_patterns(problems), strict=True):
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        is_right = EOS in token_ids and re.fullmatch(pattern, text.strip()) is not None
        solved += is_right
        first += is_right and "x" not in text
    return solved / len(problems), first / len(problems)


def save(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Write the model in bf16, with the tokenizer, as a Hugging Face directory; the model takes on the rounding."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(directory)
    model.to(torch.float32)
    build_tokenizer().save_pretrained(directory)


def _optimizers(model: Qwen3ForCausalLM, phase: Phase) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=phase.matrix_lr, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=phase.other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, phase.matrix_lr), (adamw, phase.other_lr)]


def _loss(model: Qwen3ForCausalLM, batch: Transcripts) -> Tensor:
    token_ids = torch.from_numpy(batch.token_ids)
    mask = torch.from_numpy(batch.loss_mask)[:, 1:]
    # Padding is on the right and attention is causal, so no learned token can see it: no attention mask is needed.
    logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits  # [problems, tokens - 1, vocabulary]
    return functional.cross_entropy(logits[mask], token_ids[:, 1:][mask])
