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
