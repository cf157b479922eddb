"""Many requests that finish, and few calls to the worker."""

import asyncio
from collections.abc import Mapping

import pytest

from rollout_workers.candidates.vllm_processor import CandidateFetcher, Encoded


class Worker:
    """Answers when it may with each key's own name, and remembers what it was asked; knows no key "lost"."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []
        self.is_asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def take(self, wanted: Mapping[str, int], given_up: list[str]) -> dict[str, Encoded]:
        self.calls.append((sorted(wanted), given_up))
        self.is_asked.set()
        await self.may_answer.wait()
        return {key: (key.encode(), bytes(num_tokens)) for key, num_tokens in wanted.items() if key != "lost"}


def test_requests_that_finish_during_a_call_share_the_next() -> None:
    async def scenario() -> list[tuple[list[str], list[str]]]:
        worker = Worker()
        fetcher = CandidateFetcher(worker.take)
        first = asyncio.create_task(fetcher.fetch("a", 1))
        await worker.is_asked.wait()
        rest = [asyncio.create_task(fetcher.fetch(key, size)) for key, size in (("b", 2), ("c", 3))]
        await asyncio.sleep(0)  # both run until they wait
        worker.may_answer.set()
        found = await asyncio.gather(first, *rest)
        assert found == [(b"a", bytes(1)), (b"b", bytes(2)), (b"c", bytes(3))]
        return worker.calls

    assert asyncio.run(scenario()) == [(["a"], []), (["b", "c"], [])]


def test_a_cancelled_caller_takes_nothing_from_the_others() -> None:
    async def scenario() -> Encoded:
        worker = Worker()
        fetcher = CandidateFetcher(worker.take)
        cancelled, kept = (asyncio.create_task(fetcher.fetch(key, 1)) for key in ("a", "b"))
        await worker.is_asked.wait()
        cancelled.cancel()
        await asyncio.sleep(0)
        worker.may_answer.set()
        return await kept

    assert asyncio.run(scenario()) == (b"b", bytes(1))


def test_a_request_that_was_given_up_is_named_once_with_the_next_call() -> None:
    async def scenario() -> list[list[str]]:
        worker = Worker()
        worker.may_answer.set()
        fetcher = CandidateFetcher(worker.take)
        fetcher.give_up("x")
        await fetcher.fetch("a", 1)
        await fetcher.fetch("b", 1)
        return [given_up for _, given_up in worker.calls]

    assert asyncio.run(scenario()) == [["x"], []]


def test_a_request_that_the_worker_does_not_know_has_no_draws() -> None:
    async def scenario() -> Encoded:
        worker = Worker()
        worker.may_answer.set()
        return await CandidateFetcher(worker.take).fetch("lost", 1)

    assert asyncio.run(scenario()) == (b"", b"")


def test_a_failed_call_fails_all_that_waited_for_it() -> None:
    async def fail(wanted: Mapping[str, int], given_up: list[str]) -> dict[str, Encoded]:
        raise ConnectionError("the engine is gone")

    async def scenario() -> list[Encoded | BaseException]:
        fetcher = CandidateFetcher(fail)
        return await asyncio.gather(fetcher.fetch("a", 1), fetcher.fetch("b", 1), return_exceptions=True)

    results = asyncio.run(scenario())
    with pytest.raises(ConnectionError):
        raise results[0]  # type: ignore[misc]
    assert [type(result) for result in results] == [ConnectionError, ConnectionError]
