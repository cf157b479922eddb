import pytest

from benchmarks.cases.stages import ACTORS, DRIVER_AND_RAY, Alone, Spent, Together, stage_rows

RECORD = {
    "tokens": 400,
    "completion_tokens": 100,
    "generate/tokens_per_second": 50.0,
    "score/tokens_per_second": 25.0,
    "learn/tokens_per_second": 800.0,
    "sync/seconds": 0.1,
}


def spent(seconds: float, overhead: float = 0.0, **pools: float) -> Spent:
    return Spent(seconds, {**dict.fromkeys(ACTORS, 0.0), **pools, DRIVER_AND_RAY: overhead})


def rows() -> dict[str, float]:
    alone = Alone(
        completion_tokens=100,
        stages={
            "generate": spent(2.0, overhead=0.5, generate=1.9),
            "score": spent(1.0, overhead=0.5, score=0.9),
            "learn": spent(1.0, overhead=0.5, learn=1.0),
            "sync": spent(0.5, learn=0.1, generate=0.1),
        },
        generated_bytes=1_000,
        scored_bytes=3_000,
    )
    together = Together(200, spent(5.0, overhead=1.0, generate=4.0, score=2.0, learn=2.0), RECORD)
    return {found["name"]: found["value"] for found in stage_rows([alone], [together], cores=2, size="tiny")}


def test_the_loop_is_held_against_the_pools_own_work_per_token() -> None:
    # Alone 4.0 CPU-s per 100 tokens, without the driver's; together 2 cores x 5 s per 200 tokens.
    assert rows()["loop: CPU-s of stages alone / cores x s together"] == pytest.approx(0.8)
    assert rows()["loop: one stage after the other / together"] == pytest.approx(4.5 / 2.5)


def test_the_cores_time_is_split_between_pools_overhead_and_idling() -> None:
    found = rows()
    shares = [found[f"together: cores busy, {pool}"] for pool in (*ACTORS, DRIVER_AND_RAY)]
    assert shares == pytest.approx([0.4, 0.2, 0.2, 0.1])
    assert found["together: cores, not in use by the run"] == pytest.approx(0.1)


def test_every_rate_counts_completion_tokens() -> None:
    found = rows()
    assert found["alone: generate"] == 50
    assert found["alone: learn"] == 100
    assert found["together: learn"] == 200  # 800 with the prompts, which are three quarters of the tokens
    assert found["bytes per completion token, scored"] == 30


def test_weight_sync_costs_what_sender_and_receivers_compute() -> None:
    assert rows()["alone: sync, CPU per 1,000 tokens"] == pytest.approx(2.0)
