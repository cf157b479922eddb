"""The choice of kernels over logits: they are tried on the device, and used if they say what plain torch says.

Plain torch is asked in float64: in float32, over so many tokens, its own errors reach 1e-4.
"""

import logging

import torch
from torch import Tensor

from cluster.config.objective import DivergenceTerm, ObjectiveConfig, PolicyGradientTerm, Support
from learner.loss.exact import EXACT_DIVERGENCES
from learner.loss.kernels.interface import RowKernels
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens

KERNEL_TOLERANCE = 5e-4  # of the norm; float32 makes errors of up to 1e-5 here, a card's exponentials a few times that
PROBE_TOKENS = 5
# Several tiles, the last of them not full; multiples of 16, as real vocabularies are, for which Triton compiles apart.
PROBE_VOCABULARY, PROBE_TARGET_VOCABULARY = 12_336, 12_320

_log = logging.getLogger("preceptor")


def choose_kernels(device: torch.device, support: Support) -> RowKernels | None:
    """Return kernels for objectives of a support; None, which means plain torch, off cards and where they fail."""
    if device.type != "cuda":
        return None
    try:
        from learner.loss.kernels.triton_launch import TritonKernels  # triton is not everywhere

        kernels = TritonKernels()
        fault = fault_of(kernels, device, support)
    except ImportError as error:
        fault = _first_line(error)
    if fault is None:
        return kernels
    _log.warning("learner: the kernels over logits are not used, but plain torch, which is slower: %s", fault)
    return None


def fault_of(kernels: RowKernels, device: torch.device, support: Support) -> str | None:
    """Say why the kernels cannot be used, after losses and gradients of a few random tokens; None if they can."""
    for name, config in _probes(support).items():
        try:
            found = _probe(Objective(config, kernels), device, torch.float32)
        except kernels.errors as error:
            return f"{name}: {_first_line(error)}"
        expected = _probe(Objective(config), device, torch.float64)
        # Not Python's `max`, which may pass over what is not a number.
        off = torch.stack(
            [(one - other).norm() / other.norm() for one, other in zip(found, expected, strict=True)]
        ).max()
        if not off <= KERNEL_TOLERANCE:
            return f"{name}: they differ from plain torch by {off:.1e}"
    return None


def _probes(support: Support) -> dict[str, ObjectiveConfig]:
    """Return objectives that need each of the kernels that the support does."""
    probes = {"softmax": ObjectiveConfig(support="sampled", terms={"main": PolicyGradientTerm()})}
    if support == "full":
        for name in EXACT_DIVERGENCES:
            term = DivergenceTerm(divergence=name, beta=0.3, skew=0.3)  # type: ignore[arg-type]
            probes[name] = ObjectiveConfig(support="full", terms={"main": term})
    return probes


def _probe(objective: Objective, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return losses, log-probabilities, entropy and gradient of a few tokens."""
    random = torch.Generator().manual_seed(0)
    sizes = (PROBE_VOCABULARY, PROBE_TARGET_VOCABULARY)
    logits, target = (torch.randn(PROBE_TOKENS, size, generator=random).mul(4).to(device, dtype) for size in sizes)
    tokens = _probe_tokens(torch.randint(min(sizes), (PROBE_TOKENS,), generator=random)).to(device)
    plan = objective.plan(tokens, None)
    found = objective.evaluate(logits, tokens, plan, {"teacher": target}, with_gradient=True)
    assert found.logits_gradient is not None, "it was asked for"
    return [found.losses, found.student.logprobs, found.student.entropy, found.logits_gradient]


def _probe_tokens(target_ids: Tensor) -> CompletionTokens:
    """Return the tokens of one trajectory, to which all models give the same probability."""
    flat, nothing = torch.full((len(target_ids),), -9.0), torch.empty(0)
    no_ids = torch.empty(len(target_ids), 0)
    return CompletionTokens(
        target_ids=target_ids,
        rollout_logprobs=flat,
        candidate_ids=no_ids.long(),
        candidate_rollout_logprobs=no_ids,
        logprobs={"teacher": flat - 1},
        candidate_logprobs={},
        teacher_entropy=nothing,
        trajectory=torch.zeros_like(target_ids),
        position=torch.arange(len(target_ids)),
        length=torch.full_like(target_ids, len(target_ids)),
        uniform=torch.zeros_like(flat),
        task_advantage=torch.zeros_like(flat),
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
