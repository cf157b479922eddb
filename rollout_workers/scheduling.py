"""Predicts completion lengths and deals requests to workers by them; pure.

A step lasts as long as its longest completion, so long ones start first, and each worker gets as many tokens.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapreplace

from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest

# How many completions an average reaches back, when it has seen more: a prompt's own are few and age with the student;
# those of a whole domain end in the order of their length, so fewer would be the tail of the last step alone.
PROMPT_MEMORY = 8
DOMAIN_MEMORY = 1024


@dataclass(slots=True)
class Average:
    """Averages the first values evenly, later ones exponentially."""

    num_values: int = 0
    value: float = 0.0

    def add(self, value: float, memory: int) -> None:
        """Take one more value; `memory` is the number of values after which old ones begin to fade."""
        self.num_values += 1
        self.value += (value - self.value) / min(self.num_values, memory)


@dataclass
class ExpectedLengths:
    """Predicts the lengths of completions from those of finished batches."""

    domain_of: Callable[[int], str]  # by prompt id
    _by_prompt: defaultdict[int, Average] = field(default_factory=lambda: defaultdict(Average))
    _by_domain: defaultdict[str, Average] = field(default_factory=lambda: defaultdict(Average))
    _overall: Average = field(default_factory=Average)

    def observe(self, handle: BatchHandle) -> None:
        of_episodes: Counter[tuple[int, int]] = Counter()
        for episode_id, prompt_id, num_tokens in zip(
            handle.episodes, handle.prompt_ids, handle.num_completion_tokens, strict=True
        ):
            of_episodes[episode_id, prompt_id] += num_tokens
        for (_, prompt_id), num_tokens in of_episodes.items():
            if not num_tokens:  # of a masked row, which says nothing of its length
                continue
            self._by_prompt[prompt_id].add(num_tokens, PROMPT_MEMORY)
            self._by_domain[self.domain_of(prompt_id)].add(num_tokens, DOMAIN_MEMORY)
            self._overall.add(num_tokens, DOMAIN_MEMORY)

    def expect(self, prompt_id: int) -> float:
        """Return the tokens of one completion: the mean of the prompt's, else of its domain's, else of all; else 1."""
        known = (self._by_prompt.get(prompt_id), self._by_domain.get(self.domain_of(prompt_id)), self._overall)
        return next((average.value for average in known if average and average.num_values), 1.0)


def spread(
    requests: Iterable[RolloutRequest], num_workers: int, expect: Callable[[int], float]
) -> list[list[RolloutRequest]]:
    """Deal a step's requests to workers, the longest first, so that each has about as many tokens to sample.

    `expect` gives the tokens of one completion, by prompt id. A prompt's samples stay together, to share its prefix.
    Among equals the given order is kept.

    Example:
        >>> requests = [RolloutRequest(trajectory, trajectory, 0, seed=0) for trajectory in range(4)]
        >>> shares = spread(requests, 2, {0: 10, 1: 20, 2: 50, 3: 10}.__getitem__)
        >>> [[request.prompt_id for request in share] for share in shares]
        [[2], [1, 0, 3]]
    """
    by_prompt: dict[int, list[RolloutRequest]] = defaultdict(list)
    for request in requests:
        by_prompt[request.prompt_id].append(request)
    expected = {prompt_id: expect(prompt_id) for prompt_id in by_prompt}
    shares: list[list[RolloutRequest]] = [[] for _ in range(num_workers)]
    loads = [(0.0, worker) for worker in range(num_workers)]  # a heap: the least is the first
    for prompt_id in sorted(by_prompt, key=expected.__getitem__, reverse=True):  # stable, reversed or not
        load, worker = loads[0]
        shares[worker].extend(by_prompt[prompt_id])
        heapreplace(loads, (load + expected[prompt_id] * len(by_prompt[prompt_id]), worker))
    return shares
