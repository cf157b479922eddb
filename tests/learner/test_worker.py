"""One rank over the plain-torch engine: no Ray actor, no DeepSpeed."""

import msgspec
import numpy as np
import pytest
import torch

from cluster.config.terms import DivergenceTerm
from cluster.contracts.errors import PlacementError
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import generated_schema, ragged
from cluster.contracts.wire import to_wire
from learner.batching.arrivals import RankShare
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.model.student import load_student
from learner.train_step import accumulate
from learner.worker import LearnerActor, check_gpu
from tests.learner.support import OBJECTIVES, completion_tokens, score_by


@pytest.fixture
def make_worker():
    def make(config):
        engine = ReferenceEngine(load_student(config.student, config.learner), config.learner)
        worker = LearnerActor(config, fetch=lambda batches: list(map(to_wire, batches)))
        worker.use(engine, {})
        return worker

    return make


def test_student_logprobs_come_in_row_order_with_or_without_scores(make_config, make_worker, scored):
    config = make_config()
    worker = make_worker(config)
    student = load_student(config.student, config.learner).causal_lm
    expected = ragged(score_by(student, OBJECTIVES["sampled"], scored), "rollout_logprobs").values
    generated = scored.select([field.name for field in generated_schema()])
    generated = generated.replace_schema_metadata(generated_schema().metadata)
    for batch in (scored, generated):
        np.testing.assert_allclose(worker.student_logprobs([batch]), expected, atol=1e-5)


def test_student_logprobs_of_no_trajectories_are_empty(make_config, make_worker, scored):
    assert len(make_worker(make_config()).student_logprobs([scored.slice(0, 0)])) == 0


def test_a_rank_that_has_a_gpu_does_not_train_on_the_cpu_in_silence():
    with pytest.raises(PlacementError, match=r"Ray gave it GPU 3, but torch .* finds none; update the NVIDIA driver"):
        check_gpu([3], torch.device("cpu"))
    check_gpu([3], torch.device("cuda"))
    check_gpu([], torch.device("cpu"))


def test_a_step_without_any_trajectory_reports_no_loss(make_config, make_worker):
    grids = plan_step([], 1, 64)[0]
    worker = make_worker(make_config())
    assert "loss" not in report(worker.accumulate(RankShare((), (), grids), completes_step=True))
    assert report(worker.take_step(num_tokens=0, step=0))["gradient_norm"] == 0


def test_micro_batches_made_ahead_give_the_same_gradients_to_the_bit(make_config, make_worker, scored):
    config = make_config()
    grids = plan_step(ragged(scored, "token_ids").lengths.tolist(), num_ranks=1, micro_batch_tokens=50)[0]
    worker = make_worker(config)
    worker.accumulate(RankShare((scored,), (0.0,) * scored.num_rows, grids), completes_step=False)
    ahead = [parameter.grad.clone() for parameter in worker._engine.student.parameters()]
    engine = ReferenceEngine(load_student(config.student, config.learner), config.learner)
    rows = trajectories([scored], [0.0] * scored.num_rows)
    batches = [build_micro_batch(grid, rows, config.run.seed) for grid in grids]
    accumulate(engine, batches, len(batches), worker._objective, {}, completes_step=False)
    assert len(grids) > 2
    for one, other in zip(ahead, engine.student.parameters(), strict=True):
        assert torch.equal(one, other.grad)


class SecondRank(ReferenceEngine):
    """Is plain torch under the number of another rank."""

    rank = 1


def test_a_rank_restores_its_own_shard_and_its_random_state(make_config, tmp_path):
    config = make_config()
    engines = [
        kind(load_student(config.student, config.learner), config.learner) for kind in (ReferenceEngine, SecondRank)
    ]
    workers = [LearnerActor(config) for _ in engines]
    for worker, engine, value in zip(workers, engines, (6.0, 7.0), strict=True):
        worker.use(engine, {})
        torch.nn.init.constant_(engine.student.head.weight, value)
        worker.begin_shard(tmp_path)
        worker.finish_shard()
    expected = torch.rand(3)  # after the checkpoint
    for worker, engine in zip(workers, engines, strict=True):
        torch.nn.init.constant_(engine.student.head.weight, 0.0)
        worker.load_shard(tmp_path)
    assert [engine.student.head.weight.unique().tolist() for engine in engines] == [[6.0], [7.0]]
    assert torch.equal(torch.rand(3), expected)


def test_another_teachers_heads_take_the_place_of_those_before(make_config, make_worker):
    before, after = (
        make_config("objective=exact-reverse-kl", f"teachers.only.engine.dtype={dtype}")
        for dtype in ("float32", "bfloat16")
    )
    worker = make_worker(before)
    for config, dtype in ((before, torch.float32), (after, torch.bfloat16)):
        worker.read_teacher_heads(config)
        assert worker._teacher_heads["only"]["teacher"].weight.dtype == dtype


def test_measuring_uses_the_objective_asked_for(make_config, make_worker, scored):
    config = make_config("objective.support_size=8")
    worker = make_worker(config)
    lengths = ragged(scored, "token_ids").lengths.tolist()
    rows = RankShare((scored,), (0.0,) * len(lengths), plan_step(lengths, 1, 64)[0])
    losses = set()
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        terms = {"main": DivergenceTerm(divergence=divergence)}
        asked = msgspec.structs.replace(config.objective, terms=terms)
        losses.add(round(report(worker.accumulate(rows, True, asked))["loss"], 4))
        worker.discard_step(completion_tokens(scored))
    assert len(losses) == 3


def test_ratios_are_taken_at_the_temperature_at_which_the_student_wrote(make_config, make_worker, scored):
    """A head divided by the temperature says what the student says at it; a mask of 1 % keeps all, for none is old."""
    mask = "objective.terms.main.importance={kind = 'sequence_mask', low = 0.99, high = 1.01}"
    config = make_config("rollout.temperature=0.7", "objective.preset=thinking-machines", mask)
    writer = load_student(config.student, config.learner).causal_lm
    sharper = writer.get_output_embeddings().weight.data / 0.7
    writer.set_output_embeddings(torch.nn.Linear(*sharper.T.shape, bias=False))
    writer.get_output_embeddings().weight.data = sharper
    wrote = score_by(writer, OBJECTIVES["sampled"], scored)
    lengths = ragged(wrote, "token_ids").lengths.tolist()
    share = RankShare((wrote,), (0.0,) * len(lengths), plan_step(lengths, 1, 64)[0])
    figures = report(make_worker(config).accumulate(share, completes_step=True))
    assert figures["importance_mean"] == pytest.approx(1, abs=1e-5)
    assert figures["sampler_learner_gap"] < 1e-5
    assert abs(figures["loss"]) > 1e-3  # of the student to a teacher that is the sharper one


def test_tokens_that_end_a_completion_are_learned_unless_the_run_file_says_otherwise(make_config, make_worker, scored):
    """Here every token ends one; `<1>` does by the student's own files."""
    every = sorted(set(ragged(scored, "token_ids").values.tolist()))
    lengths = ragged(scored, "token_ids").lengths.tolist()
    share = RankShare((scored,), (0.0,) * len(lengths), plan_step(lengths, 1, 64)[0])
    losses = []
    for learned in ("true", "false"):
        config = make_config(
            "objective.support_size=8",
            f"rollout.stop_token_ids={every}",
            f"objective.token_weights.stop_tokens={learned}",
        )
        losses.append(report(make_worker(config).accumulate(share, completes_step=True))["loss"])
    assert losses[0] > 0.1
    assert losses[1] == 0


def test_a_rank_takes_the_weights_that_the_step_has(make_config, make_worker, scored):
    schedule = "objective.terms.main.weight={from = 1.0, to = 0.0, over_steps = 4}"
    config = make_config("objective.support_size=8", "objective.preset=tail-topk", schedule)
    worker, lengths = make_worker(config), ragged(scored, "token_ids").lengths.tolist()
    losses = []
    for step in (0, 1, 4, 0):
        share = RankShare((scored,), (0.0,) * len(lengths), plan_step(lengths, 1, 64)[0], step=step)
        losses.append(report(worker.accumulate(share, completes_step=True))["loss"])
        worker.discard_step(completion_tokens(scored))
    assert losses[0] > 0.1
    assert losses == pytest.approx([losses[0], 0.75 * losses[0], 0, losses[0]], rel=1e-5)
