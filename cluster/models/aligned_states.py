"""Checks that the models of a run have the hidden states that its objective compares, and says what teachers send."""

from collections.abc import Mapping

from cluster.config.run_config import Config
from cluster.config.stages import StatesConfig
from cluster.config.terms import RepresentationTerm
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models.hidden_layers import ProjectionBank, chosen_layers, load_bank
from cluster.models.model_checks import ModelFacts


def states_to_send(config: Config, student: ModelFacts, teachers: Mapping[str, ModelFacts]) -> dict[str, StatesConfig]:
    """Return, of each [teachers.NAME] that sends layers, which ones; raise ConfigError as `check_states` does."""
    check_states(config, student, teachers)
    reads = config.objective.representation
    if reads is None:
        return {}
    digest = "" if reads.bank is None else load_bank(reads.bank).digest
    states = StatesConfig(chosen_layers(reads.layers, student.depth), student.depth, reads.bank, digest)
    return dict.fromkeys(sorted(_scorers(config, config.objective.needs.layer_states)), states)


def check_states(config: Config, student: ModelFacts, teachers: Mapping[str, ModelFacts]) -> None:
    """Check some teachers of a run, by name.

    Raises:
        ConfigError: a layer or the bank is missing, or the models' states cannot be compared as the objective says.
    """
    for name, term in config.objective.terms.items():
        if isinstance(term, RepresentationTerm):
            try:
                _check(config, term, student, teachers)
            except ModelError as error:
                raise ConfigError(f"objective.terms.{name}: {error}") from error


def _check(config: Config, term: RepresentationTerm, student: ModelFacts, teachers: Mapping[str, ModelFacts]) -> None:
    layers = chosen_layers(term.layers, student.depth)
    bank = None if term.bank is None else load_bank(term.bank).select(layers)
    if bank is not None:
        _check_side(bank, "student", "the student", student, term)
    for name in sorted(_scorers(config, term.target) & teachers.keys()):
        teacher = teachers[name]
        if bank is not None:
            _check_side(bank, "teacher", f"teachers.{name}", teacher, term)
        elif teacher.width != student.width:
            raise ModelError(
                f"hidden states of the student are {student.width} wide and those of teachers.{name} {teacher.width}, "
                "so they cannot be compared as they are; fit a projection bank with `preceptor fit-projection` and "
                "name it in bank"
            )


def _check_side(bank: ProjectionBank, side: str, name: str, model: ModelFacts, term: RepresentationTerm) -> None:
    fitted = (bank.width(side), bank.depths[side])  # type: ignore[arg-type,index]
    if fitted != (model.width, model.depth):
        raise ModelError(
            f"projection bank '{term.bank}' was fitted for a {side} of width {fitted[0]} and {fitted[1]} layers, "
            f"{name} has {model.width} and {model.depth}; fit one for this pair with `preceptor fit-projection`"
        )


def _scorers(config: Config, models: Mapping[str, float] | tuple[str, ...]) -> set[str]:
    return {config.scoring_teacher(model, route) for route in config.routes for model in models}
