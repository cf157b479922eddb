"""Says whether a completion answers its prompt; pure functions from text to a reward of 0 or 1."""

import re
from collections.abc import Callable

from cluster.contracts.errors import PromptError

MATH_SECONDS = 5


def verify(kind: str, completion: str, answer: str, finish_reason: str) -> float:
    """Return 1 if the completion is right, else 0; a completion that was cut off at its length limit is wrong.

    The completion is decoded without special tokens; the answer is as the prompts give it: a text, a regular
    expression, or a mathematical expression.
    """
    return float(finish_reason == "stop" and VERIFIERS[kind](completion.strip(), answer))


def check_answer(kind: str, answer: str) -> None:
    """Refuse by PromptError an answer that its verifier could never use."""
    if kind == "regex":
        try:
            re.compile(answer)
        except (re.error, RecursionError, OverflowError) as error:
            raise PromptError(f"answer {answer!r} is not a regular expression: {error}") from error
    elif kind == "math" and not _parse(answer):
        raise PromptError(f"answer {answer!r} holds no mathematical expression")


def is_exact(completion: str, answer: str) -> bool:
    """Compare the whole texts, ignoring white space at the ends."""
    return completion == answer.strip()


def is_regex_match(completion: str, answer: str) -> bool:
    """Match the whole completion against the answer as a regular expression; `.` also matches a line break."""
    return re.fullmatch(answer, completion, re.DOTALL) is not None


def is_math_equal(completion: str, answer: str) -> bool:
    """Compare the completion's last mathematical expression with the answer's, by value (math-verify).

    What takes longer than MATH_SECONDS to read or to compare counts as wrong. Call it from a main thread.
    """
    from math_verify import verify as math_equal  # takes a second to import, which other verifiers need not wait for

    return bool(math_equal(_parse(answer), _parse(completion), timeout_seconds=MATH_SECONDS))


def _parse(text: str) -> list[object]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=MATH_SECONDS))


VERIFIERS: dict[str, Callable[[str, str], bool]] = {"exact": is_exact, "regex": is_regex_match, "math": is_math_equal}
