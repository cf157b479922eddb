"""A teacher whose engine samples: what it is asked for, and what it refuses before a run."""

import numpy as np
import pytest

from cluster.contracts.errors import ConfigError
from teacher_workers.backends.base import check_signals
from teacher_workers.backends.listed_logprobs import columns
from tests.builders import make_config

WRITES = (
    "rollout.privileged={template='{{ prompt }} {{ hint }}',sampler='main'}",
    "objective.terms.imitated={loss='cross_entropy',gate={},rows='privileged'}",
    "objective.terms.main={loss='divergence',rows='student'}",
)


def test_what_writes_has_an_engine_that_samples() -> None:
    check_signals(make_config(*WRITES, "teachers.main.backend=vllm-generate"))
    message = r"teachers.main: it is to write .* its backend 'vllm' scores and writes nothing; set backend = 'vllm-gene"
    with pytest.raises(ConfigError, match=message):
        check_signals(make_config(*WRITES))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("objective.support=full", r"teachers.main: its backend 'vllm-generate' does not send hidden, .* 'topk' work"),
        ("objective.support=student_topk", r"teachers.main: an engine that writes scores no tokens that another model"),
    ],
)
def test_scores_that_such_an_engine_has_not_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_signals(make_config(*WRITES, "teachers.main.backend=vllm-generate", overrides))


def test_excluded_tokens_leave_their_probability_to_the_others() -> None:
    listed = np.array([[5, 9, 5, 4]], np.int32), np.log(np.array([[0.3, 0.4, 0.3, 0.2]], np.float32))
    own, ids, logprobs = columns(listed, (), 2, excluded=(8, 9))
    assert np.exp(own) == pytest.approx(0.5)
    assert (ids.tolist(), np.exp(logprobs[0]).round(6).tolist()) == ([[5, 4]], [0.5, pytest.approx(1 / 3, abs=1e-5)])
