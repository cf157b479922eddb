"""Chooses kernels over logits: it tries them on the device, and takes them if they say what plain torch says.

Plain torch computes in float64: in float32, over so many tokens, its own errors reach 1e-4.
"""

import logging

import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import DivergenceTerm, PolicyGradientTerm
from learner.loss.divergences import DIVERGENCES
from learner.loss.kernels.interface import RowKernels
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens

KERNEL_TOLERANCE = 5e-4  # of the norm; float32 makes errors of up to 1e-5 here, a GPU's exponentials a few times that
PROBE_TOKENS = 5
# Several tiles, the last of them not full; multiples of 16, as real vocabularies are, for which Triton compiles apart.
PROBE_VOCABULARY, PROBE_TARGET_VOCABULARY = 12_336, 12_320

_log = logging.getLogger("preceptor")


def choose_kernels(device: torch.device, whole_vocabulary: bool) -> RowKernels | None:
    """Return kernels for the softmax, and for divergences over the whole vocabulary if there are any to compute.

    None, which means plain torch, off GPUs and where the kernels fail.
    """
    if device.type != "cuda":
        return None
    try:
        from learner.loss.kernels.triton_launch import TritonKernels  # triton is not everywhere

        kernels = TritonKernels()
        fault = fault_of(kernels, device, whole_vocabulary)
    except ImportError as error:
        fault = _first_line(error)
    if fault is None:
        return kernels
    _log.warning("learner: the kernels over logits are not used, but plain torch, which is slower: %s", fault)
    return None


def fault_of(kernels: RowKernels, device: torch.device, whole_vocabulary: bool) -> str | None:
    """Say why the kernels cannot be used, after losses and gradients of a few random tokens; None if they can."""
    for name, config in _probes(kernels, whole_vocabulary).items():
        try:
            results = _probe(Objective(config, kernels), device, torch.float32)
        except kernels.errors as error:
            return f"{name}: {_first_line(error)}"
        expected = _probe(Objective(config), device, torch.float64)
        # Not Python's `max`, which may pass over what is not a number.
        off = torch.stack(
            [(one - other).norm() / other.norm() for one, other in zip(results, expected, strict=True)]
        ).max()
        if not off <= KERNEL_TOLERANCE:
            return f"{name}: they differ from plain torch by {off:.1e}"
    return None


def _probes(kernels: RowKernels, whole_vocabulary: bool) -> dict[str, ObjectiveConfig]:
    """Return objectives that need each of the kernels that may be used."""
    probes = {"softmax": ObjectiveConfig(support="sampled", terms={"main": PolicyGradientTerm()})}
    if whole_vocabulary:
        for name, divergence in DIVERGENCES.items():
            if kernels.knows(divergence.kernel):
                term = DivergenceTerm(divergence=name, beta=0.3, skew=0.3)
                probes[name] = ObjectiveConfig(support="full", terms={"main": term})
    return probes


def _probe(objective: Objective, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return losses, log-probabilities, entropy and gradient of a few tokens."""
    random = torch.Generator().manual_seed(0)
    sizes = (PROBE_VOCABULARY, PROBE_TARGET_VOCABULARY)
    logits, target = (torch.randn(PROBE_TOKENS, size, generator=random).mul(4).to(device, dtype) for size in sizes)
    tokens = _probe_tokens(torch.randint(min(sizes), (PROBE_TOKENS,), generator=random)).to(device)
    plan = objective.plan(tokens, None)
    results = objective.evaluate(logits, tokens, plan, {"teacher": target}, with_gradient=True)
    assert results.logits_gradient is not None, "with_gradient is true"
    return [results.losses, results.logprobs, results.entropy, results.logits_gradient]


def _probe_tokens(target_ids: Tensor) -> CompletionTokens:
    """Return the tokens of one trajectory, to which all models give the same probability."""
    flat = torch.full((len(target_ids),), -9.0)
    no_ids = torch.empty(len(target_ids), 0)
    return CompletionTokens(
        target_ids=target_ids,
        rollout_logprobs=flat,
        candidate_ids=no_ids.long(),
        candidate_rollout_logprobs=no_ids,
        scores={"teacher": {"logprobs": flat - 1}},
        trajectory=torch.zeros_like(target_ids),
        position=torch.arange(len(target_ids)),
        length=torch.full_like(target_ids, len(target_ids)),
        uniform=torch.zeros_like(flat),
        task_advantage=torch.zeros_like(flat),
        reward=torch.zeros_like(flat),
        weight=torch.ones_like(flat),
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
