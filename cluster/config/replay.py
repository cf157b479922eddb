"""Describes the replay of rows that another run recorded, and checks that the rest of a run file goes with it."""

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from cluster.config.fields import Section, Text

if TYPE_CHECKING:
    from cluster.config.run_config import Config


class ReplayConfig(Section, frozen=True):
    """Takes rows that another run recorded in the place of new ones.

    `replay = "runs/x"` is short for a table with this `run`. Rows come in the order in which they were learned from, a
    prompt's samples together; after the last the first comes again.
    """

    run: Text  # directory of a run with rollout.record = true
    # What teachers say of the rows: as recorded, without any teacher; or scored again, by this run's teachers.
    signals: Literal["recorded", "recomputed"] = "recorded"
    where: Text | None = None  # only rows for which this holds, as `preceptor rows` takes it: "reward > 0"
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0  # of each step's prompts; the others' completions are sampled
    shuffle: bool = False  # another order of prompts in each pass, fixed by run.seed

    def __post_init__(self) -> None:
        if self.where is not None:
            from cluster.contracts.row_filter import parse_filter  # loads what commands without conditions do not need

            parse_filter(self.where)


def replayed_prompts(config: "Config") -> int:
    """Return of how many of a step's prompts rows are replayed."""
    replay = config.rollout.replay
    return 0 if replay is None else round(replay.share * config.prompts.prompts_per_step)


def replays_signals(config: "Config") -> bool:
    """Return whether all that teachers say of a run's rows is recorded, so that none is there."""
    replay = config.rollout.replay
    return replay is not None and replay.share == 1 and replay.signals == "recorded"


def check_replay(config: "Config") -> None:
    """Raise ValueError for what cannot learn from rows of another student, or has nothing to do."""
    replay, count = config.rollout.replay, config.prompts.prompts_per_step
    if not config.rollout.num_workers and not (replay is not None and replay.share == 1):
        raise ValueError("rollout.num_workers = 0 leaves nothing that samples; set it to 1 or more, or replay all rows")
    if replay is None:
        return
    if config.rollout.privileged is not None:
        raise ValueError(
            "rollout.privileged writes for prompts that the student fails on now, and rollout.replay repeats what it "
            "once did; remove one of the two"
        )
    config.objective.check_other_samplers()
    replayed = replayed_prompts(config)
    if not replayed or (replay.share < 1 and replayed == count):
        raise ValueError(
            f"rollout.replay.share = {replay.share} of {count} prompts is {replayed}; take another share, or more "
            "prompts.prompts_per_step"
        )
    refreshed = [name for name, teacher in config.teachers.items() if teacher.is_refreshed]
    if refreshed and replay.signals == "recorded":
        raise ValueError(
            f"teachers.{refreshed[0]}.refresh changes the teacher, and rollout.replay.signals = 'recorded' knows "
            "nothing of it; set signals = 'recomputed', or leave the teacher frozen"
        )
    if replay.share == 1 and config.balance.mode != "off":
        raise ValueError("a run that replays all rows has no rollout workers to balance; turn balance off")
