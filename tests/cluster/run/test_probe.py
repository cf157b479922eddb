"""Which prompts a privileged sampler writes for, and what the ledger proves of its rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.contracts.batches import BatchHandle, ReadyBatches
from cluster.contracts.errors import ConfigError, TrainingError
from cluster.contracts.requests import PRIVILEGED_IDS
from cluster.run.checkpoints import RunState
from cluster.run.inputs import privileged_requests, step_requests
from cluster.run.ledger import Ledger, LedgerState, audit, read_ledger
from cluster.run.probe import Probe, ProbeState
from cluster.run.summary import RunSummary
from rollout_workers.privileged import PrivilegedPlan
from rollout_workers.prompts import PromptOrder
from tests.builders import make_config

ORDER = PromptOrder(num_prompts=4, seed=3, shuffle=False)
OVERRIDES = (
    "prompts.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "rollout.privileged.template={{ prompt }} {{ hint }}",
    "rollout.privileged.prompts_per_step=2",
    "rollout.privileged.hard_after=4",
    "objective.terms={main={loss='cross_entropy',gate={},rows='privileged'}}",
)
CONFIG = make_config(*OVERRIDES)


def make_probe(state: ProbeState | None = None, prompt_ids: Sequence[int] = range(4), **fields: Any) -> Probe:
    config = make_config(*OVERRIDES, *(f"rollout.privileged.{name}={value}" for name, value in fields.items()))
    return Probe(config.rollout.privileged, PrivilegedPlan(prompt_ids=frozenset(prompt_ids)), state)


def batch_of(rewards: Sequence[tuple[int, float | None]], first_id: int = 0) -> BatchHandle:
    """Return a batch of rows, as prompt and reward."""
    ids = tuple(range(first_id, first_id + len(rewards)))
    prompts, values = zip(*rewards, strict=True)
    ones = (1,) * len(ids)
    return BatchHandle(None, "main", ids, ones, ones, prompts, values, (0,) * len(ids), (0,) * len(ids))


def observe(probe: Probe, step: int, *rewards: tuple[int, float | None]) -> dict[str, float]:
    return dict(probe.observe(step, [batch_of(rewards, 100 * step)]))


def fail(probe: Probe, step: int, prompts: Sequence[int], times: int = 4) -> None:
    observe(probe, step, *[(prompt, 0.0) for prompt in prompts for _ in range(times)])


def test_a_prompt_is_hard_when_its_last_completions_all_failed() -> None:
    probe = make_probe()
    metrics = observe(probe, 0, *[(0, 0.0)] * 3, *[(1, 0.0)] * 4, (2, 1.0), *[(2, 0.0)] * 3, *[(3, None)] * 8)
    assert metrics == {"privileged/hard_prompts": 1}
    assert probe.choose(1) == (1,)
    assert observe(probe, 1, (0, 0.0), (1, 0.0), (2, 0.0))["privileged/hard_prompts"] == 3


def test_one_right_completion_ends_it_and_counts_among_those_once_hard() -> None:
    probe = make_probe()
    fail(probe, 0, [0, 1])
    assert probe.choose(1) == (0, 1)
    metrics = observe(probe, 1, (0, 1.0), (1, 0.0), (2, 1.0))
    assert metrics == {"privileged/hard_prompts": 1, "privileged/blind_solve_rate": 0.5}
    assert probe.choose(2) == (1,)


def test_rows_of_the_sampler_itself_are_no_evidence() -> None:
    probe = make_probe()
    fail(probe, 0, [0])
    probe.observe(1, [batch_of([(0, 1.0)], PRIVILEGED_IDS)])
    assert probe.choose(2) == (0,)


def test_a_step_has_at_most_its_quota_and_those_asked_for_least_come_first() -> None:
    probe = make_probe()
    fail(probe, 0, [3, 2, 1, 0])
    assert [probe.choose(step) for step in (1, 2)] == [(0, 1), (2, 3)]
    assert probe.choose(3) == ()  # all are under way
    assert probe.choose(1) == (0, 1)
    observe(probe, 1, (0, 0.0))
    assert probe.choose(4) == (0, 1)


def test_a_prompt_waits_for_completions_that_show_what_its_rows_did() -> None:
    probe = make_probe(max_rows=2)
    fail(probe, 0, [0])
    for step, chosen in ((1, (0,)), (2, (0,)), (3, ())):
        assert probe.choose(step) == chosen
        observe(probe, step, (3, 1.0))
    assert make_probe(probe.state, max_rows=2).choose(4) == ()
    observe(probe, 4, (0, 0.0))  # it still fails
    assert probe.choose(5) == (0,)


def test_prompts_without_a_context_are_never_chosen() -> None:
    probe = make_probe(prompt_ids=[2])
    fail(probe, 0, [0, 1, 2])
    assert probe.choose(1) == (2,)


def test_a_quota_may_fade_and_its_requests_keep_ids_of_their_own() -> None:
    fading = "{from=3.0,to=1.0,over_steps=2}"
    probe = make_probe(prompts_per_step=fading)
    fail(probe, 0, [0, 1, 2, 3])
    assert [len(probe.choose(step)) for step in (1, 2)] == [2, 1]
    run = make_config(*OVERRIDES, f"rollout.privileged.prompts_per_step={fading}")
    ids = [one.trajectory_id for step in range(4) for one in privileged_requests(run, (0, 1, 2), step)]
    assert len(set(ids)) == 12
    with pytest.raises(ConfigError, match=r"prompts_per_step goes from 0 to 0; expected 0 or more"):
        make_probe(prompts_per_step="{from=0.0,to=0.0,over_steps=2}")


def test_steps_outside_its_phases_have_no_rows_of_the_sampler() -> None:
    probe = make_probe(phase_steps=1, rest_steps=2)
    fail(probe, 0, [0])
    assert [probe.choose(step) for step in (1, 2, 3)] == [(), (), (0,)]


def test_the_order_in_which_batches_come_changes_nothing() -> None:
    rewards = [(0, 0.0), (0, 1.0), (0, 0.0), (0, 0.0), (0, 0.0)]
    parts = [batch_of(rewards[:2], 0), batch_of(rewards[2:], 2)]
    states = []
    for batches in (parts, parts[::-1]):
        probe = make_probe()
        probe.observe(0, batches)
        states.append(probe.state)
    assert states[0] == states[1] == ProbeState(failures=((0, 3),))


def test_a_run_that_goes_on_from_a_checkpoint_chooses_the_same_prompts() -> None:
    probe = make_probe()
    fail(probe, 0, [0, 1, 2, 3])
    assert [probe.choose(step) for step in (1, 2)] == [(0, 1), (2, 3)]
    observe(probe, 1, (0, 0.0), (1, 1.0))
    state = RunState(2, RunSummary(), LedgerState("c", (3,)), probe=probe.state)
    restored = msgspec.convert(msgspec.json.decode(msgspec.json.encode(state)), RunState)
    again = make_probe(restored.probe)
    assert again.state == probe.state
    # Step 2 was under way, so it has the prompts that it had.
    assert [again.choose(step) for step in (2, 3)] == [probe.choose(step) for step in (2, 3)] == [(2, 3), (0,)]


def test_requests_to_the_sampler_repeat_and_share_no_id_and_no_group() -> None:
    ids = [request.trajectory_id for step in (1, 2) for request in privileged_requests(CONFIG, (3, 1), step)]
    assert len(set(ids)) == len({one // 2 for one in ids}) == 4
    assert all(one >= PRIVILEGED_IDS for one in ids)
    assert privileged_requests(CONFIG, (3, 1), 1) == privileged_requests(CONFIG, (3, 1), 1)
    seeds = [one.seed for step in (1, 2) for one in privileged_requests(CONFIG, (3, 1), step)]
    assert len(set(seeds)) == 4


def ledger_of(path: Path, privileged: Sequence[Sequence[int]]) -> Ledger:
    """Write a ledger of steps with rows of the sampler for these prompts."""
    ledger = Ledger(path, first_step=0)
    for step, prompt_ids in enumerate(privileged):
        requests = [*step_requests(CONFIG, ORDER, step), *privileged_requests(CONFIG, prompt_ids, step)]
        ledger.admit(step + 1, requests)
        handle = batch_of([(request.prompt_id, 0.0) for request in requests])
        ids = tuple(request.trajectory_id for request in requests)
        versions = (step,) * len(ids)
        handle = replace(handle, trajectory_ids=ids, min_policy_versions=versions, max_policy_versions=versions)
        batches = ledger.watch(step + 1, ReadyBatches([handle]))
        while not batches.is_exhausted:
            batches.take()
        ledger.after_step(step + 1, {}, [])
    return ledger


def test_the_ledger_names_the_samplers_prompts_and_the_audit_asks_for_the_same_rows(tmp_path: Path) -> None:
    ledger_of(tmp_path / "ledger.jsonl", [(), (), (3, 1)])  # after two steps of 2 samples, 4 may have failed
    records = read_ledger(tmp_path / "ledger.jsonl")
    assert records[2].privileged_ids == (3, 1)
    assert list(records[2].prompt_ids) == [0, 1, 2, 3]
    assert '"privileged"' not in (tmp_path / "ledger.jsonl").read_text().splitlines()[0]
    assert audit(records, CONFIG, ORDER) == 12


@pytest.mark.parametrize(
    ("privileged", "changed", "fault"),
    [
        ([(), (), (3, 1)], {"privileged": (1, 3)}, "trajectory_ids|seeds_checksum"),
        ([(), (), (3, 1)], {"privileged": msgspec.UNSET}, "trajectory_ids"),
        ([(), (3,)], {}, "privileged"),  # sampled twice so far, so 4 cannot have failed
        ([(), (), (3, 1, 2)], {}, "privileged"),  # more than the quota
    ],
)
def test_rows_of_the_sampler_that_the_run_did_not_ask_for_fail_the_audit(
    tmp_path: Path, privileged: Any, changed: dict[str, Any], fault: str
) -> None:
    ledger_of(tmp_path / "ledger.jsonl", privileged)
    *before, last = read_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(TrainingError, match=rf"ledger record {len(privileged)}: ({fault}) is not"):
        audit([*before, msgspec.structs.replace(last, **changed)], CONFIG, ORDER)
