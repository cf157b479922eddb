"""The house keeps its measures: `python -m tests.architecture` prints them."""

import pytest

from tests.architecture import Measure, measures


@pytest.mark.parametrize("measure", measures(), ids=lambda measure: measure.name.replace(" ", "-"))
def test_the_house_keeps_its_measures(measure: Measure) -> None:
    assert measure.holds, "\n".join((f"{measure.name}: {measure.value} of at most {measure.limit}", *measure.details))
