"""The kernels over rows of logits, interpreted on a CPU, against float64 autograd of definitions and plain torch."""

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config.presets import PRESETS
from cluster.config.terms import DivergenceTerm
from learner.loss.divergences import DIVERGENCES
from learner.loss.evaluators import takes_fused
from learner.loss.kernels.choice import choose_kernels
from learner.loss.kernels.triton_launch import TritonKernels
from learner.loss.terms import DivergenceLoss
from tests.learner.loss.builders import entropy, random_logprobs, written
from tests.learner.loss.kernels.interpreted import (
    Case,
    compare_interpreted,
    evaluate,
    evaluate_interpreted,
    fault_interpreted,
    fault_with_another_divergence,
)

NAMES = sorted(DIVERGENCES)
TOKENS, VOCABULARY = 4, 37  # three tiles of 16, the last of them not full
SECONDS = 200.0


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Start a process in which Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
            executor.submit(int).result(SECONDS)  # the process starts, and the variable is read, now
            yield executor


def logits_of(width: int, seed: int, scale: float = 3.0) -> Tensor:
    """Return float32 logits that are not normalised."""
    return (random_logprobs(TOKENS, width, seed=seed, scale=scale) + 5.0 * seed).float()


def case_of(
    terms: dict[str, Any], logits: Tensor, models: dict[str, Tensor], support: str = "full", dtype: str = "float32"
) -> Case:
    arrays = {model: values.numpy() for model, values in models.items()}
    return Case({"support": support, "terms": terms}, logits.numpy(), arrays, (0, 5, 17, 31), dtype)


def divergence(name: str, parameter: float, **fields: Any) -> dict[str, Any]:
    return {"loss": "divergence", "divergence": name, "beta": parameter, "skew": parameter, **fields}


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def defined(name: str, log_p: Tensor, log_q: Tensor, x: float) -> Tensor:
    """Return a divergence by its definition in docs/objective.md."""
    if name == "forward_kl" or (name == "jsd" and x == 0):
        return kl(log_q, log_p)
    if name == "reverse_kl" or (name == "jsd" and x == 1):
        return kl(log_p, log_q)
    log_mixture = (x * log_q.exp() + (1 - x) * log_p.exp()).log()
    if name == "jsd":
        return x * kl(log_q, log_mixture) + (1 - x) * kl(log_p, log_mixture)
    if name == "skewed_forward_kl":
        return kl(log_q, log_mixture)
    return kl(log_p, (x * log_p.exp() + (1 - x) * log_q.exp()).log())


def same(found: dict[str, np.ndarray], expected: dict[str, Any], **tolerance: float) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name, **({"rtol": 1e-5, "atol": 4e-6} | tolerance))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("student", "teacher"), [(VOCABULARY, 33), (32, VOCABULARY)])
def test_values_and_gradients_are_those_of_autograd_on_the_definitions(
    interpreter: ProcessPoolExecutor, name: str, parameter: float, student: int, teacher: int
) -> None:
    logits, target = logits_of(student, seed=0), logits_of(teacher, seed=1)
    case = case_of({"main": divergence(name, parameter, weight=0.7)}, logits, {"teacher": target})
    found = interpreter.submit(evaluate_interpreted, case).result(SECONDS)
    leaf, width = logits.double().requires_grad_(), min(student, teacher)
    log_p, log_q = leaf[:, :width].log_softmax(-1), target.double()[:, :width].log_softmax(-1)
    losses = 0.7 * defined(name, log_p, log_q, parameter)
    (gradient,) = torch.autograd.grad(losses.sum() + 0 * leaf.sum(), leaf)
    whole = leaf.detach().log_softmax(-1)
    of_written, of_all = written(whole, torch.tensor(case.target_ids)).numpy(), entropy(whole).numpy()
    same(found, {"losses": losses.detach().numpy(), "gradient": gradient.numpy()})
    same(found, {"logprobs": of_written, "logprobs of a first pass": of_written})
    same(found, {"entropy": of_all, "entropy of a first pass": of_all})


MIXED = {"teacher": 1.5, "base": -0.5}
TERMS = {
    "several models": {"main": divergence("jsd", 0.4, target=MIXED)},
    "one model, sharpened": {"main": divergence("reverse_kl", 0.0, target={"teacher": 2.0})},
    "one of two models": {"main": divergence("forward_kl", 0.0, target={"base": 1.0})},
    "chosen tokens": {"main": divergence("skewed_reverse_kl", 0.1, when="log_ratio_positive")},
    "two terms": {"main": divergence("reverse_kl", 0.0), "cover": divergence("forward_kl", 0.0)},
    "policy gradient": {"main": {"loss": "policy_gradient"}},
}


@pytest.mark.parametrize("kind", TERMS)
def test_kernels_say_what_plain_torch_says(interpreter: ProcessPoolExecutor, kind: str) -> None:
    models = {"teacher": logits_of(34, seed=1), "base": logits_of(36, seed=2)}
    case = case_of(TERMS[kind], logits_of(VOCABULARY, seed=0), models)
    expected = evaluate(case, None)
    assert np.abs(expected["gradient"]).sum() > 0.1
    same(interpreter.submit(evaluate_interpreted, case).result(SECONDS), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_listed_tokens_get_their_gradient_from_the_softmax_kernels(
    interpreter: ProcessPoolExecutor, temperature: float
) -> None:
    terms = {"main": {"loss": "policy_gradient", "importance": {"kind": "ppo_clip"}}}
    case = case_of(terms, logits_of(VOCABULARY, seed=0), {"teacher": logits_of(VOCABULARY, seed=1)}, "sampled")
    case = replace(case, temperature=temperature)
    found = interpreter.submit(evaluate_interpreted, case).result(SECONDS)
    same(found, evaluate(case, None))
    np.testing.assert_allclose(found["gradient"].sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("preset", ["tail-topk", "tt-opd"])
def test_sampled_tokens_correct_the_tail_with_kernels_as_without(interpreter: ProcessPoolExecutor, preset: str) -> None:
    logits, teacher = logits_of(VOCABULARY, seed=0), logits_of(VOCABULARY, seed=1)
    target_ids = tuple(teacher.argsort(-1)[range(4), [-1, 0, 9, 18]].tolist())  # the first is a candidate
    table = {"support": "topk", "support_size": 6, "terms": PRESETS[preset]["terms"]}
    case = Case(table, logits.numpy(), {"teacher": teacher.numpy()}, target_ids, num_candidates=6)
    same(interpreter.submit(evaluate_interpreted, case).result(SECONDS), evaluate(case, None))


def test_a_tail_that_candidates_cannot_say_is_added_up_with_kernels_as_without(
    interpreter: ProcessPoolExecutor,
) -> None:
    logits, teacher = logits_of(VOCABULARY, seed=0), logits_of(VOCABULARY, seed=1)
    logits[1:3].scatter_add_(-1, teacher[1:3].topk(6).indices, torch.full((2, 6), 30.0))
    term = {"loss": "divergence", "divergence": "forward_kl"}
    table = {"support": "topk", "support_size": 6, "terms": {"main": term}}
    case = Case(table, logits.numpy(), {"teacher": teacher.numpy()}, (0, 1, 2, 3), num_candidates=6)
    expected = evaluate(case, None)
    same(interpreter.submit(evaluate_interpreted, case).result(SECONDS), expected)
    lost = torch.from_numpy(expected["gradient"])[1:3].scatter(-1, teacher[1:3].topk(6).indices, 0.0)
    of_teacher = teacher[1:3].softmax(-1).scatter(-1, teacher[1:3].topk(6).indices, 0.0)
    np.testing.assert_allclose(-lost.sum(-1), of_teacher.sum(-1), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_zero_where_student_and_target_agree(
    interpreter: ProcessPoolExecutor, name: str
) -> None:
    logits = logits_of(VOCABULARY, seed=3)
    case = case_of({"main": divergence(name, 0.3)}, logits, {"teacher": logits.clone()})
    found = interpreter.submit(evaluate_interpreted, case).result(SECONDS)
    limit = 0.0 if name in ("reverse_kl", "forward_kl") else 3e-7
    assert np.abs(found["losses"]).max() <= limit
    assert np.abs(found["gradient"]).max() <= limit


@pytest.mark.parametrize("name", NAMES)
def test_extreme_and_masked_logits_give_the_finite_values_of_plain_torch(
    interpreter: ProcessPoolExecutor, name: str
) -> None:
    logits, target = logits_of(VOCABULARY, seed=0), logits_of(VOCABULARY, seed=1)
    logits[0, 3], target[0, 20] = 1e4, 1e4
    logits[1, 3], target[1, 20] = -1e4, -1e4
    logits[2, 3:20], target[2, 7:], target[3, 2] = -math.inf, -math.inf, -300.0
    logits[3] += 1e4
    case = case_of({"main": divergence(name, 0.5)}, logits, {"teacher": target})
    expected = evaluate(case, None)
    assert all(np.isfinite(values).all() for values in expected.values())
    assert expected["losses"][0] > 0.1
    same(interpreter.submit(evaluate_interpreted, case).result(SECONDS), expected)


def test_a_logit_that_is_not_a_number_is_not_hidden(interpreter: ProcessPoolExecutor) -> None:
    logits, target = logits_of(VOCABULARY, seed=0), logits_of(VOCABULARY, seed=1)
    logits[1, 20], target[2, 20] = math.nan, math.nan
    case = case_of({"main": divergence("jsd", 0.5)}, logits, {"teacher": target})
    found = interpreter.submit(evaluate_interpreted, case).result(SECONDS)
    assert np.isnan(found["losses"]).tolist() == [False, True, True, False]
    assert np.isnan(found["gradient"]).all(-1).tolist() == [False, True, True, False]


def test_a_target_in_bfloat16_is_read_as_it_is(interpreter: ProcessPoolExecutor) -> None:
    logits, target = logits_of(VOCABULARY, seed=0), logits_of(VOCABULARY, seed=1).bfloat16().float()
    terms = {"main": divergence("jsd", 0.5)}
    wide, narrow = (
        interpreter.submit(evaluate_interpreted, case_of(terms, logits, {"teacher": target}, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    same(narrow.result(SECONDS), wide.result(SECONDS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ("", None),
        ("jsd is off", "jsd: they differ from plain torch by "),
        ("softmax is off", "softmax: they differ from plain torch by "),
        ("softmax is not finite", "softmax: they differ from plain torch by nan"),
        ("reverse_kl does not start", "reverse_kl: out of registers"),
    ],
)
def test_kernels_are_chosen_only_if_they_agree_with_plain_torch(
    interpreter: ProcessPoolExecutor, flaw: str, says: str | None
) -> None:
    found = interpreter.submit(fault_interpreted, flaw, "full").result(SECONDS)
    assert (found is None) if says is None else found is not None and found.startswith(says)


def test_a_divergence_without_a_twin_leaves_the_kernels_to_the_others(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(fault_with_another_divergence).result(SECONDS) is None


def test_each_term_is_offered_to_the_kernels_by_itself() -> None:
    kernels, logits = TritonKernels(device_type="cpu"), torch.ones(3, 5)
    terms = {
        name: {"main": DivergenceLoss("main", DivergenceTerm(divergence=name), temperature=1.0)}
        for name in (*NAMES, "tests.learner.loss.kernels.interpreted:TORCH_ONLY")
    }
    fused = {name for name, of_name in terms.items() if takes_fused(of_name, kernels, logits)}
    assert fused == set(NAMES)


def test_kernels_refuse_a_divergence_that_no_branch_computes(interpreter: ProcessPoolExecutor) -> None:
    logits = logits_of(VOCABULARY, seed=0)
    assert "no branch of _value_and_slope computes this divergence" in str(
        interpreter.submit(compare_interpreted, "alpha", logits.numpy()).exception(SECONDS)
    )


def test_a_card_without_triton_takes_plain_torch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_launch", "triton_kernels"):
        monkeypatch.delitem(sys.modules, f"learner.loss.kernels.{name}", raising=False)
    assert choose_kernels(torch.device("cuda"), True) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("learner: the kernels over logits are not used, but plain torch")
    assert "triton" in record.getMessage()


def test_a_cpu_takes_plain_torch() -> None:
    assert choose_kernels(torch.device("cpu"), True) is None


def test_kernels_take_rows_of_float32_on_their_kind_of_device() -> None:
    kernels, rows = TritonKernels(device_type="cpu"), torch.ones(3, 5)
    assert kernels.takes(rows)
    assert kernels.takes(rows[:, :4])
    assert not any(kernels.takes(values) for values in (rows.double(), rows[:0], rows.t(), rows.bfloat16()))
    assert not TritonKernels().takes(rows)


@pytest.mark.parametrize(
    ("name", "parameter", "same_as"),
    [
        ("jsd", 0.0, "forward_kl"),
        ("jsd", 1.0, "reverse_kl"),
        ("skewed_forward_kl", 0.0, "forward_kl"),
        ("skewed_reverse_kl", 0.0, "reverse_kl"),
        ("skewed_reverse_kl", 1.0, "skewed_reverse_kl"),
        ("jsd", 0.3, "jsd"),
    ],
)
def test_the_ends_of_a_parameter_are_the_divergences_that_they_are(name: str, parameter: float, same_as: str) -> None:
    assert DIVERGENCES[name].at(parameter) == DIVERGENCES[same_as]
