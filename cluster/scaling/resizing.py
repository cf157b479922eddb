"""Changes the sizes of pools while a run goes on: `preceptor scale RUN rollout=6 teachers.math=3`.

The command leaves its wish in the run directory, which the driver looks at every second, and waits for the driver's
answer beside it. Who may write there may also stop the run; no port is opened for it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Protocol
from uuid import uuid4

import msgspec

from cluster.contracts.errors import ConfigError, PlacementError
from cluster.wishes import ANSWER_SECONDS, WishFiles, WishReader, ask_driver, read_message

LARGEST_POOL = 100_000


class Scalable(Protocol):
    """A pool whose size can change."""

    @property
    def size(self) -> int:
        """Return how many workers it has or will have."""

    def resize(self, size: int) -> None:
        """Begin to change that."""


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes that somebody asked for."""

    wish_id: str
    sizes: dict[str, int]  # by pool: "rollout" or "teachers.NAME"


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a wish."""

    wish_id: str
    sizes: dict[str, int]  # of all pools, afterwards
    refusal: str | None  # a sentence; None: it was granted


class Scaling:
    """The driver's side: grants the wishes that the cluster has room for."""

    def __init__(
        self,
        files: WishFiles,
        pools: Mapping[str, Scalable],
        missing: Callable[[Mapping[str, int]], str | None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        needed: Callable[[str], str | None] = lambda name: "it has at least one worker",
    ) -> None:
        """Take the run's pools.

        Args:
            files: in the run directory.
            pools: by the name that a wish gives them.
            missing: says what the cluster lacks for so many more or fewer workers of pools; None: nothing.
            say: tells people.
            clock: seconds.
            needed: says why a pool cannot be without workers; None: it can.
        """
        self._files, self._pools, self._missing, self._say = files, pools, missing, say
        self._needed = needed
        answered = read_message(files.answer, Answer)
        self._wishes = WishReader(clock, last_wish=answered.wish_id if answered else "")

    def restore(self) -> None:
        """Give pools that have just started the sizes that they had after the last wish of the run's earlier part."""
        answered = read_message(self._files.answer, Answer)
        if answered is None:
            return
        sizes = {
            name: size
            for name, size in answered.sizes.items()
            if name in self._pools and size != self._pools[name].size and (size or not self._needed(name))
        }
        if sizes:
            refusal = self._grant(sizes)
            self._say(f"as asked before the run was resumed: {refusal or describe(sizes)}")

    def look(self) -> None:
        """See whether somebody has asked for other sizes; most calls return at once."""
        wish = self._wishes.take(self._files.wish, Wish)
        if wish is None:
            return
        refusal = self._grant(wish.sizes)
        sizes = {name: pool.size for name, pool in self._pools.items()}
        self._wishes.answer(self._files.answer, Answer(wish.wish_id, sizes, refusal))
        self._say(refusal or f"scaled: {describe(sizes)}")

    def _grant(self, sizes: Mapping[str, int]) -> str | None:
        for name, size in sizes.items():
            if name not in self._pools:
                return f"there is no pool {name!r}; this run has {', '.join(self._pools)}"
            if not 0 <= size <= LARGEST_POOL:
                return f"{name}={size}: a pool has up to {LARGEST_POOL} workers"
            need = None if size else self._needed(name)
            if need is not None:
                return f"{name}=0: {need}"
        changes = {name: size - self._pools[name].size for name, size in sizes.items()}
        growing = {name: sizes[name] for name, change in changes.items() if change > 0}
        lack = self._missing(changes) if growing else None
        if lack is not None:
            return f"{describe(growing)}: {lack}"
        for name, size in sizes.items():
            self._pools[name].resize(size)
        return None


def ask(files: WishFiles, sizes: Mapping[str, int], timeout_seconds: float = ANSWER_SECONDS) -> Answer:
    """Ask a running driver for other sizes and wait for its answer.

    Raises:
        PlacementError: it refused; says why.
        PreceptorError: nobody answered.
    """
    answer = ask_driver(files, Wish(uuid4().hex, dict(sizes)), Answer, timeout_seconds)
    if answer.refusal is not None:
        raise PlacementError(answer.refusal)
    return answer


def parse_sizes(arguments: list[str]) -> dict[str, int]:
    """Read `rollout=6 teachers.math=3`.

    Raises:
        ConfigError: an argument is no such assignment.

    Example:
        >>> parse_sizes(["rollout=6", "teachers.math=3"])
        {'rollout': 6, 'teachers.math': 3}
    """
    sizes = {}
    for argument in arguments:
        name, _, number = argument.partition("=")
        if not (name and number.isascii() and number.isdigit() and len(number) < 7):
            raise ConfigError(f"'{argument}': expected POOL=WORKERS, such as rollout=6 or teachers.math=3")
        sizes[name] = int(number)
    if not sizes:
        raise ConfigError("nothing to scale; name at least one pool, such as rollout=6 or teachers.math=3")
    return sizes


def describe(sizes: Mapping[str, int]) -> str:
    """Say sizes as the command takes them."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())
