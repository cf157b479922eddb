"""The pairs of student and teacher that benchmarks train: their run files, and how to get their models.

Importing this loads no Ray, vLLM or DeepSpeed, which TRL's environment does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.run_config import Config
from cluster.config.run_file import load_run_config
from cluster.demo import embedded_config

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2_RUN_FILE = ROOT / "examples/smollm2.toml"
IN_FLOAT32 = ("learner.dtype=float32", "rollout.engine.dtype=float32", "teachers.smollm2.engine.dtype=float32")


@dataclass(frozen=True)
class Pair:
    """One student and its teacher, as a user trains them."""

    command: tuple[str, ...]  # arguments of `preceptor` before the overrides
    models: tuple[str, ...] = ()  # folders, relative to the repository, that are not part of it
    how_to_get_them: str = ""


PAIRS = {
    "embedded": Pair(("demo",)),
    "smollm2": Pair(
        ("train", str(SMOLLM2_RUN_FILE)),
        models=("models/smollm2-135m-instruct", "models/smollm2-student"),
        how_to_get_them="python -m examples.smollm2.get_weights && python -m examples.smollm2.drop_layers",
    ),
}


def pair_config(pair: str, overrides: Sequence[str] = ()) -> Config:
    """Return what the pair's command line with these overrides trains on this machine.

    Raises:
        ConfigError: an override is wrong.
    """
    overrides = [*machine_overrides(pair), *overrides]
    return embedded_config(overrides) if pair == "embedded" else load_run_config(SMOLLM2_RUN_FILE, overrides)


def machine_overrides(pair: str) -> tuple[str, ...]:
    """Return what this machine needs in front of all overrides: float32 on a CPU without bfloat16 products."""
    if pair == "embedded":
        return ()
    from cluster.models.lm_head import lacks_bfloat16

    return IN_FLOAT32 if lacks_bfloat16() else ()


def missing_models(pair: str, root: Path = ROOT) -> str | None:
    """Say in one sentence which models of the pair are not there and how to make them; None when all are."""
    missing = [model for model in PAIRS[pair].models if not (root / model / "config.json").is_file()]
    if not missing:
        return None
    return f"the {pair} pair has no {' and no '.join(missing)}; to make them: {PAIRS[pair].how_to_get_them}"
