"""The fused head against plain autograd over all logits at once."""

import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiForCausalLM,
    Qwen3ForCausalLM,
)

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.models.lm_head import LmHead
from cluster.models.stop_class import EXCLUDED_LOGIT
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.loss.objective import Objective
from learner.loss.tokens import Evaluation
from learner.model.completion_head import CompletionHead
from learner.model.projection import LogitScaling
from learner.model.student import load_student
from tests.learner.support import OBJECTIVES, ROUTE, SMALL, VOCABULARY, make_scored, objective_of, random_heads

WIDTH = 24
MODELS = {
    "tied": (Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "untied": (LlamaForCausalLM, {"tie_word_embeddings": False}),
    "bias": (PhiForCausalLM, {}),
    "soft cap": (Gemma2ForCausalLM, {"final_logit_softcapping": 2.0}),
    "multiplied": (CohereForCausalLM, {"logit_scale": 0.3}),
    "divided": (GraniteForCausalLM, {"logits_scaling": 3.0}),
}


def make_head(dtype=torch.float32, vocabulary=VOCABULARY, width=WIDTH):
    linear = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(1))
    return CompletionHead(linear, LogitScaling())


def make_hidden(num_tokens, dtype=torch.float32, width=WIDTH):
    hidden = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(2))
    return hidden.to(dtype).requires_grad_()


def batch_of(objective, heads=None, grid=((0, 1), (2, 3), (4,))):
    return build_micro_batch(grid, trajectories([make_scored(objective, heads=heads)]), seed=0)


def evaluate(head, hidden, batch, objective, heads=None):
    return Evaluation(*head(hidden, batch, Objective(objective), heads or {}))


def plain_loss(name: str, logprobs: Tensor, teacher_logprobs: Tensor | None, batch) -> Tensor:
    """Return the sum of the losses from log-probabilities [completion_tokens, vocabulary], by the textbook."""
    tokens = batch.tokens
    student = logprobs.gather(-1, tokens.target_ids[:, None])[:, 0]
    log_ratio = student.detach() - tokens.logprobs["teacher"]
    ratio = (student - tokens.rollout_logprobs).exp()
    if name == "sampled":
        return (ratio * log_ratio).sum()
    if name == "topk":
        pair = logprobs.gather(-1, tokens.candidate_ids), tokens.candidate_logprobs["teacher"]
        p, q = (torch.cat([side.exp(), 1 - side.exp().sum(-1, keepdim=True)], dim=-1) for side in pair)
        within = [side.detach().log_softmax(-1) for side in pair]
        baseline = (within[0].exp() * (within[0] - within[1])).sum(-1)
        outside = (tokens.candidate_ids != tokens.target_ids[:, None]).all(-1)
        residual = log_ratio - (p[:, -1] / q[:, -1]).log().detach() - baseline
        return (p * (p / q).log()).sum() + (outside * ratio * residual + baseline * p[:, -1]).sum()
    mixture = torch.stack([logprobs, teacher_logprobs]).logsumexp(0) - math.log(2)
    of_student = (logprobs.exp() * (logprobs - mixture)).sum()
    return 0.5 * of_student + 0.5 * (teacher_logprobs.exp() * (teacher_logprobs - mixture)).sum()


@pytest.mark.parametrize("objective", ["sampled", "topk", "full"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_a_whole_student_equal_plain_autograd_over_all_logits(kind, objective, tmp_path: Path):
    model, settings = MODELS[kind]
    torch.manual_seed(0)
    causal_lm = model(model.config_class(**SMALL, **settings))
    if kind == "bias":
        nn.init.normal_(causal_lm.get_output_embeddings().bias)  # fresh models have zeros
    causal_lm.save_pretrained(tmp_path)
    student = load_student(StudentConfig(model=str(tmp_path)), LearnerConfig(dtype="float32"))
    student.head.chunk_tokens = 13
    heads = random_heads(OBJECTIVES[objective], {ROUTE: 40}) if objective == "full" else None
    batch = batch_of(OBJECTIVES[objective], heads, grid=((4,),))
    found = Evaluation(*student(batch, Objective(OBJECTIVES[objective]), heads))
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.causal_lm.named_parameters()}
    student.zero_grad()
    logprobs = student.causal_lm(batch.input_ids).logits[0].float()[batch.predicting].log_softmax(-1)
    of_teacher = heads[ROUTE]["teacher"].logits(batch.routes[0].hidden["teacher"]).log_softmax(-1) if heads else None
    expected = plain_loss(objective, logprobs, of_teacher, batch)
    expected.backward()
    torch.testing.assert_close(found.loss, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.entropy, -(logprobs.exp() * logprobs).sum(-1), atol=1e-4, rtol=0)
    for name, parameter in student.causal_lm.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5 * max(1.0, scale), rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_class_of_stop_ids_is_trained_as_one_token_whichever_of_them_was_written(name):
    """The first id has what all come to together; its gradient reaches each by its share."""
    objective = OBJECTIVES[name]
    heads = random_heads(objective, {ROUTE: 40}) if name == "full" else None
    batch = batch_of(objective, heads)
    stops = (7, 5, int(batch.tokens.target_ids[0]))
    head, hidden = make_head(), make_hidden(len(batch.tokens))
    logits = (hidden.detach() @ head.weight.t()).detach().requires_grad_()
    merged = logits.index_copy(1, torch.tensor(stops), torch.full((len(logits), 3), EXCLUDED_LOGIT))
    merged = merged.index_copy(1, torch.tensor([7]), logits[:, list(stops)].logsumexp(-1, keepdim=True))
    identity = CompletionHead(nn.Linear(VOCABULARY, VOCABULARY, bias=False), LogitScaling())
    with torch.no_grad():
        identity.weight.copy_(torch.eye(VOCABULARY))
    one_id = torch.tensor([7 if token_id in stops else token_id for token_id in range(VOCABULARY)])
    targets, candidates = one_id[batch.tokens.target_ids], one_id[batch.tokens.candidate_ids]
    as_one = replace(batch, tokens=replace(batch.tokens, target_ids=targets, candidate_ids=candidates))
    assert targets[0] == 7
    expected = evaluate(identity, merged, as_one, objective, heads)
    expected.loss.backward()
    head.stop_class, head.chunk_tokens = stops, 9
    found = evaluate(head, hidden, batch, objective, heads)
    found.loss.backward()
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, logits.grad @ head.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.weight.grad, logits.grad.t() @ hidden.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["exact-reverse-kl", "exact-forward-kl"])
def test_exact_kl_through_hidden_states_equals_the_kl_of_full_logits(preset):
    objective = objective_of(preset)
    heads = random_heads(objective, {ROUTE: 40})
    batch = batch_of(objective, heads)
    head, hidden = make_head(), make_hidden(len(batch.tokens))
    found = evaluate(head, hidden, batch, objective, heads)
    (found.loss / len(batch.tokens)).backward()
    plain_hidden, weight = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    student = (plain_hidden @ weight.t()).log_softmax(-1)
    teacher = heads[ROUTE]["teacher"].logits(batch.routes[0].hidden["teacher"]).log_softmax(-1)
    first, second = (student, teacher) if preset == "exact-reverse-kl" else (teacher, student)
    expected = (first.exp() * (first - second)).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(found.losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.weight.grad, weight.grad, atol=1e-6, rtol=1e-4)


def test_tokens_of_two_routes_meet_the_heads_of_their_own_teachers():
    objective = OBJECTIVES["full"]
    heads = random_heads(objective, {"narrow": 16, "wide": 48})
    batches = [
        make_scored(objective, [(2, 9), (3, 14)], "narrow", heads),
        make_scored(objective, [(1, 11), (4, 6)], "wide", heads, first_id=2),
    ]
    rows = trajectories(batches)
    mixed = build_micro_batch(((0, 2), (3, 1)), rows, seed=0)
    head, hidden = make_head(), make_hidden(len(mixed.tokens))
    head.chunk_tokens = 5
    found = evaluate(head, hidden, mixed, objective, heads)
    found.loss.backward()
    losses, gradients, start = [], [], 0
    for index in (0, 2, 3, 1):
        alone = build_micro_batch(((index,),), rows, seed=0)
        part = hidden.detach()[start : start + len(alone.tokens)].requires_grad_()
        start += len(alone.tokens)
        one = evaluate(head, part, alone, objective, heads)
        one.loss.backward()
        losses.append(one.losses)
        gradients.append(part.grad)
    torch.testing.assert_close(found.losses, torch.cat(losses), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, torch.cat(gradients), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_size_of_chunks_changes_nothing(name):
    objective = OBJECTIVES[name]
    heads = random_heads(objective, {ROUTE: 40}) if name == "full" else None
    batch = batch_of(objective, heads)
    results = []
    for chunk_tokens in (1000, 7):
        head, hidden = make_head(), make_hidden(len(batch.tokens))
        head.chunk_tokens = chunk_tokens
        found = evaluate(head, hidden, batch, objective, heads)
        found.loss.backward()
        results.append((found.losses, found.logprobs, found.candidate_mass, hidden.grad, head.weight.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sampled", "topk", "full"])
def test_bfloat16_gradients_are_those_of_float32_to_its_precision(name):
    objective = OBJECTIVES[name]
    heads = random_heads(objective, {ROUTE: 40}) if name == "full" else None
    batch = batch_of(objective, heads)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        head, hidden = make_head().to(torch.bfloat16).to(dtype), make_hidden(len(batch.tokens), torch.bfloat16)
        hidden = hidden.detach().to(dtype).requires_grad_()
        head.chunk_tokens = 9
        found = evaluate(head, hidden, batch, objective, heads)
        (found.loss / 100).backward()
        assert head.weight.grad.dtype == dtype
        results.append((found.loss.detach(), hidden.grad.float(), head.weight.grad.float()))
    for rough, exact in zip(*results, strict=True):
        assert (rough - exact).norm() < 0.02 * exact.norm()


def test_without_a_request_for_gradients_the_figures_are_the_same_and_nothing_is_kept():
    batch = batch_of(OBJECTIVES["topk"])
    head, hidden = make_head(), make_hidden(len(batch.tokens))
    with_gradient = evaluate(head, hidden, batch, OBJECTIVES["topk"])
    with torch.no_grad():
        without = evaluate(head, hidden, batch, OBJECTIVES["topk"])
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.losses, with_gradient.losses)
    torch.testing.assert_close(without.entropy, with_gradient.entropy)
    assert not any(
        part.requires_grad for name, part in vars(with_gradient).items() if name not in ("loss", "logits_gradient")
    )


def test_without_an_objective_only_the_students_own_figures_are_left():
    batch = batch_of(OBJECTIVES["sampled"])
    head, hidden = make_head(), make_hidden(len(batch.tokens))
    found = Evaluation(*head(hidden, batch, None, {}))
    logprobs = (hidden @ head.weight.t()).log_softmax(-1)
    torch.testing.assert_close(found.logprobs, logprobs.gather(-1, batch.tokens.target_ids[:, None])[:, 0])
    torch.testing.assert_close(found.entropy, -(logprobs.exp() * logprobs).sum(-1))
    assert found.loss.item() == 0


def test_no_completion_tokens_keep_the_graph_with_gradients_of_zero():
    head, hidden = make_head(), make_hidden(0)
    found = evaluate(head, hidden, build_micro_batch((), [], seed=0), OBJECTIVES["full"])
    found.loss.backward()
    assert found.loss.item() == 0
    assert hidden.grad.shape == (0, WIDTH)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_the_loss_may_be_scaled_before_the_backward():
    batch = batch_of(OBJECTIVES["topk"])
    gradients = []
    for factor in (1.0, -0.25):
        head, hidden = make_head(), make_hidden(len(batch.tokens))
        (evaluate(head, hidden, batch, OBJECTIVES["topk"]).loss * factor).backward()
        gradients.append((hidden.grad / factor, head.weight.grad / factor))
    torch.testing.assert_close(*gradients)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    vocabulary, chunk_tokens = 30_000, 64
    objective = OBJECTIVES["full"]
    head = make_head(vocabulary=vocabulary)
    head.chunk_tokens = chunk_tokens
    heads = {ROUTE: {"teacher": LmHead(head.weight.detach())}}
    peaks = {}
    for num_tokens in (256, 2048):
        batch = batch_of_zeros(objective, num_tokens)
        hidden = make_hidden(num_tokens)
        peaks[num_tokens] = peak_bytes(lambda: evaluate(head, hidden, batch, objective, heads).loss.backward())  # noqa: B023
        head.zero_grad()
    of_hidden = WIDTH * 4 * (2048 - 256)
    assert peaks[256] > 2 * 4 * chunk_tokens * vocabulary, "a chunk of each model's logits must show in the measure"
    # A few numbers per token and some copies of [tokens, width]; all logits of so many more tokens would take 215 MB.
    assert peaks[2048] - peaks[256] < 4 * of_hidden


def batch_of_zeros(objective, num_tokens):
    scored = make_scored(objective, [(1, num_tokens)])
    batch = build_micro_batch(((0,),), trajectories([scored]), seed=0)
    states = torch.zeros(num_tokens, WIDTH)
    return replace(batch, routes=(replace(batch.routes[0], scores={"teacher": {"hidden": states}}),))


def peak_bytes(run):
    """Return the most memory that torch holds at once of what it allocates in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_hidden_states_arrive_as_the_bits_of_bfloat16():
    objective = OBJECTIVES["full"]
    heads = random_heads(objective, {ROUTE: 40})
    (row,) = trajectories([make_scored(objective, [(2, 6)], heads=heads)])
    rounded = torch.from_numpy(row.wide_scores["teacher"]["hidden"].copy()).bfloat16()
    bits = replace(row, wide_scores={"teacher": {"hidden": rounded.view(torch.uint16).numpy()}})
    floats = replace(row, wide_scores={"teacher": {"hidden": rounded.float().numpy()}})
    head, hidden = make_head(), make_hidden(6)
    of_bits, of_floats = (
        evaluate(head, hidden, build_micro_batch(((0,),), [either], seed=0), objective, heads).losses
        for either in (bits, floats)
    )
    np.testing.assert_array_equal(of_bits.numpy(), of_floats.numpy())
