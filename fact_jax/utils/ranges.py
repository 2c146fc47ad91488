"""Ranges of configuration fields, declared in their types, and the check of a dataclass.

    class OptimizerConfig(CheckedFields):
        learning_rate: Annotated[float, Range(0)] = 1e-4

No JAX here, so that reading settings is quick.
"""

import dataclasses
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Sized
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, without the ends that are open.

    Infinity is outside unless ``high`` is infinite, NaN in any case.
    """

    low: float
    high: float = sys.float_info.max
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if (self.low, self.high) == (-sys.float_info.max, sys.float_info.max):
            return "a finite number"
        if not (self.open_low or self.open_high) and self.high < 1e6:
            return f"from {self.low:,} to {self.high:,}"
        low = f"{'above' if self.open_low else 'at least'} {self.low:,}"
        if self.high == sys.float_info.max:
            return low
        high = f"{'below' if self.open_high else 'at most'} {self.high:,}"
        return low if math.isinf(self.high) else f"{low} and {high}"


@dataclasses.dataclass(frozen=True)
class Length:
    """Texts and tuples of at least ``low`` elements."""

    low: int

    def holds(self, value: Sized) -> bool:
        return len(value) >= self.low

    def __str__(self) -> str:
        return f"of at least {self.low} element{'s' if self.low > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Regex:
    """Texts that are regular expressions."""

    def holds(self, value: str) -> bool:
        try:
            re.compile(value)
        except re.error:
            return False
        return True

    def __str__(self) -> str:
        return "a regular expression"


Count = Annotated[int, Range(1, 2**31 - 1)]
CountOrZero = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Pattern = Annotated[str, Regex()]
Name = Annotated[str, Length(1)]

_KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
}


class CheckedFields:
    """Base of a dataclass: ValueError for a value that is not of its field's type or in its range.

    The message begins with the field's name.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name, hint in hints.items():
            value = getattr(self, name)
            if wanted := _unmet(value, hint):
                raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _unmet(value: Any, hint: Any) -> str | None:
    """What a value would have to be, or None if it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = (limit for limit in hint.__metadata__ if not limit.holds(value))
        return _unmet(value, arguments[0]) or next(map(str, limits), None)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        found = [_unmet(value, option) for option in arguments]
        return " or ".join(map(str, found)) if all(found) else None
    if origin is tuple:
        return _unmet_elements(value, arguments)
    if hint is type(None):
        return None if value is None else "None"
    if hint in _KINDS:
        kind, words = _KINDS[hint]
        return (
            None if isinstance(value, kind) and (hint is bool) == (type(value) is bool) else words
        )
    if hint is not Any and isinstance(hint, type) and not isinstance(value, hint):
        return f"a {hint.__name__}"
    return None


def _unmet_elements(value: Any, hints: tuple[Any, ...]) -> str | None:
    if not isinstance(value, tuple):
        return "a tuple"
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    if len(value) != len(hints):
        return f"a tuple of {len(hints)}"
    wanted = next(filter(None, map(_unmet, value, hints)), None)
    return wanted and f"a tuple whose elements are {wanted}"
