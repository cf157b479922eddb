"""Keeps which prompts the student never solves, and chooses those that a privileged sampler writes for."""

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import nsmallest

import msgspec

from cluster.config.context import PrivilegedConfig
from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record
from cluster.contracts.requests import PRIVILEGED_IDS, RolloutRequest
from cluster.run.inputs import privileged_requests
from rollout_workers.privileged import PrivilegedPlan


class ProbeState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says which prompts the student fails on, for a privileged sampler; part of every checkpoint."""

    failures: tuple[tuple[int, int], ...] = ()  # prompt id, completions that failed since the last right one
    asked: tuple[tuple[int, int], ...] = ()  # prompt id, requests to the sampler so far
    unseen: tuple[tuple[int, int], ...] = ()  # prompt id, those of them since its last ordinary completion
    planned: tuple[tuple[int, tuple[int, ...]], ...] = ()  # step under way, from 0, and the prompts chosen for it


class Probe:
    """Counts, for every prompt, how many of the student's completions failed since the last one that was right.

    Rewards of ordinary rows are all that it reads, so no completion is sampled to measure. It changes between steps
    alone, and is part of every checkpoint: a resumed run chooses the same prompts.
    """

    def __init__(
        self,
        config: PrivilegedConfig | None = None,
        plan: PrivilegedPlan | None = None,
        state: ProbeState | None = None,
    ) -> None:
        """Go on from a checkpoint's state; without a `config`, no prompt is ever chosen."""
        state = state or ProbeState()
        self._config, self._plan = config, plan or PrivilegedPlan()
        self._failures = Counter(dict(state.failures))
        self._asked = Counter(dict(state.asked))
        self._unseen = Counter(dict(state.unseen))
        self._planned = dict(state.planned)

    @property
    def state(self) -> ProbeState:
        failures, asked, unseen = (tuple(sorted(one.items())) for one in (self._failures, self._asked, self._unseen))
        return ProbeState(failures, asked, unseen, tuple(self._planned.items()))

    def requests(self, run: Config, step: int) -> list[RolloutRequest]:
        """Return the requests to the sampler in optimizer step `step`, from 0."""
        return privileged_requests(run, self.choose(step), step)

    def choose(self, step: int) -> tuple[int, ...]:
        """Return the prompts that the sampler writes for in optimizer step `step`, from 0, the same at every call.

        These are hard ones that no step under way has and that do not wait for ordinary completions, the least often
        asked for first.
        """
        config = self._config
        quota = 0 if config is None else config.quota(step)
        if config is None or not quota:
            return ()
        if step not in self._planned:
            under_way = {prompt_id for chosen in self._planned.values() for prompt_id in chosen}
            free = (
                prompt_id
                for prompt_id in self._hard(config)
                if prompt_id not in under_way and self._unseen[prompt_id] < config.max_rows
            )
            chosen = tuple(nsmallest(quota, free, key=lambda one: (self._asked[one], one)))
            self._planned[step] = chosen
            self._asked.update(chosen)
            self._unseen.update(chosen)
        return self._planned[step]

    def observe(self, step: int, batches: Sequence[BatchHandle]) -> Record:
        """Count the rewards of step `step`, from 0, and return what they say of hard prompts."""
        config = self._config
        if config is None:
            return {}
        self._planned.pop(step, None)
        rewards = {
            episode: (prompt_id, reward)
            for batch in batches
            for episode, prompt_id, reward in zip(batch.episodes, batch.prompt_ids, batch.rewards, strict=True)
            if episode < PRIVILEGED_IDS and reward is not None
        }
        once_hard = []
        for _, (prompt_id, reward) in sorted(rewards.items()):
            is_right = reward >= config.min_reward
            del self._unseen[prompt_id]
            self._failures[prompt_id] += 1
            if is_right:
                del self._failures[prompt_id]
            if prompt_id in self._asked:
                once_hard.append(is_right)
        metrics = {"privileged/hard_prompts": float(sum(1 for _ in self._hard(config)))}
        if once_hard:
            metrics["privileged/blind_solve_rate"] = sum(once_hard) / len(once_hard)
        return metrics

    def _hard(self, config: PrivilegedConfig) -> Iterator[int]:
        return (
            prompt_id
            for prompt_id, failures in self._failures.items()
            if failures >= config.hard_after and prompt_id in self._plan.prompt_ids
        )
