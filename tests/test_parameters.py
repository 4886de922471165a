"""Parameters of methods: their limits, their flags, and choices that are read back."""

from dataclasses import dataclass
from typing import Any

import pytest

from parameters import LIMITS, Choice, Flag, NoParameters, flags_of, parameter


class Method:
    @dataclass(frozen=True)
    class Parameters:
        rate: float = parameter(0.5, "how much", "0 < x <= 1")
        kind: str = parameter("soft", "which", choices=("soft", "hard"))
        steps: int = parameter(2, "how often", ">= 1", flag="rounds")


class Plain:
    pass


TABLE: dict[str, Any] = {"method": Method, "plain": Plain}


@pytest.mark.parametrize(
    ("limits", "allowed", "refused"),
    [
        ("", (-1e30, 0), ()),
        ("> 0", (1e-30,), (0, -1)),
        (">= 0", (0, 7), (-1e-9,)),
        (">= 1", (1,), (0, 0.99)),
        ("0 < x <= 1", (1e-9, 1), (0, 1.01)),
        ("0 < x < 1", (1e-9, 0.99), (0, 1)),
        ("0 <= x < 1", (0, 0.99), (-1e-9, 1)),
        ("0 <= x < 2**63", (0, 2**63 - 1), (-1,)),
        ("0 <= x <= 1024", (0, 1024), (-1, 1025)),
    ],
)
def test_a_value_outside_its_limits_is_named_with_what_is_allowed(
    limits: str, allowed: tuple[float, ...], refused: tuple[float, ...]
) -> None:
    flag = Flag("rate", 0.5, "how much", limits)
    assert [flag.problem(value) for value in (*allowed, True, "text")] == [None] * (len(allowed) + 2)
    for value in (*refused, float("inf"), float("nan")):
        assert flag.problem(value) == f"--rate {value}: expected {LIMITS[limits][0]}"


def test_one_of_the_choices_is_expected_and_a_whole_number_that_is_too_large_is_cut_in_the_message() -> None:
    assert Flag("seed", 0, "").problem(10**999) == f"--seed 1{'0' * 59}...: expected a whole number below 2**63"
    assert Flag("seed", 0, "", ">= 0").problem(2**63) == f"--seed {2**63}: expected a whole number below 2**63"
    flag = Flag("kind", "soft", "which", choices=("soft", "hard"))
    assert flag.problem("hard") is None and flag.problem("firm") == "--kind firm: expected one of soft, hard"


def test_flags_are_the_fields_that_parameter_made_under_their_prefix() -> None:
    found = dict(flags_of(Method.Parameters, "method_"))
    assert found == {
        "rate": Flag("method_rate", 0.5, "how much", "0 < x <= 1"),
        "kind": Flag("method_kind", "soft", "which", choices=("soft", "hard")),
        "steps": Flag("rounds", 2, "how often", ">= 1"),
    }
    assert list(flags_of(NoParameters)) == []


def test_a_choice_survives_its_file() -> None:
    for choice in (Choice("method", Method.Parameters(0.25, "hard", 7)), Choice("plain")):
        assert Choice.from_dict(choice.to_dict(), TABLE) == choice
    assert Choice.from_dict({"name": "method", "parameters": {"rate": 1.0}}, TABLE).parameters.kind == "soft"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "other", "parameters": {}}, "'other', expected one of method, plain"),
        ({"name": "method"}, "parameters"),
        ({"name": "plain", "parameters": {"rate": 0.5}}, "unexpected keyword argument 'rate'"),
        ({"name": "method", "parameters": {"rate": 1}}, "rate is 1, expected as in 0.5"),
        ({"name": "method", "parameters": {"steps": True}}, "steps is True, expected as in 2"),
        ({"name": "method", "parameters": {"steps": 0}}, "--rounds 0: expected 1 or more"),
        ({"name": "method", "parameters": {"kind": "firm"}}, "--method_kind firm: expected one of soft, hard"),
    ],
)
def test_a_choice_that_is_none_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        Choice.from_dict(values, TABLE)
