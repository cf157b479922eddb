"""One step's figures under the names that every sink uses; pure, from what the stages reported."""

from collections.abc import Sequence

from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.metrics import Metrics, merge, report
from cluster.contracts.weights import WeightSyncReport
from cluster.stopwatch import Stopwatch


def step_record(
    step: int, scored: Sequence[BatchHandle], learned: Metrics, synced: WeightSyncReport, watch: Stopwatch
) -> dict[str, float]:
    """Return the record of one step.

    `generate/seconds` runs to the last completion, `score/seconds` is what scoring took beyond that: the teachers work
    while the students write, so only the rest is waited for. Rates are tokens over those wall-clock seconds;
    scoring's rate is over the whole time in which it had work.
    """
    tokens = sum(sum(handle.num_tokens) for handle in scored)
    completion_tokens = sum(sum(handle.num_completion_tokens) for handle in scored)
    generate, learn = watch.seconds("generate"), watch.seconds("learn")
    return {
        "step": step,
        "tokens": tokens,
        "completion_tokens": completion_tokens,
        **report(merge(handle.metrics for handle in scored)),
        **_by_teacher(scored),
        **{f"train/{name}": value for name, value in report(learned).items()},
        "generate/seconds": generate,
        "generate/tokens_per_second": completion_tokens / generate,
        "score/seconds": watch.seconds_after("score", "generate"),
        "score/tokens_per_second": completion_tokens / watch.seconds("score"),
        "learn/seconds": learn,
        "learn/tokens_per_second": tokens / learn,
        "sync/seconds": watch.seconds("sync"),
        "sync/bytes": synced.num_bytes,
    }


def _by_teacher(scored: Sequence[BatchHandle]) -> dict[str, float]:
    """Return each teacher's own figures as teacher/NAME/..., where there are several teachers."""
    names = sorted({handle.teacher for handle in scored})
    if len(names) < 2:
        return {}
    figures: dict[str, float] = {}
    for name in names:
        own = report(merge(handle.metrics for handle in scored if handle.teacher == name))
        figures |= {
            f"teacher/{name}/{key.removeprefix('teacher/')}": value
            for key, value in own.items()
            if key.startswith("teacher/")
        }
    return figures
