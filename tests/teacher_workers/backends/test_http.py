"""Teachers behind URLs, against a small real HTTP server that answers rightly, late, not at all or wrongly."""

import asyncio
import math
import re
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.errors import NotFiniteError, RolloutError, ScoreError, UniformError, WrongLengthError
from cluster.contracts.metrics import report
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import make_generated
from teacher_workers.actor import TeacherWorker
from teacher_workers.backends.http import HttpBackend
from tests.builders import make_trajectory
from tests.leak_check import wait_until
from tests.teacher_workers.backends.fake_server import FakeServer, each, teacher_at

SAMPLED, TOP_3 = ScoreRequest("teacher"), ScoreRequest("teacher", top_k=3)


def make_rows(count: int = 1) -> pa.RecordBatch:
    """Build rows with two sampled spans each: the tokens 3 and 4, then 9."""
    row = {
        "token_ids": np.array([1, 2, 3, 4, 5, 9], np.int32),
        "loss_mask": np.array([0, 0, 1, 1, 0, 1], np.uint8),
        "rollout_logprobs": np.full(3, -1, np.float32),
    }
    return make_generated([make_trajectory(trajectory_id=index, **row) for index in range(count)])


PAIRS = [(2, 3), (3, 4), (5, 9)]  # each sampled token behind the one before it


def score(teacher: TeacherConfig, request: ScoreRequest, rows: int = 1) -> tuple[Scores, dict[str, Any]]:
    async def run() -> tuple[Scores, dict[str, Any]]:
        backend = HttpBackend(teacher, max_model_len=64)
        try:
            scores, metrics = await backend.score(make_rows(rows), request)
        finally:
            await backend.shutdown()
        return scores, report(metrics)

    return asyncio.run(run())


@pytest.mark.parametrize("form", ["vllm", "echo"])
def test_sampled_tokens_and_the_most_likely_ones_get_the_scores_of_the_places_before_them(form: Any) -> None:
    with FakeServer(form) as server:
        scores, metrics = score(teacher_at(server), TOP_3)
    expected = np.array([server.table[pair] for pair in PAIRS])
    assert scores["logprobs"] == pytest.approx(expected, abs=1e-6)
    assert scores["logprobs"].dtype == np.float32
    for place, (previous, _) in enumerate(PAIRS):
        best = np.argsort(-server.table[previous])[:3]
        assert scores["candidate_ids"][place].tolist() == best.tolist()
        assert scores["candidate_logprobs"][place] == pytest.approx(server.table[previous][best], abs=1e-6)
    assert metrics == {"teacher/retries": 0}


def test_a_row_with_a_prompt_for_the_teacher_is_sent_with_it_and_others_stay_as_they_are() -> None:
    own = {"teacher": np.array([6, 8], np.int32)}
    rows = [make_trajectory(scorer_prompts=own), make_trajectory(scorer_prompts={"teacher": np.empty(0, np.int32)})]

    async def run(server: FakeServer) -> Scores:
        backend = HttpBackend(teacher_at(server), max_model_len=64)
        scores, _ = await backend.score(make_generated(rows), SAMPLED)
        await backend.shutdown()
        return scores

    with FakeServer() as server:
        scores = asyncio.run(run(server))
        sent = sorted(request["prompt"] for request in server.requests)
    assert sent == [[1, 2, 3, 4, 5], [6, 8, 3, 4, 5]]
    pairs = [(8, 3), (3, 4), (4, 5), (2, 3), (3, 4), (4, 5)]
    assert scores["logprobs"] == pytest.approx([server.table[pair] for pair in pairs], abs=1e-6)


def test_rows_that_are_asked_for_before_the_form_is_known_find_it_each_by_itself() -> None:
    late = [False, True]  # the second row's first answer comes after all of the first row's

    def delayed(body: bytes) -> bytes:
        time.sleep(0.5 if late and late.pop(0) else 0)
        return body

    with FakeServer("echo", body=delayed) as server:
        scores, metrics = score(teacher_at(server), TOP_3, rows=2)
    assert scores["logprobs"] == pytest.approx([server.table[pair] for pair in PAIRS] * 2, abs=1e-6)
    assert (len(server.requests), metrics["teacher/retries"]) == (4, 0)


def test_a_server_that_names_tokens_by_their_texts_scores_the_sampled_ones() -> None:
    with FakeServer("echo of texts") as server:
        scores, _ = score(teacher_at(server), SAMPLED)
        with pytest.raises(ScoreError, match=r"http://.* lists 1 tokens of position 1 by their ids, and 3 are needed"):
            score(teacher_at(server), TOP_3)
    assert scores["logprobs"] == pytest.approx([server.table[pair] for pair in PAIRS], abs=1e-6)


@pytest.mark.parametrize("request_", [SAMPLED, TOP_3])
def test_ids_that_end_completions_have_the_probability_of_all_that_the_server_lists(request_: ScoreRequest) -> None:
    with FakeServer() as server:
        table = server.table
        likely = int(np.argmax(table[2]))  # behind the first place, where 3 was sampled
        assert likely != 3
        scores, _ = score(teacher_at(server, stop_class=(3, likely)), request_)
    total = np.logaddexp(table[2][3], table[2][likely])
    assert scores["logprobs"][0] == pytest.approx(total, abs=1e-6)
    assert scores["logprobs"][2] == pytest.approx(table[5][9], abs=1e-6)
    if request_.top_k:
        merged = np.array(table[2])
        merged[[3, likely]] = total, -np.inf
        assert scores["candidate_ids"][0].tolist() == np.argsort(-merged)[:3].tolist()
        assert scores["candidate_logprobs"][0] == pytest.approx(np.sort(merged)[::-1][:3], abs=1e-6)


def test_a_server_that_lists_the_given_token_alone_scores_it_alone() -> None:
    with FakeServer("echo of texts") as server:
        scores, _ = score(teacher_at(server, stop_class=(3, 6, 7)), SAMPLED)
    assert scores["logprobs"] == pytest.approx([server.table[pair] for pair in PAIRS], abs=1e-6)


@pytest.mark.parametrize("request_", [SAMPLED, TOP_3])
def test_an_excluded_token_gives_its_probability_to_all_others(request_: ScoreRequest) -> None:
    with FakeServer() as server:
        table = server.table
        excluded = int(np.argmax(table[2]))  # the most likely behind the first place; 3 was sampled there
        assert excluded != 3
        scores, _ = score(teacher_at(server, excluded_token_ids=(excluded,)), request_)
    left = math.log(1 - math.exp(table[2, excluded]))
    assert scores["logprobs"][0] == pytest.approx(table[2, 3] - left, abs=1e-5)
    if request_.top_k:
        others = [token_id for token_id in np.argsort(-table[2]) if token_id != excluded][:3]
        assert scores["candidate_ids"][0].tolist() == others
        assert scores["candidate_logprobs"][0] == pytest.approx(table[2, others] - left, abs=1e-5)


def test_excluded_tokens_come_last_where_a_server_lists_nothing_else() -> None:
    with FakeServer() as server:
        likely = tuple(np.argsort(-server.table[2])[:7].tolist())  # all that are asked for, the four spare ones too
        scores, _ = score(teacher_at(server, excluded_token_ids=likely), TOP_3)
    assert scores["candidate_ids"][0, 0] == 3  # which was sampled, and is listed for that
    assert set(scores["candidate_ids"][0, 1:]) <= set(likely)
    assert scores["candidate_logprobs"][0, 1:].tolist() == [FLOOR, FLOOR]


def test_what_goes_out_is_token_ids_at_temperature_1() -> None:
    with FakeServer() as server:
        score(teacher_at(server), TOP_3)
    [request] = server.requests
    assert (request["prompt"], request["temperature"], request["prompt_logprobs"]) == ([1, 2, 3, 4, 5, 9], 1.0, 3)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_tried_again_and_counted(status: int) -> None:
    with FakeServer(failures=[status, status]) as server:
        scores, metrics = score(teacher_at(server, retry_seconds=20), SAMPLED)
    assert scores["logprobs"][0] == pytest.approx(server.table[2, 3], abs=1e-6)
    assert metrics["teacher/retries"] == 2


def test_a_server_that_goes_away_and_comes_back_scores_every_row() -> None:
    with FakeServer(seconds=0.2) as server:

        def go_away_and_come_back() -> None:
            wait_until(lambda: len(server.requests) >= 4, poll_seconds=0.01)
            server.__exit__()
            time.sleep(0.3)
            server.__enter__()

        thread = threading.Thread(target=go_away_and_come_back)
        thread.start()
        teacher = teacher_at(server, retry_seconds=30, engine=EngineConfig(max_concurrent_sequences=4))
        scores, metrics = score(teacher, SAMPLED, rows=12)
        thread.join()
    assert scores["logprobs"] == pytest.approx([server.table[pair] for pair in PAIRS] * 12, abs=1e-6)
    assert metrics["teacher/retries"] >= 1


def test_several_urls_divide_the_rows_and_the_living_one_takes_those_of_the_dead() -> None:
    with FakeServer(seconds=0.02) as first, FakeServer(seconds=0.02) as second:
        teacher = teacher_at(first, second, retry_seconds=5)
        score(teacher, SAMPLED, rows=20)
        assert (len(first.requests), len(second.requests)) == (10, 10)
        second.__exit__()
        scores, _ = score(teacher, SAMPLED, rows=20)
        second.__enter__()
    assert len(scores["logprobs"]) == 60


def test_requests_in_flight_are_bounded() -> None:
    with FakeServer(seconds=0.02) as server:
        score(teacher_at(server, engine=EngineConfig(max_concurrent_sequences=3)), SAMPLED, rows=12)
    assert server.most_in_flight == 3


@pytest.mark.parametrize(
    ("server", "sentence"),
    [
        (FakeServer(failures=[-401]), r"answered 401: no luck; name the environment variable that holds its key"),
        (FakeServer(failures=[-400]), r"answered 400: no luck$"),
        (FakeServer(model="small"), r"answered 404: The model big does not exist.; url ends before /completions"),
        (FakeServer(failures=[-429]), r"answered 429: no luck$"),
        (FakeServer(failures=[-500]), r"answered 500: no luck$"),
        (FakeServer(seconds=0.5), r"did not answer within 0.2 s$"),
        (FakeServer("none"), r"answers without log-probabilities of the prompt; a teacher needs vLLM's"),
    ],
    ids=lambda value: None if isinstance(value, str) else "server",
)
def test_a_slow_or_refusing_server_is_one_sentence_with_its_url(server: FakeServer, sentence: str) -> None:
    with server, pytest.raises(ScoreError, match=re.escape(server.url.removesuffix("/v1")) + ".*" + sentence):
        score(teacher_at(server, request_timeout_seconds=0.2), SAMPLED)


def test_a_server_that_is_not_there_is_one_sentence_with_its_url() -> None:
    with FakeServer() as server:
        pass
    with pytest.raises(ScoreError, match=re.escape(server.url) + "/completions cannot be reached: .+"):
        score(teacher_at(server), SAMPLED)


def test_what_a_server_gives_up_as_it_ends_is_asked_again() -> None:
    ended = [False, True]  # of the completions in their order

    def give_up(body: bytes) -> bytes:
        return b'{"choices": [{"text": ""}]}' if ended and ended.pop(0) else body

    with FakeServer(body=give_up) as server:
        teacher = teacher_at(server, retry_seconds=30, engine=EngineConfig(max_concurrent_sequences=1))
        scores, metrics = score(teacher, SAMPLED, rows=3)
    assert len(scores["logprobs"]) == 9
    assert metrics["teacher/retries"] == 1


@pytest.mark.parametrize(
    ("server", "kind", "sentence"),
    [
        (
            FakeServer(distort=lambda all_: all_[:-1]),
            WrongLengthError,
            "answered for 5 of 6 tokens; scores would belong",
        ),
        (FakeServer(body=lambda body: body[:-9]), ScoreError, "no list of log-probabilities: Input data was truncated"),
        (FakeServer(distort=each(lambda i, _: (i, math.nan))), NotFiniteError, "answered NaN as a log-probability"),
        (
            FakeServer(distort=each(lambda i, x: (i, x + 30))),
            ScoreError,
            "which is above 0; it must answer log-softmax",
        ),
        (
            FakeServer(distort=each(lambda i, x: (i + 50, x))),
            ScoreError,
            r"lists the ids \[52\] for token 2 at position 1",
        ),
        (FakeServer(body=lambda _: b"[1, 2]"), ScoreError, "answered no list of log-probabilities: Expected `object`"),
    ],
    ids=["fewer positions", "half a body", "nan", "positive", "other ids", "other JSON"],
)
def test_a_truncating_or_lying_server_is_one_sentence(
    server: FakeServer, kind: type[ScoreError], sentence: str
) -> None:
    with server, pytest.raises(kind, match=sentence) as raised:
        score(teacher_at(server), SAMPLED)
    assert type(raised.value) is kind
    assert str(raised.value).startswith(server.url)


def test_scores_that_are_all_alike_are_refused_and_those_of_a_certain_teacher_are_not() -> None:
    with (
        FakeServer(table=np.full((112, 112), -math.log(112))) as uniform,
        FakeServer(table=np.zeros((112, 112))) as certain,
    ):
        with pytest.raises(
            UniformError, match=r"^http://.*/v1: all 9 tokens were scored -4.7185, so the scores say nothing"
        ):
            score(teacher_at(uniform), SAMPLED, rows=3)
        assert score(teacher_at(certain), SAMPLED, rows=3)[0]["logprobs"].tolist() == [0.0] * 9


def test_the_sentence_names_the_teacher_too() -> None:
    async def run(server: FakeServer) -> None:
        worker = TeacherWorker("teacher-main-0", HttpBackend(teacher_at(server), max_model_len=64))
        try:
            await worker.score(make_rows(), SAMPLED)
        finally:
            await worker.backend.shutdown()

    with (
        FakeServer(failures=[-503]) as server,
        pytest.raises(ScoreError, match=r"^teacher-main-0: http://127.* answered 503: no luck$"),
    ):
        asyncio.run(run(server))


def test_minus_infinity_counts_as_the_lowest_score() -> None:
    with FakeServer(distort=each(lambda i, _: (i, -9999.0))) as server:
        assert score(teacher_at(server), SAMPLED)[0]["logprobs"].tolist() == [-87.0] * 3


def write(server: FakeServer, sampling: SamplingSettings, **fields: Any) -> Completion:
    async def run() -> Completion:
        backend = HttpBackend(teacher_at(server, **fields), max_model_len=64)
        try:
            return await backend.generate([1, 2], sampling, seed=5, priority=0)
        finally:
            await backend.shutdown()

    return asyncio.run(run())


def best_after(server: FakeServer, token_id: int, *excluded: int) -> int:
    return next(one for one in np.argsort(-server.table[token_id]).tolist() if one not in excluded)


def test_a_server_writes_in_ids_with_the_log_probability_of_each() -> None:
    with FakeServer() as server:
        first = best_after(server, 2)
        second = best_after(server, first)
        completion = write(server, SamplingSettings(2, 1.0, stop_token_ids=(111,)))
    assert completion.token_ids.tolist() == [first, second]
    assert completion.logprobs == pytest.approx([server.table[2][first], server.table[first][second]], abs=1e-6)
    assert completion.finish_reason == "length"
    [asked] = server.requests
    assert (asked["prompt"], asked["max_tokens"], asked["temperature"], asked["seed"]) == ([1, 2], 2, 1.0, 5)


def test_a_written_stop_id_is_its_class_and_what_the_student_lacks_is_never_written() -> None:
    with FakeServer() as server:
        first, other = best_after(server, 2), best_after(server, 2, best_after(server, 2))
        sampling = SamplingSettings(4, 1.0, stop_token_ids=(first,), stop_class=(7, first))
        completion = write(server, sampling)
        without = write(server, SamplingSettings(1, 1.0), excluded_token_ids=(first,))
    assert (completion.token_ids.tolist(), completion.finish_reason) == ([7], "stop")
    assert without.token_ids.tolist() == [other]


def test_a_server_that_names_no_ids_cannot_write() -> None:
    with FakeServer("echo") as server:
        assert HttpBackend.sampling_fault(teacher_at(server)) is not None
        with pytest.raises(RolloutError, match=r"answers without token ids and log-probabilities; to write, a teacher"):
            write(server, SamplingSettings(1, 1.0))
    with FakeServer() as server:
        assert HttpBackend.sampling_fault(teacher_at(server)) is None
