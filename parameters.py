"""Parameters of methods, each declared once: its default, help and limits stand beside the method that reads it.

An entry of a table of methods (SCHEDULERS, TREATMENTS, REGULARIZERS, ADAPTERS, HEADS, AUGMENTATIONS) is a class. If it
has parameters, it has a frozen dataclass `Parameters` whose fields are made by `parameter`; config.py makes flags of
them, `--<name of the entry>_<name of the field>`.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from messages import shown

LIMITS: Mapping[str, tuple[str, Callable[[float], bool]]] = MappingProxyType(
    {
        "": ("a number", lambda x: True),
        "> 0": ("a number above 0", lambda x: x > 0),
        ">= 0": ("0 or more", lambda x: x >= 0),
        ">= 1": ("1 or more", lambda x: x >= 1),
        ">= 2": ("2 or more", lambda x: x >= 2),
        "0 < x <= 1": ("a number above 0 and at most 1", lambda x: 0 < x <= 1),
        "0 < x < 1": ("a number above 0 and below 1", lambda x: 0 < x < 1),
        "0 <= x < 1": ("a number from 0 to below 1", lambda x: 0 <= x < 1),
        "0 <= x < 2**63": ("a whole number from 0 to below 2**63", lambda x: 0 <= x < 2**63),
        "0 <= x <= 1024": ("a whole number from 0 to 1024", lambda x: 0 <= x <= 1024),
    }
)


@dataclass(frozen=True)
class NoParameters:
    """Of an entry that has none."""


@dataclass(frozen=True)
class Flag:
    """A flag of the command line, without the two dashes. only_with: a field beside it, and with which value of that it
    does something."""

    name: str
    default: Any
    help: str
    limits: str = ""
    choices: Collection[str] = ()
    metavar: str | None = None
    only_with: tuple[str, Any] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, in a line; None if nothing is."""
        words, is_allowed = LIMITS[self.limits]
        if self.choices and value not in self.choices:
            return f"--{self.name} {shown(value)}: expected one of {', '.join(filter(None, self.choices))}"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and isinstance(value, int) and abs(value) >= 2**63:
            return f"--{self.name} {shown(value)}: expected a whole number below 2**63"
        if is_number and not (math.isfinite(value) and is_allowed(value)):
            return f"--{self.name} {shown(value)}: expected {words}"
        return None


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" where a known word has all parts of this one (--epoch_steps, --steps_per_epoch) or is like
    it, in capitals or not."""
    names = {name.lower().strip("-"): name for name in reversed([*known])}
    asked = word[:60].lower().strip("-")
    holding = sorted((name for name in names if {*asked.split("_")} <= {*name.split("_")}), key=len)
    very_like, like = (difflib.get_close_matches(asked, names, 1, cutoff) for cutoff in (0.85, 0.6))
    found = very_like or holding or like
    return f"; did you mean {names[found[0]]}?" if found else ""


def parameter(default: Any, help: str, limits: str = "", flag: str = "", **options: Any) -> Any:
    """A field that is a flag. limits: one of LIMITS. flag: its name if it is another one. options: of `Flag`."""
    return field(default=default, metadata={"help": help, "limits": limits, "flag": flag, "options": options})


def flags_of(parameters: type, prefix: str = "") -> Iterator[tuple[str, Flag]]:
    """(name of the field, its flag) of a dataclass of parameters."""
    for item in fields(parameters):
        if item.metadata:
            name = item.metadata["flag"] or prefix + item.name
            metadata = item.metadata
            yield item.name, Flag(name, item.default, metadata["help"], metadata["limits"], **metadata["options"])


def parameters_type(entry: Any) -> type:
    """The dataclass of an entry's parameters."""
    found: type = getattr(entry, "Parameters", NoParameters)
    return found


@dataclass(frozen=True)
class Choice:
    """An entry of a table by its name, and its parameters."""

    name: str
    parameters: Any = NoParameters()

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "parameters": asdict(self.parameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], table: Mapping[str, Any]) -> "Choice":
        """Raises ValueError, KeyError or TypeError if the values are not those of an entry of the table."""
        name = values["name"]
        if name not in table:
            raise ValueError(f"{shown(repr(name))}, expected one of {', '.join(table)}")
        kind = parameters_type(table[name])
        parameters = kind(**values["parameters"])
        for field_name, flag in flags_of(kind, f"{name}_"):
            value = getattr(parameters, field_name)
            if type(value) is not type(flag.default):
                raise ValueError(f"{field_name} is {shown(repr(value))}, expected as in {flag.default!r}")
            if problem := flag.problem(value):
                raise ValueError(problem)
        return cls(name, parameters)
