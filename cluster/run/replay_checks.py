"""Checks that a run can learn from the rows of another: how they were sampled, and what teachers say of them."""

from pathlib import Path

import pyarrow as pa

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError
from cluster.contracts.recorded_rows import Origin
from cluster.contracts.signals import find_signal
from cluster.models.weight_files import fingerprint

SAMPLING = ("samples_per_prompt", "temperature", "top_p", "top_k")  # a ratio to the sampler knows of them
STUDENTS_CANDIDATES = "candidate_rollout_logprobs"
SCORE_AGAIN = "set rollout.replay.signals = 'recomputed', or record a run with this objective"


def check_settings(config: Config, recorded: Config) -> None:
    """Raise ConfigError if the recorded run sampled otherwise than this one says, or for other contexts."""
    for name in SAMPLING:
        ours, theirs = getattr(config.rollout, name), getattr(recorded.rollout, name)
        if ours != theirs:
            raise ConfigError(f"rollout.{name} is {ours}, and {_run(config)} was sampled with {theirs}; set the same")
    for name, teacher in config.teachers.items():
        other = recorded.teachers.get(name, teacher)
        if (teacher.context, teacher.shuffled_context) != (other.context, other.shuffled_context):
            raise ConfigError(
                f"teachers.{name}.context: the rows of {_run(config)} have the contexts that they were sampled with; "
                "set the same"
            )


def check_columns(config: Config, origin: Origin, reader: pa.RecordBatchFileReader) -> None:
    """Raise ConfigError if a file lacks what the objective reads.

    That is the student's own candidates, and the signals of teachers where they do not score again.
    """
    needs, schema, run = config.objective.needs, reader.schema, _run(config)
    route = reader.get_batch(0)["teacher"][0].as_py()
    if route not in config.teachers:
        raise ConfigError(f"{run}: its rows are for the teacher {route}; add [teachers.{route}]")
    columns: list[str] = []
    widths = {STUDENTS_CANDIDATES: needs.num_candidates} if needs.candidates_from == "student" else {}
    if config.rollout.replay is not None and config.rollout.replay.signals == "recorded":
        widths["candidate_ids"] = needs.num_candidates
        for name, request in config.scorers(route):
            _check_checkpoint(config, name, origin)
            columns += [find_signal(signal).column(request.model) for signal in sorted(request.signals)]
    for column in columns:
        if column not in schema.names:
            raise ConfigError(f"{run}: its rows have no {column}, which the objective reads; {SCORE_AGAIN}")
    for column, width in widths.items():
        if (present := _width(schema, column)) != width:
            lack = f"the objective reads {width} {column} per token, and there are {present}"
            advice = "record a run with this support" if column == STUDENTS_CANDIDATES else SCORE_AGAIN
            raise ConfigError(f"{run}: {lack}; {advice}")


def _check_checkpoint(config: Config, name: str, origin: Origin) -> None:
    """Raise ConfigError if the teacher of the run file is not the one whose signals the rows have."""
    model, recorded = config.teachers[name].model, origin.scored_by.get(name, "")
    if recorded and Path(model).is_dir() and fingerprint(model) not in recorded:
        raise ConfigError(
            f"teachers.{name}: {model} is not the checkpoint that scored the rows of {_run(config)}; set "
            "rollout.replay.signals = 'recomputed', or name that one"
        )


def _width(schema: pa.Schema, column: str) -> int:
    """Return how many values a token has in a column; 0 if there is none."""
    return int(schema.field(column).type.value_type.list_size) if column in schema.names else 0


def _run(config: Config) -> str:
    assert config.rollout.replay is not None, "the run replays rows"
    return config.rollout.replay.run
