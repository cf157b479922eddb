"""Describes a seeded fault: one small wrong change, and the tests that notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Describes one wrong change of the product.

    Example:
        >>> Fault("sum", "learner/sum.py", "a + b", "a - b", ("tests/learner/test_sum.py",)).applied_to("x = a + b")
        'x = a - b'
    """

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]  # files or ids, as few as catch it; none in tests/chaos, which `make test` leaves out

    def applied_to(self, text: str) -> str:
        return text.replace(self.before, self.after)


def expectation(preset: str, case: str = "1.0-stale") -> tuple[str, ...]:
    """Name the test of a preset's formula at one sampling temperature and age of the student that wrote."""
    return (f"tests/conformance/test_presets.py::test_the_expected_gradient_is_that_of_the_source[{case}-{preset}]",)
