"""What a rank keeps of the trajectories that it learns from, over the plain-torch engine."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.contracts.kept_rows import MOST_CANDIDATES, chosen_ids
from cluster.contracts.metrics import report
from cluster.contracts.requests import PRIVILEGED_IDS
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import to_wire
from learner.batching.arrivals import RankShare
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.model.completion_head import load_teacher_heads
from learner.model.student import load_student
from learner.worker import LearnerActor
from tests.learner.support import OBJECTIVES, make_scored, score_by

NUM_ROWS = 7


def learn(config, batch, micro_batch_tokens=64, heads=None):
    """Let a new rank learn from a batch; return what it kept, and the metrics."""
    worker = LearnerActor(config, fetch=lambda batches: list(map(to_wire, batches)))
    worker.use(ReferenceEngine(load_student(config.student, config.learner), config.learner), heads or {})
    lengths = ragged(batch, "token_ids").lengths.tolist()
    (grids,) = plan_step(lengths, 1, micro_batch_tokens)
    metrics = report(worker.accumulate(RankShare((batch,), (0.0,) * len(lengths), grids), completes_step=True))
    metrics |= report(worker.take_step(num_tokens=int(ragged(batch, "loss_mask").values.sum()), step=0))
    taken = worker.take_kept_rows()
    chosen, worst = (
        [] if rows is None else pa.ipc.open_stream(rows).read_all().to_pylist() for rows in (taken.chosen, taken.worst)
    )
    assert worker.take_kept_rows().chosen is None
    return {row["trajectory_id"]: row for row in chosen}, worst, metrics


def config_of(make_config, *overrides):
    return make_config(f"prompts.prompts_per_step={NUM_ROWS}", "objective.support_size=8", *overrides)


def test_the_rows_kept_are_the_same_whatever_the_micro_batches(make_config, scored):
    config = config_of(make_config, "logging.kept_rows=3")
    kept, worst, metrics = learn(config, scored)
    others, other_worst, _ = learn(config, scored, micro_batch_tokens=1024)
    assert kept.keys() == others.keys() == chosen_ids(config.run.seed, 0, NUM_ROWS, 3)
    for row, other in [*((kept[one], others[one]) for one in kept), (worst[0], other_worst[0])]:
        assert row.keys() == other.keys()
        for name in ("student_logprobs", "student_entropy", "loss", "loss_weight", "student_top_logprobs"):
            values, of_other = (np.array(table[name]) for table in (row, other))
            np.testing.assert_allclose(values, of_other, atol=1e-4, rtol=1e-5)
    assert metrics["kept_rows_seconds"] > 0


def test_a_kept_row_says_what_the_student_itself_says(make_config, scored):
    config = config_of(make_config, f"logging.kept_rows={NUM_ROWS}")
    kept, worst, _ = learn(config, scored)
    student = load_student(config.student, config.learner).causal_lm
    expected = ragged(score_by(student, OBJECTIVES["sampled"], scored), "rollout_logprobs")
    ratios = ragged(scored, "rollout_logprobs").values - ragged(scored, "teacher_logprobs").values
    num_compared = 0
    for place, trajectory_id in enumerate(scored["trajectory_id"].to_pylist()):
        row = kept[trajectory_id]
        logprobs = np.array(row["student_logprobs"])
        np.testing.assert_allclose(logprobs, expected[place], atol=1e-5)
        tokens = ragged(scored, "rollout_logprobs")
        assert row["log_ratio"] == pytest.approx(
            ratios[tokens.offsets[place] : tokens.offsets[place + 1]].mean(), abs=1e-5
        )
        top_ids, top = (row[f"student_top_{name}"] for name in ("ids", "logprobs"))
        assert all(len(of_token) == MOST_CANDIDATES and of_token == sorted(of_token, reverse=True) for of_token in top)
        sampled = np.array(row["token_ids"])[np.array(row["loss_mask"]) != 0]
        of_candidates = np.array(row["student_candidate_logprobs"])
        candidate_ids = np.array(row["candidate_ids"])
        for ids, values in ((np.array(top_ids), np.array(top)), (candidate_ids, of_candidates)):
            position, place_of_sampled = np.nonzero(ids == sampled[:, None])
            num_compared += len(position)
            np.testing.assert_allclose(values[position, place_of_sampled], logprobs[position], atol=1e-5)
        masses = np.exp(of_candidates).sum(-1)
        np.testing.assert_allclose(row["candidate_mass"], masses, atol=1e-5)
    assert num_compared > 0
    assert worst[0]["log_ratio"] == max(row["log_ratio"] for row in kept.values())


def test_rows_of_a_privileged_sampler_are_not_kept(make_config, scored):
    config = config_of(make_config, "logging.kept_rows=3")
    names = {name: scored.schema.get_field_index(name) for name in ("sampler", "trajectory_id", "episode_id")}
    changed = scored.slice(0, NUM_ROWS)
    ids = [PRIVILEGED_IDS if row == 0 else row for row in range(scored.num_rows)]  # far from the student: see `worst`
    samplers = ["privileged:student" if row == 0 else "student" for row in range(scored.num_rows)]
    for name, values in (("sampler", samplers), ("trajectory_id", ids), ("episode_id", ids)):
        column = pa.array(values, scored.schema.field(names[name]).type)
        changed = changed.set_column(names[name], scored.schema.field(names[name]), column)
    kept, worst, _ = learn(config, changed)
    of_all, _, _ = learn(config, scored)
    assert kept.keys() == of_all.keys() - {0}
    assert worst[0]["trajectory_id"] < PRIVILEGED_IDS


def test_nothing_is_kept_where_no_rows_are_asked_for(make_config, scored):
    kept, worst, metrics = learn(config_of(make_config, "logging.kept_rows=0"), scored)
    assert (kept, worst) == ({}, [])
    assert "kept_rows_seconds" not in metrics


def test_keeping_changes_no_gradient(make_config, scored):
    without, kept = (learn(config_of(make_config, f"logging.kept_rows={count}"), scored)[2] for count in (0, 4))
    for name in ("loss", "kl", "entropy", "gradient_norm"):
        assert kept[name] == without[name]


def test_hidden_states_stay_out_and_the_teachers_own_top_tokens_are_there(make_config):
    config = make_config(f"prompts.prompts_per_step={NUM_ROWS}", "objective=exact-reverse-kl", "logging.kept_rows=2")
    heads = load_teacher_heads(config, torch.device("cpu"))
    batch = make_scored(config.objective, heads=heads)
    worst = learn(config, batch, heads=heads)[1][0]
    assert "teacher_hidden" not in worst
    place = batch["trajectory_id"].to_pylist().index(worst["trajectory_id"])
    logits = heads["only"]["teacher"].logits(torch.tensor(ragged(batch, "teacher_hidden")[place]))
    expected = logits.log_softmax(-1).topk(MOST_CANDIDATES)
    np.testing.assert_allclose(worst["teacher_top_logprobs"], expected.values, atol=1e-5)
    assert worst["teacher_top_ids"] == expected.indices.tolist()


def test_rows_of_a_step_that_were_never_taken_are_forgotten_in_the_next(make_config, scored):
    config = config_of(make_config, "logging.kept_rows=2")
    worker = LearnerActor(config, fetch=lambda batches: list(map(to_wire, batches)))
    worker.use(ReferenceEngine(load_student(config.student, config.learner), config.learner), {})
    lengths = ragged(scored, "token_ids").lengths.tolist()
    later = scored
    for name in ("trajectory_id", "episode_id"):
        place = scored.schema.get_field_index(name)
        later = later.set_column(place, scored.schema.field(place), pa.array(range(NUM_ROWS, 2 * NUM_ROWS), pa.int64()))
    for batch in (scored, later):
        share = RankShare((batch,), (0.0,) * len(lengths), plan_step(lengths, 1, 64)[0])
        worker.accumulate(share, completes_step=True)
    rows = pa.ipc.open_stream(worker.take_kept_rows().chosen).read_all()
    assert set(rows["trajectory_id"].to_pylist()) == chosen_ids(config.run.seed, 1, NUM_ROWS, 2)
