"""`preceptor check` of a tiny pair of every architecture passes, or refuses before an engine starts."""

from pathlib import Path

import pytest

from tests.architectures.matrix import check_pair
from tests.architectures.models import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pair_passes_or_is_refused_before_an_engine_starts(architecture: str, tmp_path: Path) -> None:
    outcome = check_pair(architecture, tmp_path)
    assert outcome.is_fine, outcome
