"""torchjd's methods as treatments: arguments, averages, what is refused. (Through a step, each against torchjd's own on
the Jacobian or the losses: test_wiring.py.)"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Patch
from jacobian_descent import AGGREGATORS, METHODS, REFUSED, SCALARIZERS
from parameters import NoParameters
from pcgrad import find_treatment

BASES = {"", "Aggregator", "GramianWeightedAggregator", "Scalarizer", "WeightedAggregator"}
EQUAL, UNEQUAL = torch.ones(3).double(), torch.tensor([1.0, 2.0, 0.5]).double()
ARGUMENTS: dict[str, dict[str, Any]] = {  # for three tasks
    "CAGrad": {"c": 0.4}, "Constant": {"weights": UNEQUAL}, "FairGrad": {"alpha": 2.0}, "Krum": {"n_byzantine": 0},
    "NashMTL": {"n_tasks": 3}, "IMTLL": {"shape": 3}, "STCH": {"mu": 0.1}, "UW": {"shape": 3},
    "COSMOS": {"lambda_": 1.0, "weights": EQUAL}, "PBI": {"theta": 5.0, "weights": EQUAL},
}  # fmt: skip


def torchjd_object(name: str) -> Any:
    """An aggregator or scalarizer as torchjd's documentation makes it."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if name == "CRMOGM":
        return aggregation.GramianWeightedAggregator(aggregation.CRMOGMWeighting(aggregation.MGDAWeighting()))
    package = pytest.importorskip("torchjd.scalarization") if name in SCALARIZERS else aggregation
    return getattr(package, name)(**ARGUMENTS.get(name, {}))


def skip_without(name: str) -> None:
    """Skips where torchjd, or what this method needs, is not installed."""
    try:
        torchjd_object(name)
    except (ImportError, NameError) as error:
        pytest.skip(str(error))


def make(name: str, arguments: str = "", num_tasks: int = 3, num_segments: int = 1) -> Any:
    given = "weights=1,2,0.5" if name == "Constant" and not arguments else arguments
    return find_treatment(name, given.split())(NoParameters(), num_tasks, num_segments)


def jacobian(seed: int, num_tasks: int = 3) -> Tensor:
    rows = torch.randn(num_tasks, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows - rows.mean(0) * 0.8


def weights(treatment: Any, call: int, num_segments: int = 1) -> Tensor:
    """(S, T) of a call with gradients, losses and an epoch of its own."""
    gramians = torch.stack([jacobian(10 * call + s) @ jacobian(10 * call + s).T for s in range(num_segments)])
    losses = torch.rand(3, generator=torch.Generator().manual_seed(call), dtype=torch.float64) + 0.5
    found: Tensor = treatment.coefficients(gramians, range(3), random.Random(call), losses, 1 + call // 2)
    return found.sum(1)


def test_everything_of_torchjd_is_offered_or_refused_with_a_reason() -> None:
    names = {
        name for part in ("aggregation", "scalarization") for name in pytest.importorskip(f"torchjd.{part}").__all__
    }
    assert {name.removesuffix("Weighting") for name in names} - BASES == {*METHODS, *REFUSED}
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=f"--treatment {name}: {reason}"):
            make(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_taken_up_from_its_state_goes_on_to_the_same_bits(name: str) -> None:
    skip_without(name)
    whole, first, second = (make(name, num_segments=2) for _ in range(3))
    expected = [weights(whole, call, 2) for call in range(7)]
    assert torch.stack(expected).isfinite().all()
    for call in range(4):
        weights(first, call, 2)
    for key, value in second.state.items():
        value.copy_(first.state[key])
    assert all(torch.equal(weights(second, call, 2), expected[call]) for call in range(4, 7))
    has_averages = name in ("CRMOGM", "DWA", "GradVac", "IMTLL", "NashMTL", "PCD", "UW")
    assert bool(second.state) == has_averages
    fresh = make(name, num_segments=2)
    assert torch.equal(weights(fresh, 6, 2), expected[6]) != has_averages


@pytest.mark.parametrize("scale", [1e-14, 1e40])
def test_a_method_that_goes_by_directions_gives_its_weights_at_any_scale(scale: float) -> None:
    skip_without("UPGrad")
    gram = (jacobian(0) @ jacobian(0).T)[None]
    given = (range(3), random.Random(0), torch.ones(3), 1)
    found, expected = (make("UPGrad").coefficients(factor * gram, *given) for factor in (scale, 1.0))
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(expected[0].sum(0) @ jacobian(0), torchjd_object("UPGrad")(jacobian(0)), atol=1e-6)


def test_methods_draw_from_the_step_s_generator_and_from_no_other() -> None:
    skip_without("Random")
    results = []
    for noise, call in enumerate((1, 1, 2)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        results.append(weights(make("Random"), call))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_gradient_without_length_gets_no_direction_of_mere_rounding() -> None:
    aggregator, rows = torchjd_object("ConFIG"), jacobian(3)
    rows[1] = 0
    found = make("ConFIG").coefficients((rows @ rows.T)[None], range(3), random.Random(0), torch.ones(3), 1)
    assert torch.allclose(found[0].sum(0) @ rows, aggregator(rows))


@pytest.mark.parametrize("arguments", ["weighting=UPGrad alpha=0.5", "weighting=GradVac alpha=0.5 initial_weights=1"])
def test_arguments_reach_the_method(arguments: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    inner = aggregation.UPGradWeighting() if "UPGrad" in arguments else aggregation.GradVacWeighting()
    own = aggregation.CRMOGMWeighting(inner, 0.5, EQUAL if "initial" in arguments else None)
    ours = make("CRMOGM", arguments)
    for call in range(3):
        torch.manual_seed(random.Random(call).getrandbits(63))
        gram = jacobian(10 * call) @ jacobian(10 * call).T
        assert torch.allclose(weights(ours, call)[0], own(gram))
    gram = jacobian(0) @ jacobian(0).T
    preferred = aggregation.AlignedMTLWeighting(UNEQUAL, "rmse")(gram)
    assert torch.allclose(weights(make("AlignedMTL", "scale_mode=rmse pref_vector=1,2,0.5"), 0)[0], preferred)
    tau = torch.tensor([0.9, 0.1]).double()
    assert torch.allclose(weights(make("PCD", "tau=0.9,0.1"), 0)[0], aggregation.PCDWeighting(tau)(gram))
    assert torch.allclose(weights(make("PCD", "tau=0.9"), 0)[0], aggregation.PCDWeighting(0.9)(gram))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nonsense", "", "expected one of AlignedMTL, CAGrad"),
        ("Krum", "n_byzantine=1", "at least 4 rows"),
        ("Krum", "n_byzantine=0.5", "n_byzantine=0.5: expected a number"),
        ("FairGrad", "beta=1", "--treatment_arguments beta: expected NAME=VALUE of alpha, max_iters"),
        ("FairGrad", "alpha=1,2", "alpha=1,2: expected a number"),
        ("Constant", "=", "--treatment_arguments weights: expected NAME=VALUE of weights"),
        ("Constant", "weights=1,2", "3 rows"),
        ("Mean", "c=1", "expected NAME=VALUE of none"),
        ("UPGrad", "projector=x", "expected NAME=VALUE of pref_vector"),
        ("UW", "lr=x", "lr=x: expected a number"),
        ("UW", "shape=4", "shape: expected NAME=VALUE of"),
        ("CRMOGM", "weighting=ConFIG", "weighting=ConFIG: expected a weighting of Gram matrices"),
        ("MGDA", "max_iters=0", "max_iters must be a positive integer"),
    ],
)
def test_a_method_that_cannot_be_had_is_one_line(name: str, arguments: str, words: str) -> None:
    pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match=f"--treatment {name}: ") as caught:
        make(name, arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*AGGREGATORS, *SCALARIZERS])
def test_without_torchjd_its_methods_are_refused(name: str, monkeypatch: Patch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match=f"--treatment {name}: torchjd is not installed"):
        make(name)
    make("pcgrad")
