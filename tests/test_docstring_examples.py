"""What a docstring shows is what the code does."""

import doctest
import importlib

import pytest

from tests.test_layering import SOURCES

WITH_EXAMPLES = [module for module, path in SOURCES.items() if ">>> " in path.read_text()]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_give_what_they_say(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0
