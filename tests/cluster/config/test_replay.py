"""What a run file may say of a replay, and what does not go with it."""

import pytest

from cluster.config.replay import replayed_prompts, replays_signals
from cluster.contracts.errors import ConfigError
from tests.builders import make_config

REPLAY = "rollout.replay=runs/x"
PRIVILEGED = (
    "rollout.privileged.template={{ prompt }} {{ hint }}",
    "objective.terms.hinted.loss=cross_entropy",
    "objective.terms.hinted.rows=privileged",
)
REWARD = ("objective.terms.main.loss=task_reward", "objective.support=sampled")
SELF = ("teachers.main.from=student", "teachers.main.model=student", "teachers.main.refresh=live")


def test_a_directory_alone_is_short_for_a_table() -> None:
    assert make_config(REPLAY).rollout.replay == make_config("rollout.replay.run=runs/x").rollout.replay
    config = make_config(REPLAY, "rollout.replay.where=reward > 0")
    assert config.rollout.replay is not None
    assert (config.rollout.replay.run, config.rollout.replay.where) == ("runs/x", "reward > 0")


def test_a_horizon_begins_below_the_longest_completion() -> None:
    assert make_config("rollout.horizon.start=64").rollout.horizon is not None
    with pytest.raises(ConfigError, match="start = 600 is more than max_completion_tokens = 512"):
        make_config("rollout.horizon.start=600")


def test_the_share_is_of_a_step_s_prompts() -> None:
    shares = {share: make_config(REPLAY, f"rollout.replay.share={share}") for share in (1.0, 0.25)}
    assert {share: replayed_prompts(config) for share, config in shares.items()} == {1.0: 64, 0.25: 16}
    assert [replays_signals(config) for config in shares.values()] == [True, False]
    assert replayed_prompts(make_config()) == 0
    assert not replays_signals(make_config(REPLAY, "rollout.replay.signals=recomputed"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.num_workers=0"], "rollout.num_workers = 0 leaves nothing that samples"),
        ([REPLAY, "rollout.replay.share=0.5", "rollout.num_workers=0"], "leaves nothing that samples"),
        ([REPLAY, "objective=thinking-machines-frozen"], "a policy_gradient learns from rows of another sampler by"),
        ([REPLAY, *REWARD, "objective.terms.main.importance.kind=none"], "a task_reward learns from rows of another"),
        ([REPLAY, "rollout.replay.share=0.001"], "share = 0.001 of 64 prompts is 0"),
        ([REPLAY, "rollout.replay.share=0.999"], "share = 0.999 of 64 prompts is 64"),
        ([REPLAY, "rollout.replay.where=reward >"], "condition 'reward >': invalid syntax"),
        ([REPLAY, *PRIVILEGED], "rollout.replay repeats what it once did; remove one"),
        ([REPLAY, "balance=auto"], "a run that replays all rows has no rollout workers to balance"),
        ([REPLAY, *SELF], "teachers.main.refresh changes the teacher, and .* set signals = 'recomputed'"),
    ],
)
def test_what_a_replay_cannot_have_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_config(*overrides)
