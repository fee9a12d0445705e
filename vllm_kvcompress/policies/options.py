"""Options of scorers and budgets: declared once, as fields of their classes.

A part of a method is a frozen dataclass. A field made by `option` is an option that the user can
set; its default stands there and nowhere else. Standard library only.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptionSpec:
    """One option: its default, allowed type and values.

    Attributes:
        default: value when the user gives none; None = one must be given.
        kind: type that a value must have (an int passes for float, a bool never for int).
        help: one line for the user.
        choices: allowed values, or None for any.
        minimum, maximum: inclusive bounds of a number, or None.
        parse: turns a given value into what is stored, raising ValueError with the problem in
            words; replaces all other checks.
    """

    default: Any
    kind: type
    help: str
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    parse: Callable[[Any], Any] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as words to follow the option's name; None if fine."""
        if self.parse is not None:
            try:
                self.parse(value)
            except ValueError as error:
                return str(error)
            return None
        if self.kind is float:
            right_type = isinstance(value, int | float) and not isinstance(value, bool)
        elif self.kind is int:
            right_type = isinstance(value, int) and not isinstance(value, bool)
        else:
            right_type = isinstance(value, self.kind)
        if not right_type:
            return f"must be of type {self.kind.__name__}"
        if self.kind is float and not abs(value) <= sys.float_info.max:
            return "must be finite"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum}"
        return None


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is an option of its class.

    Args:
        default, help, choices, minimum, maximum, parse: as in `OptionSpec`.
        kind: type of a value; None = the default's. A bool may be true or false.
    """
    kind = kind or type(default)
    if kind is bool:
        choices = (True, False)
    spec = OptionSpec(default, kind, help, choices, minimum, maximum, parse)
    return dataclasses.field(default=default, metadata={"option": spec})


def share_option(default: float, help: str) -> Any:
    """An option that is a part of a whole, in [0, 1]."""
    return option(default, help, minimum=0.0, maximum=1.0)


def kernel_option(default: int, help: str) -> Any:
    """An option that is the width of a pooling along tokens."""
    return option(default, help + ", odd; 1 = none", choices=tuple(range(1, 64, 2)))


def options_of(part: type) -> dict[str, OptionSpec]:
    """The options of a scorer's or a budget's class by name, inherited ones first.

    Raises:
        TypeError: if the class has options, but is no dataclass itself.
    """
    for base in part.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, dataclasses.Field):
                raise TypeError(f"{base.__name__} has the option {name!r}, but no @dataclass")
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    return {f.name: f.metadata["option"] for f in fields if "option" in f.metadata}


def make_part(part: Any, values: dict[str, Any]) -> Any:
    """A scorer or a budget with its own options set to what `values` has for them."""
    return part(**{name: values[name] for name in options_of(part)})
