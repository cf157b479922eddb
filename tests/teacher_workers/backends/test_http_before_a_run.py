"""What the driver asks servers of teachers before a run, and what it refuses."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.config.presets import PRESETS
from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.contracts.requests import ScoreRequest
from cluster.demo import EMBEDDED
from cluster.models.model_checks import ModelFacts, read_model
from teacher_workers.backends.base import check_signals, check_teacher, find_backend
from teacher_workers.backends.http import HttpBackend
from tests.builders import make_config
from tests.teacher_workers.backends.fake_server import FakeServer, Positions, each, make_table, teacher_at


@pytest.fixture(scope="module")
def student() -> ModelFacts:
    return read_model(StudentConfig(str(EMBEDDED / "student")), is_student=True)


def refusal(student: ModelFacts, servers: Sequence[FakeServer], **fields: Any) -> str:
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        with pytest.raises(ModelError) as raised:
            check_teacher("main", teacher_at(*servers, **fields), student)
    return str(raised.value)


def random_scores(positions: Positions) -> Positions:
    return each(lambda token_id, _: (token_id, -float(np.random.default_rng().uniform(1, 9))))(positions)


def test_the_probe_refuses_what_is_no_teacher_of_this_student(student: ModelFacts) -> None:
    def other_text(token_id: int) -> str:
        return "!" if token_id == 40 else student.tokenizer.decode([token_id])

    fine = FakeServer()
    ours = student.tokenizer.decode([40])
    for servers, sentence in (
        ([FakeServer(model="small")], "http://.*/v1 serves small, and not 'big'; set teachers.NAME.model to a name"),
        ([FakeServer(distort=random_scores)], r"scored the same tokens twice, .* nats apart; a teacher must repeat"),
        ([FakeServer(table=np.full((112, 112), -4.0))], "http://.*: all 31 tokens were scored -4.0000, so the scores"),
        ([fine, FakeServer(table=make_table(1))], "and http://.* score the same tokens .* nats apart; serve one model"),
        ([FakeServer(text=other_text, table=table_towards(40))], f"reads token 40 as '!' and the student as '{ours}'"),
    ):
        message = refusal(student, servers)
        assert message.startswith("teachers.main: http://127.0.0.1:")
        assert re.search(sentence, message), message
        assert "\n" not in message


def table_towards(token_id: int) -> Any:
    """Return a table whose most likely token is always this one."""
    table = make_table()
    table[:, token_id] = -0.01
    return table


def test_the_probe_returns_the_servers_context_and_says_whose_tokenizer_is_taken(
    student: ModelFacts, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer(max_model_len=96, text=lambda token_id: student.tokenizer.decode([token_id])) as server:
        facts = HttpBackend.check(teacher_at(server), student)
        assert (facts.context_tokens, facts.tokenizer, facts.vocabulary) == (96, student.tokenizer, student.vocabulary)
        assert f"big at {server.url} is taken to have the student's tokenizer" in caplog.text
        caplog.clear()
        facts = HttpBackend.check(teacher_at(server, tokenizer=str(EMBEDDED / "teacher")), student)
        assert facts.tokenizer is not student.tokenizer
        assert not caplog.text
        server.max_model_len = None  # not every server says it
        assert HttpBackend.check(teacher_at(server), student).context_tokens == student.context_tokens


def test_a_server_with_another_limit_of_logprobs_says_how_many_it_gives() -> None:
    with FakeServer(max_logprobs=20) as server, FakeServer("echo of texts") as texts:
        teacher = teacher_at(server)
        assert HttpBackend.fault(teacher, ScoreRequest("teacher", top_k=20)) is None
        fault = HttpBackend.fault(teacher, ScoreRequest("teacher", top_k=64)) or ""
        assert fault.startswith(
            f"{server.url} lists up to 20 tokens per position by their ids, and the objective compares 64"
        )
        fault = HttpBackend.fault(teacher_at(texts), ScoreRequest("teacher", top_k=16)) or ""
        assert "lists up to 1 tokens per position" in fault


def works(preset: str, url: str) -> bool:
    before = ("teachers.before.model=before", "teachers.main.base=before")
    config = make_config(f"objective={preset}", f"teachers.main={{model='big',url='{url}'}}", *before)
    try:
        check_signals(config)
    except ConfigError:
        return False
    return True


def test_objectives_that_need_more_than_a_server_says_are_refused_before_anything_starts() -> None:
    with FakeServer(max_logprobs=20) as server:
        refused = {preset for preset in PRESETS if not works(preset, server.url)}
    whole_vocabulary = {"gkd", "exact-reverse-kl", "exact-forward-kl", "distillm", "beta-opsd"}
    chosen_by_the_student = {
        "sdpo",
        "sdpo-feedback",
        "rethinking",
        "async-opd",
        "vopd",
        "direct-opd",
        "cross-tokenizer",
    }
    more_than_20, entropy, states = {"generalized-topk", "tropd", "semi-opd"}, {"eopd"}, {"oprd", "last-opd"}
    assert refused == whole_vocabulary | chosen_by_the_student | more_than_20 | entropy | states


def test_the_refusal_says_which_objectives_work() -> None:
    config = make_config("objective=gkd", "teachers.main={model='big',url='http://host:8000/v1'}")
    with pytest.raises(
        ConfigError,
        match=r"^teachers.main: its backend 'http' does not send hidden, .*; objective.support 'sampled', 'topk' and",
    ):
        check_signals(config)


def test_the_identity_follows_the_served_model_and_not_the_address() -> None:
    with FakeServer() as first, FakeServer() as second, FakeServer(model="small") as other:
        same = {HttpBackend.identity(teacher_at(server)) for server in (first, second)}
        assert len(same) == 1
        assert HttpBackend.identity(msgspec.structs.replace(teacher_at(other), model="small")) not in same


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(key="s3cret") as server:
        teacher = teacher_at(server, api_key_env="TEACHER_KEY")
        with pytest.raises(ModelError, match=r"the environment variable TEACHER_KEY \(api_key_env\) is not set here"):
            HttpBackend.identity(teacher)
        monkeypatch.setenv("TEACHER_KEY", "s3cret")
        assert HttpBackend.identity(teacher)
        monkeypatch.setenv("TEACHER_KEY", "wrong-one")
        with pytest.raises(ModelError, match=r"it refuses the key in the environment variable TEACHER_KEY$") as raised:
            HttpBackend.identity(teacher)
    assert "wrong key in Bearer ***" in str(raised.value)
    assert "wrong-one" not in str(raised.value)


def test_a_class_that_is_no_backend_is_one_sentence() -> None:
    teacher = TeacherConfig("m", backend="rollout_workers.prompts:PromptSet")
    with pytest.raises(
        ConfigError, match=r"'rollout_workers.prompts:PromptSet' is no teacher backend; .* TeacherBackend"
    ):
        find_backend(teacher)
