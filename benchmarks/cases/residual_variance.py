"""`python -m benchmarks.cases.residual_variance`: bias and variance of what a top-k reverse KL may be estimated by.

Per prefix, every token that the student could sample is enumerated, and the learner's own objective gives the gradient
by the logits for it. Variances are sums over prefixes, divided by that of the squared lengths of the whole reverse KL's
gradient; so are squared biases. Pairs are random logits, and the embedded models on texts that the student writes.

- vOPD: the sampled token, with minus the KL of candidates and tail as its baseline
- TT: a sum over the candidates, and the sampled token where it is outside
- residual, no baseline: as ResOPD has it; the objective has the candidates' own KL as the baseline of the tail
- residual, tail's own baseline: the mean over the tail's tokens, which nobody knows without the whole distribution
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from benchmarks.harness.report import RESULTS, Row, print_rows, row, write_rows
from cluster.config.objective import ObjectiveConfig
from cluster.demo import EMBEDDED
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens

COMMAND = "python -m benchmarks.cases.residual_variance"
TAIL = {"loss": "divergence", "truncation": "tail"}
GENERALIZED = {"loss": "divergence", "truncation": "generalized"}
PLAIN: dict[str, dict[str, Any]] = {
    "tail": {"main": TAIL | {"residual": False}},
    "generalized": {"main": GENERALIZED},
    "renormalized": {"main": {"loss": "divergence", "truncation": "renormalized"}},
}
UNBIASED: dict[str, dict[str, Any]] = {
    "sampled": {"main": {"loss": "policy_gradient"}},
    "vOPD": {"main": {"loss": "policy_gradient", "baseline": "kl"}},
    "TT": {"main": GENERALIZED, "outside": {"loss": "policy_gradient", "when": "outside_support"}},
    "residual": {"main": TAIL | {"residual": True}},
}
PROMPTS, COMPLETION_TOKENS = 16, 24  # of the embedded pair


@dataclass(frozen=True)
class Pair:
    """Distributions of student and teacher at some prefixes, and how many tokens are listed."""

    name: str
    student: Tensor  # [prefixes, vocabulary] log-probabilities
    teacher: Tensor
    support_size: int
    chosen_by: str = "teacher"  # whose most likely tokens are listed


def main() -> int:
    """Enumerate every pair and write the rows."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--prefixes", type=int, default=100, help="of each pair")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-residual-variance.json")
    options = parser.parse_args()
    rows = [found for pair in pairs(options.prefixes) for found in rows_of(pair)]
    print_rows(rows)
    write_rows(options.output, COMMAND, rows)
    return 0


def pairs(num_prefixes: int) -> Iterator[Pair]:
    """Yield random pairs, flat and peaked, and the embedded one."""
    for vocabulary, support_size, scale in [(64, 4, 1.5), (64, 16, 1.5), (512, 16, 2.0), (64, 16, 3.0)]:
        random = torch.Generator().manual_seed(vocabulary + support_size)
        logits = torch.randn(2, num_prefixes, vocabulary, generator=random, dtype=torch.float64)
        teacher = logits[0] * scale
        name = f"random, scale {scale:g}, {vocabulary} tokens"
        yield Pair(name, (teacher + 0.7 * logits[1]).log_softmax(-1), teacher.log_softmax(-1), support_size)
    student, teacher = embedded_logprobs(num_prefixes)
    for support_size, chosen_by in [(4, "teacher"), (16, "teacher"), (16, "student")]:
        yield Pair(f"embedded, {student.shape[-1]} tokens", student, teacher, support_size, chosen_by)


def embedded_logprobs(num_prefixes: int) -> tuple[Tensor, Tensor]:
    """Return what student and teacher say at places of texts that the student samples."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "student", padding_side="left")
    models = [
        AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32) for name in ("student", "teacher")
    ]
    lines = (EMBEDDED / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    texts = [msgspec.json.decode(line)["prompt"] for line in lines]
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with torch.no_grad():
        ids = models[0].generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=COMPLETION_TOKENS,
        )
        written = ids[:, prompts["input_ids"].shape[1] :]
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(written)], dim=-1)
        logits = [model(ids, attention_mask=mask).logits[:, -written.shape[1] - 1 : -1] for model in models]
    is_text = (written == tokenizer.eos_token_id).cumsum(-1) - (written == tokenizer.eos_token_id).long() == 0
    places = torch.randperm(int(is_text.sum()), generator=torch.Generator().manual_seed(0))[:num_prefixes]
    student, teacher = (values[is_text][places].double().log_softmax(-1) for values in logits)
    return student, teacher


def rows_of(pair: Pair) -> list[Row]:
    """Return the biases and variances of one pair."""
    total: dict[str, float] = {}
    for student, teacher in zip(pair.student, pair.teacher, strict=True):
        for name, value in measure_prefix(student, teacher, pair.support_size, pair.chosen_by).items():
            total[name] = total.get(name, 0.0) + value
    size, squared = f"{pair.name}, {pair.chosen_by}'s top {pair.support_size}", total.pop("squared length")
    return [
        row(name, size, total[name] / len(pair.student), "ratio")
        if name.startswith("mass")
        else row(name, size, (total[name] / squared) ** (0.5 if name.startswith("bias") else 1), "of |g|")
        for name in total
    ]


def measure_prefix(student: Tensor, teacher: Tensor, support_size: int, chosen_by: str = "teacher") -> dict[str, float]:
    """Return the squared biases and the variances of all estimators at one prefix."""
    p, log_ratio = student.exp(), student - teacher
    candidates = (student if chosen_by == "student" else teacher).topk(support_size).indices
    outside = torch.ones_like(p, dtype=torch.bool).index_fill_(0, candidates, value=False)
    whole = _gradient(p, log_ratio)
    found = {
        "squared length": float(whole.square().sum()),
        "mass of the candidates, student": float(p[candidates].sum()),
        "mass of the candidates, teacher": float(teacher.exp()[candidates].sum()),
    }
    for name, terms in PLAIN.items():
        mean = p @ gradients(terms, student, teacher, candidates)
        found[f"bias, {name}"] = float((mean - whole).square().sum())
    by_token = {name: gradients(terms, student, teacher, candidates) for name, terms in UNBIASED.items()}
    scores = torch.eye(len(p), dtype=p.dtype) - p  # the gradient of log p(y), by y
    centring = scores * outside[:, None] - _gradient(p, outside.to(p.dtype))
    inside_p, inside_ratio = p[~outside] / p[~outside].sum(), log_ratio[~outside]
    in_use = inside_p @ inside_ratio - (p[~outside].sum() / teacher[~outside].exp().sum()).log()
    tails_own = (p * log_ratio)[outside].sum() / p[outside].sum() - (
        p[outside].sum() / teacher[outside].exp().sum()
    ).log()
    by_token["residual, no baseline"] = by_token["residual"] + in_use * centring
    by_token["residual, tail's own baseline"] = by_token["residual"] + (in_use - tails_own) * centring
    for name, gradient in by_token.items():
        mean = p @ gradient
        found[f"bias, {name}"] = float((mean - whole).square().sum())
        found[f"variance, {name}"] = float(p @ (gradient - mean).square().sum(-1))
    return found


def gradients(terms: Mapping[str, Any], student: Tensor, teacher: Tensor, candidates: Tensor) -> Tensor:
    """Return the gradient by the logits for every token that the student may sample, [vocabulary, vocabulary]."""
    n, zeros = len(student), torch.zeros(len(student), dtype=student.dtype)
    tokens = CompletionTokens(
        target_ids=torch.arange(n),
        rollout_logprobs=student,
        candidate_ids=candidates.expand(n, -1),
        candidate_rollout_logprobs=student.new_empty(n, 0),
        scores={"teacher": {"logprobs": teacher, "candidate_logprobs": teacher[candidates].expand(n, -1)}},
        trajectory=torch.arange(n),
        position=torch.zeros(n, dtype=torch.long),
        length=torch.ones(n, dtype=torch.long),
        uniform=zeros,
        task_advantage=zeros,
        reward=zeros,
        weight=zeros + 1,
    )
    table = {"support": "topk", "support_size": len(candidates), "terms": terms}
    objective = Objective(msgspec.convert(table, ObjectiveConfig))
    plan = objective.plan(tokens, None)
    gradient = objective.evaluate(student.repeat(n, 1), tokens, plan, {}, with_gradient=True).logits_gradient
    assert gradient is not None
    return gradient


def _gradient(p: Tensor, slopes: Tensor) -> Tensor:
    """Return the sum of slope times the gradient of p, by the logits."""
    return p * (slopes - p @ slopes)


if __name__ == "__main__":
    sys.exit(main())
