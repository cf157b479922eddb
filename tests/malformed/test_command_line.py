"""What the command line says of an error that nobody foresaw."""

import pytest

from cluster.cli import report_errors
from cluster.contracts.errors import PreceptorError


def failing(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("x"), "preceptor: unexpected KeyError: 'x'; this is a fault of the program; --debug shows its trace"),
        (RuntimeError("two\nlines"), "preceptor: unexpected RuntimeError: two lines; this is a fault of the program"),
        (ValueError(), "preceptor: unexpected ValueError; this is a fault of the program"),
        (MemoryError(), "preceptor: unexpected MemoryError; this is a fault of the program"),
        (PreceptorError("a\nb"), "preceptor: a b"),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_sentence(
    error: Exception, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_errors(lambda: failing(error), debug=False) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(says)
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), PreceptorError("x")])
def test_debug_lets_the_trace_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        report_errors(lambda: failing(error), debug=True)
    assert caught.value is error
