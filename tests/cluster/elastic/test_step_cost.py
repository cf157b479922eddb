"""What a step's batches say of its work, against engines of given rates."""

import pytest

from cluster.contracts.batches import BatchHandle, Span
from cluster.elastic.step_cost import StepWork, WorkMeter
from tests.cluster.run.simulated_run import Load, Simulation

RECORD = {"step/seconds": 10.0, "learn/seconds": 2.0, "sync/seconds": 0.5}


def make_batch(lengths: tuple[int, ...], written: float, scored: tuple[float, float], replica: int = 0) -> BatchHandle:
    """Return a batch that was asked for at second 100 and written, sent to a teacher and scored as given."""
    spans = (
        Span("rollout", "rollout-0", "generate", 100.0, 100 + written),
        Span("teacher-main", f"teacher-main-{replica}", "score", 100 + scored[0], 100 + scored[1]),
    )
    return BatchHandle(None, "main", tuple(range(len(lengths))), lengths, lengths, spans=spans)


def measure(load: Load, workers: int, steps: int = 1, max_concurrent: float = 256) -> StepWork:
    """Return the work of the last of some steps of a simulated run."""
    run, meter = Simulation(lambda _: load), WorkMeter(max_concurrent, steps_ahead=0)
    sizes = {"rollout": workers, "teachers.0": 1}
    for step in range(steps):
        record, batches = run.step(step, sizes)
        work = meter.measure(record, batches, workers)
    assert work is not None
    return work


def test_a_teachers_seconds_are_counted_once_however_many_batches_wait_at_a_replica() -> None:
    batches = [
        make_batch((10,), 2.0, (2.0, 5.0)),
        make_batch((10,), 3.0, (3.0, 6.0)),
        make_batch((10,), 4.0, (4.0, 7.0), 1),
    ]
    work = WorkMeter(8, 0).measure(RECORD, batches, 1)
    assert work is not None
    assert work.teachers["teachers.main"].busy_seconds == pytest.approx(4.0 + 3.0)  # 2 to 6, and 4 to 7
    assert work.teachers["teachers.main"].queued == pytest.approx(0.9)  # 3 x 3 s in a step of 10 s
    assert work.first_share == pytest.approx(0.5)  # the first goes off at 2 s, the last is written at 4 s


def test_a_step_without_calls_says_nothing() -> None:
    assert WorkMeter(8, 0).measure(RECORD, [BatchHandle(None, "main", (0,), (1,), (1,))], 1) is None


def test_full_workers_share_what_waits_for_a_place() -> None:
    # 40 completions of 100 tokens, 1 s each, in 2 x 5 places: four waves, 20 s of work of each worker.
    load = Load(rows=40, sigma=0.0, slots=5)
    work = measure(load, workers=2)
    assert work.generation.longest_seconds == pytest.approx(1.0)
    assert work.generation.full_seconds == pytest.approx(8.0, rel=0.05)
    assert work.generation.seconds(4) == pytest.approx(2.0, rel=0.1)


def test_more_workers_do_not_shorten_a_straggler() -> None:
    load = Load(rows=32, sigma=1.5, longest=2000, slots=32)
    work = measure(load, workers=2, steps=3)
    assert work.generation.seconds(8) == pytest.approx(work.generation.seconds(2), rel=0.02)


def test_the_places_of_an_engine_are_known_once_somebody_had_to_wait() -> None:
    load, meter = Load(rows=64, sigma=0.4, slots=8), WorkMeter(256, 0)
    run = Simulation(lambda _: load)
    for step, workers in enumerate((2, 8)):  # 32 rows for 8 places, then 8
        record, batches = run.step(step, {"rollout": workers, "teachers.0": 1})
        work = meter.measure(record, batches, workers)
    assert meter.max_concurrent == pytest.approx(8, rel=0.15)
    assert work is not None
    # Half the workers write in two waves, which nobody who saw only one could tell.
    assert work.generation.seconds(4) > 1.2 * work.generation.seconds(8)
    unknowing = WorkMeter(256, 0).measure(record, batches, 8)
    assert unknowing is not None
    assert unknowing.generation.seconds(4) < 1.1 * unknowing.generation.seconds(8)
