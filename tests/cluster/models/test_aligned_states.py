"""A run whose models have no states that can be compared is refused in a sentence; others say what is sent."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.run_config import Config
from cluster.config.stages import StatesConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models.aligned_states import states_to_send
from cluster.models.hidden_layers import ProjectionBank, load_bank, paired_layers
from cluster.models.model_checks import ModelFacts
from tests.builders import make_config


def facts(width: int, depth: int) -> ModelFacts:
    tokenizer: Any = None
    return ModelFacts(tokenizer, 64, 16, width=width, depth=depth)


def run_with(layers: object, *overrides: str) -> Config:
    return make_config(f"objective.terms.s={{loss='representation',layers={layers!r}}}", *overrides)


def write_bank(path: Path, student: tuple[int, int], teacher: tuple[int, int]) -> str:
    sides = {"student": student, "teacher": teacher}
    projections = {side: torch.ones(2, 3, width) for side, (width, _) in sides.items()}
    means = {side: torch.zeros(2, width) for side, (width, _) in sides.items()}
    depths = {side: depth for side, (_, depth) in sides.items()}
    layers = {side: (1, depth) for side, (_, depth) in sides.items()}
    ProjectionBank(layers, depths, projections, means).save(path)  # type: ignore[arg-type]
    return str(path)


def test_of_other_depth_layers_at_the_same_relative_depth_are_paired() -> None:
    assert paired_layers(range(1, 5), depth=4, other_depth=4) == (1, 2, 3, 4)
    assert paired_layers(range(1, 5), depth=4, other_depth=10) == (1, 4, 7, 10)
    assert paired_layers((1, 5, 9), depth=9, other_depth=5) == (1, 3, 5)
    assert paired_layers((1,), depth=1, other_depth=5) == (5,)


def test_the_last_layer_alone_needs_no_layers_to_be_sent() -> None:
    assert states_to_send(run_with("last"), facts(8, 2), {"main": facts(8, 4)}) == {}


def test_teachers_learn_which_layers_the_student_has() -> None:
    sent = states_to_send(run_with("all"), facts(8, 2), {"main": facts(8, 4)})
    assert sent == {"main": StatesConfig((1, 2), 2)}


def test_teachers_that_no_term_compares_send_nothing() -> None:
    config = make_config(
        "objective.terms.s={loss='representation',layers='all',target={teacher=1.25,base=-0.25}}",
        "objective.terms.anchor={loss='policy_gradient',target={initial_student=1.0}}",
        "teachers.before.model=before",
        "teachers.main.base=before",
    )
    same = {name: facts(8, 4) for name in ("main", "before", "initial_student")}
    assert sorted(states_to_send(config, facts(8, 2), same)) == ["before", "main"]
    requests = {request.model: request for _, request in config.scorers("main")}
    assert {model: request.layers for model, request in requests.items()} == {
        "teacher": True,
        "base": True,
        "initial_student": False,
    }


@pytest.mark.parametrize("layers", ["last", "all"])
def test_other_widths_need_a_bank(layers: str, tmp_path: Path) -> None:
    config = run_with(layers)
    with pytest.raises(
        ConfigError, match=r"terms.s: hidden states of the student are 8 wide .*main 12, .*fit-projection"
    ):
        states_to_send(config, facts(8, 2), {"main": facts(12, 4)})
    path = write_bank(tmp_path / "bank", (8, 2), (12, 4))
    banked = run_with(layers, f"objective.terms.s.bank={path}")
    expected = (2,) if layers == "last" else (1, 2)
    assert states_to_send(banked, facts(8, 2), {"main": facts(12, 4)})["main"].layers == expected


def test_a_bank_of_another_pair_or_without_the_layer_is_refused(tmp_path: Path) -> None:
    path = write_bank(tmp_path / "bank", (8, 3), (12, 4))
    config = run_with("last", f"objective.terms.s.bank={path}")
    with pytest.raises(ConfigError, match=r"fitted for a teacher of width 12 and 4 layers, teachers.main has 16 and 4"):
        states_to_send(config, facts(8, 3), {"main": facts(16, 4)})
    with pytest.raises(ConfigError, match="fitted for layers 1, 3 of the student, not for 2"):
        states_to_send(run_with([2], f"objective.terms.s.bank={path}"), facts(8, 3), {"main": facts(12, 4)})
    with pytest.raises(ConfigError, match="names layer 9 of the student, which has 3"):
        states_to_send(run_with([9]), facts(8, 3), {"main": facts(8, 4)})


def test_terms_that_read_sent_layers_read_the_same() -> None:
    with pytest.raises(ConfigError, match="must have the same layers and bank"):
        run_with([1], "objective.terms.t={loss='representation',layers='all'}")


def test_servers_send_no_states() -> None:
    from teacher_workers.backends.base import check_signals

    config = run_with("all", "teachers.main.url=http://host:8000/v1")
    with pytest.raises(ConfigError, match=r"teachers.main: its backend 'http' does not send layers"):
        check_signals(config)


def test_every_node_must_have_the_drivers_bank(tmp_path: Path) -> None:
    path = write_bank(tmp_path / "bank", (8, 2), (12, 4))
    config = run_with("all", f"objective.terms.s.bank={path}")
    states = states_to_send(config, facts(8, 2), {"main": facts(12, 4)})["main"]
    assert load_bank(path, states.digest).rank == 3
    write_bank(tmp_path / "bank", (8, 3), (12, 4))
    with pytest.raises(ModelError, match="another one on this node"):
        load_bank(path, states.digest)
