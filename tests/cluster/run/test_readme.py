"""README shows the loop as it is."""

import inspect
from pathlib import Path

from cluster.run.driver import train

README = Path(__file__).parents[3] / "README.md"


def test_the_loop_in_the_readme_is_that_of_the_driver() -> None:
    source = inspect.getsource(train)
    [shown] = [block for block in README.read_text().split("```") if block.startswith("python\nfor step in")]
    assert shown.removeprefix("python").split() == source[source.index("for step in") :].split()
