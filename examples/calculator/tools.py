"""The calculator's tools: plain functions, whose signatures and docstrings become the schemas that models read."""


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first factor
        b: the second factor
    """
    return a * b


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a: the first summand
        b: the second summand
    """
    return a + b
