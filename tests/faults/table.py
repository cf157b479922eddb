"""Lists small faults that an expert could make, and the tests of `make test` that catch each, by area.

`python -m tests.faults` applies them one at a time. `before` stands once in the file; `test_table.py` holds that.
"""

from tests.faults.fault import Fault
from tests.faults.tables import (
    alignment,
    estimators,
    first_run,
    gpu,
    gradient,
    memory,
    models,
    objective,
    presets,
    rollouts,
    run,
    self_teachers,
    teachers,
    tokenizers,
    weight_sync,
)

AREAS: dict[str, tuple[Fault, ...]] = {
    "alignment": alignment.FAULTS,
    "gradient": gradient.FAULTS,
    "objective": objective.FAULTS,
    "estimators": estimators.FAULTS,
    "presets": presets.FAULTS,
    "weight_sync": weight_sync.FAULTS,
    "rollouts": rollouts.FAULTS,
    "teachers": teachers.FAULTS,
    "tokenizers": tokenizers.FAULTS,
    "self_teachers": self_teachers.FAULTS,
    "models": models.FAULTS,
    "memory": memory.FAULTS,
    "run": run.FAULTS,
    "first_run": first_run.FAULTS,
    "gpu": gpu.FAULTS,
}
GROUPS = {"minimised": ("objective", "estimators", "presets")}  # of areas
FAULTS = tuple(fault for faults in AREAS.values() for fault in faults)
