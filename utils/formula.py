"""Arithmetic in preset rules, such as "min(30, 60000 / N)", on the public facts of a data set. Runs no code."""

import ast
import math
import operator
from collections.abc import Callable, Mapping

from utils.errors import UserError

MARK = "="  # first character of a value that is a formula
FUNCTIONS: dict[str, Callable] = {
    "min": min,
    "max": max,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
}
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
}


def evaluate(text: str, names: Mapping[str, float]) -> float | bool:
    """The value of a formula. Raises UserError, which quotes the formula, for anything but arithmetic, comparisons
    joined by `and`, the functions above and these names."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, names)
    except (SyntaxError, TypeError, ArithmeticError, ValueError) as error:
        known = ", ".join([*names, *(f"{name}()" for name in FUNCTIONS)])
        raise UserError(
            f"formula '{text.strip()}' cannot be evaluated ({error}); it may use numbers, {known}"
        ) from error


def resolved(value: object, names: Mapping[str, float]) -> object:
    """A rule's value with every formula in it, or in the elements of its list, replaced by a number."""
    if isinstance(value, list):
        return [resolved(element, names) for element in value]
    if isinstance(value, str) and value.startswith(MARK):
        return evaluate(value.removeprefix(MARK), names)
    return value


def _value(node: ast.AST, names: Mapping[str, float]) -> float | bool:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand, names))
        case ast.Compare(left, [op], [right]) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.BoolOp(ast.And(), parts):
            return all(_value(part, names) for part in parts)
        case ast.Call(ast.Name(id=name), arguments, []) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(argument, names) for argument in arguments))
    raise ValueError(f"'{ast.unparse(node)}' is not allowed")
