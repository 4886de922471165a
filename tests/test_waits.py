"""How often a step makes the host wait for the device, counted on a CPU that plays the device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from test_engine import make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import engine
from helpers import Patch
from ops import Packing
from ops.transfer import Reading

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}


class Waits(TorchDispatchMode):
    """Counts what the host asks of the device. Tensors are the device's but for those that are made of the host's
    numbers or that it has read, and those that come of such tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_host = WeakTensorKeyDictionary()
        self._is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        packet, is_of_host = func.overloadpacket, self._all_on_host(inputs)
        if packet in READS and not is_of_host:
            self.note(str(packet))
        result = func(*args, **kwargs)
        if packet is aten.lift_fresh or is_of_host:
            self.read(*(value for value in tree_leaves(result) if isinstance(value, Tensor)))
        elif func._schema.is_mutable:  # what shares memory with what has been written into
            place = inputs[0].untyped_storage().data_ptr()
            for known in [of for of in self._on_host if of.untyped_storage().data_ptr() == place]:
                del self._on_host[known]
        return result

    def _all_on_host(self, tensors: list[Tensor]) -> bool:
        return all(tensor in self._on_host for tensor in tensors)

    def note(self, what: str) -> None:
        if self._is_counting:
            self.found.append(what)

    def read(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._on_host[tensor] = True

    def check(self, name: str, original: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
        """Stands for a way of reading a tensor that is not dispatched."""
        if tensor not in self._on_host:
            self.note(name)
        return original(tensor, *args)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens in it is not counted."""
        before, self._is_counting = self._is_counting, False
        try:
            yield
        finally:
            self._is_counting = before


@pytest.fixture
def waits(monkeypatch: Patch) -> Waits:
    """Counts while it is entered. What reads numbers on a CPU alone is set aside: attention's groups, AdamW, the norm's
    second try. (On a GPU torch itself looks for waits, test_gpu.py.)"""
    found = Waits()

    def wait(reading: Reading) -> Tensor:
        found.note("Reading.wait")
        host = reading._host.clone()
        found.read(host)
        return host

    def aside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with found.aside():
                return function(*args)

        return call

    monkeypatch.setattr(Reading, "wait", wait)
    for name in ("adamw_step", "gradient_norm"):
        monkeypatch.setattr(engine, name, aside(getattr(engine, name)))
    monkeypatch.setattr(Packing, "lengths", property(aside(Packing.lengths.func)))  # type: ignore[attr-defined]
    monkeypatch.setattr(Packing, "num_tokens", property(aside(Packing.num_tokens.fget)))  # type: ignore[attr-defined]
    for name in ("tolist", "numpy", "__array__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *args, n=name, o=original: found.check(n, o, *args))
    return found


KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "plain, several passes": {"accumulation_steps": 2},
    "average": {"ema_decay": 0.9},
    "fp16": {"dtype": torch.float16},
    "pcgrad": {"treatment": "pcgrad"},
    "gradvac": {"treatment": "gradvac"},
    "bregman": {"regularizers": ["bregman"]},
    "pcgrad, smart": {"treatment": "pcgrad", "regularizers": ["smart"]},
    "frozen": {"is_frozen": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_its_record_alone_and_under_a_treatment_once_more(kind: str, waits: Waits) -> None:
    """A treatment's inner products have to reach the host; regularizers want to know whether a step was taken."""
    trainer, is_treated = make(steps_per_epoch=4, **KINDS[kind]).trainer, "treatment" in KINDS[kind]
    for step in range(2):
        trainer.take_step(1, step)
    waits.found.clear()
    with waits:
        if trainer.methods.treatment is not None:
            waits.read(*trainer.methods.treatment.state.values())
        launched = trainer._launch(1, 2)
    assert waits.found == ["Reading.wait"] * (is_treated or "regularizers" in KINDS[kind])
    waits.found.clear()
    with waits:
        trainer._record(launched)
    assert waits.found == ["Reading.wait"]


def test_ways_of_waiting_are_counted(waits: Waits) -> None:
    """Each way but one that reads what is on the host already."""
    value = torch.ones(2)
    ways = [value.sum().item, value.nonzero, value.tolist, value.numpy, partial(bool, value[0] > 0)]
    for way in ways:
        waits.found.clear()
        with waits:
            way()
        assert len(waits.found) == 1, way
    waits.found.clear()
    with waits:
        host = Reading(value).wait()
        assert bool((host + torch.tensor([1.0, 2.0])).sum() > 0)
    assert waits.found == ["Reading.wait"]
