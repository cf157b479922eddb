"""Reads a condition on rows, such as `reward > 0 and completion_tokens < 200`, as an expression of Arrow's.

It has the form of Python's: names are columns, beside numbers, texts and lists of them; comparisons, `in`, `and`, `or`,
`not`, the four operations, and `is_null(column)`. Where a value is missing, no comparison holds. Nothing is evaluated
by Python, so that a condition may come from anywhere.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.contracts.errors import ConfigError

_OPERATIONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.And: operator.and_,
    ast.Or: operator.or_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parse_filter(text: str) -> pc.Expression:
    """Return the condition as an expression over columns; raise ConfigError if it is none.

    Example:
        >>> table = pa.table({"step": [1, 2, 3], "reward": [0.0, 1.0, None]})
        >>> table.filter(parse_filter("step in [2, 3] and not is_null(reward)"))["step"].to_pylist()
        [2]
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        expression = _read(tree)
        if isinstance(tree, ast.Constant):
            raise ValueError("it names no column")
        return expression
    except (SyntaxError, ValueError, RecursionError, MemoryError, pa.ArrowException) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ConfigError(
            f"condition '{text}': {reason}; expected comparisons of columns, such as "
            "reward > 0 and finish_reason == 'stop'"
        ) from error


def _read(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name):
            return pc.field(name)
        case ast.Constant(value=value) if isinstance(value, int | float | str):
            return pc.scalar(value)
        case ast.Call(func=ast.Name(id="is_null"), args=[column], keywords=[]):
            return _read(column).is_null()
        case ast.Compare(left=left, ops=ops, comparators=others):
            return reduce(operator.and_, map(_compare, [left, *others], ops, others))
    return _combine(node)


def _combine(node: ast.expr) -> Any:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return pc.scalar(0) - _read(operand)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_read(operand)
        case ast.BoolOp(op=op, values=values):
            return reduce(_OPERATIONS[type(op)], map(_read, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_read(left), _read(right))
    raise ValueError(f"'{ast.unparse(node)}' is not understood")


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple):
        is_member = _read(left).isin([ast.literal_eval(item) for item in right.elts])
        return is_member if isinstance(op, ast.In) else ~is_member
    if type(op) not in _OPERATIONS:
        raise ValueError(f"'{ast.unparse(right)}' is not understood after '{type(op).__name__.lower()}'")
    return _OPERATIONS[type(op)](_read(left), _read(right))
