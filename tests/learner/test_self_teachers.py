"""The weights of self-teachers at the learner: averages in closed form, copies, and what is sent and saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.contracts.errors import CheckpointError
from cluster.models.lm_head import load_lm_head
from learner.engines.torch import ReferenceEngine
from learner.model.student import load_student
from learner.self_teachers import SelfTeachers
from tests.learner.conftest import ConfigMaker

STEPS, TAU = 50, 0.05


@pytest.fixture
def engine(make_config: ConfigMaker) -> ReferenceEngine:
    config = make_config("learner.zero_stage=0")
    return ReferenceEngine(load_student(config.student, config.learner), config.learner)


def with_refresh(make_config: ConfigMaker, refresh: str) -> Any:
    return make_config("learner.zero_stage=0", "teachers.only.from=student", f"teachers.only.refresh={refresh}")


def train(engine: ReferenceEngine, seed: int) -> None:
    """Give the student other weights, as an optimizer step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for master in engine.masters():
            master += 0.01 * torch.randn_like(master)


def copy(engine: ReferenceEngine) -> list[Tensor]:
    return [master.detach().clone() for master in engine.masters()]


@contextmanager
def served(teachers: SelfTeachers, engine: ReferenceEngine) -> Iterator[list[Tensor]]:
    """Give what the teacher's pool would be sent."""
    with teachers.weights_of("only"):
        yield copy(engine)


def test_an_average_is_the_closed_form_of_its_steps(make_config: ConfigMaker, engine: ReferenceEngine) -> None:
    teachers = SelfTeachers(engine, with_refresh(make_config, f"{{ema={TAU}}}"))
    history = [copy(engine)]
    for step in range(STEPS):
        train(engine, step)
        teachers.average()
        teachers.take("only")  # changes no average
        history.append(copy(engine))
    # (1 - tau)^n w_0 + sum of tau (1 - tau)^(n - k) w_k, in float64
    factors = [(1 - TAU) ** STEPS, *(TAU * (1 - TAU) ** (STEPS - step) for step in range(1, STEPS + 1))]
    with served(teachers, engine) as average:
        for index, values in enumerate(average):
            expected = sum(factor * weights[index].double() for factor, weights in zip(factors, history, strict=True))
            assert (values.double() - expected).abs().max() < 1e-6
            assert (values - history[-1][index]).abs().max() > 1e-2  # and not the student
    for own, last in zip(engine.masters(), history[-1], strict=True):
        assert torch.equal(own, last)  # to the bit, when the teacher's weights are out again


def test_a_teacher_that_is_refreshed_now_and_then_keeps_what_it_took(
    make_config: ConfigMaker, engine: ReferenceEngine
) -> None:
    teachers = SelfTeachers(engine, with_refresh(make_config, "{every=2}"))
    first = copy(engine)
    train(engine, 0)
    teachers.average()
    with served(teachers, engine) as weights:
        assert all(torch.equal(*pair) for pair in zip(weights, first, strict=True))
    second = copy(engine)
    teachers.take("only")
    train(engine, 1)
    with served(teachers, engine) as weights:
        assert all(torch.equal(*pair) for pair in zip(weights, second, strict=True))


def test_a_live_teacher_is_the_student_and_keeps_nothing(make_config: ConfigMaker, engine: ReferenceEngine) -> None:
    teachers = SelfTeachers(engine, with_refresh(make_config, "live"))
    teachers.take("only")
    train(engine, 0)
    with served(teachers, engine) as weights:
        assert all(torch.equal(*pair) for pair in zip(weights, copy(engine), strict=True))
    assert teachers.snapshot() == {}


def test_a_snapshot_brings_the_average_back_and_leaves_other_tensors(
    make_config: ConfigMaker, engine: ReferenceEngine
) -> None:
    config = with_refresh(make_config, "{ema=0.5}")
    teachers = SelfTeachers(engine, config)
    train(engine, 0)
    teachers.average()
    saved = teachers.snapshot()
    with served(teachers, engine) as before:
        pass
    other = SelfTeachers(engine, config)
    assert other.restore({**saved, "0.weights": torch.zeros(1)}) == {"0.weights": torch.zeros(1)}
    with served(other, engine) as again:
        assert all(torch.equal(*pair) for pair in zip(again, before, strict=True))
    del saved["teacher.only.0"]
    with pytest.raises(CheckpointError, match=r"a shard lacks the weights of teachers\.only; resume with"):
        other.restore(saved)


def test_the_lm_head_is_the_averages(make_config: ConfigMaker, engine: ReferenceEngine) -> None:
    teachers = SelfTeachers(engine, with_refresh(make_config, "{ema=0.5}"))
    before = engine.student.head.weight.detach().clone()
    train(engine, 0)
    teachers.average()
    head = load_lm_head(make_config().student.model, False, "float32")
    after = teachers.head_of("only", head).weight
    assert torch.allclose(after, (before + engine.student.head.weight) / 2, atol=1e-6)
