"""The table of seeded faults fits the tree as it is."""

import ast
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.table import AREAS, FAULTS

ROOT = Path(__file__).parents[2]
PRODUCT = ("cluster/", "learner/", "rollout_workers/", "teacher_workers/")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_one_place_of_the_product_and_names_tests_that_are_there(fault: Fault) -> None:
    assert fault.path.startswith(PRODUCT)
    text = (ROOT / fault.path).read_text(encoding="utf-8")
    assert text.count(fault.before) == 1
    assert ast.dump(ast.parse(fault.applied_to(text))) != ast.dump(ast.parse(text))
    for test in fault.tests:
        path, _, name = test.partition("::")
        # `make test` leaves tests/chaos out.
        assert path.startswith("tests/")
        assert not path.startswith("tests/chaos")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(encoding="utf-8")


def test_no_two_faults_or_areas_have_one_name() -> None:
    assert len({fault.name for fault in FAULTS} | set(AREAS)) == len(FAULTS) + len(AREAS)
