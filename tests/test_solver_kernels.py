"""Solvers that run as kernels on graphics processors find what they find on the processor."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_solvers import (
    CASES,
    DIVISIONS,
    LOOK_UPS,
    QUICK,
    SOLVERS,
    anywhere,
    divided,
    looked_up,
    nowhere,
    off,
    to_look_up,
)
from selection import only
from textbook import inputs, weight
from torch import Tensor

from compress.calibration.precision import products
from compress.calibration.statistics import Statistics
from compress.engine.devices import Devices
from compress.passes.base import Target
from compress.passes.quantize import adaround, jlcm, learned, nupes
from compress.passes.solvers import device
from compress.passes.solvers.device import has_kernels

HERE = Path(__file__).parent
INTERPRETED = "test_the_kernels_of_solvers_find_the_same_in_the_interpreter"
ROUNDING = 2e-5  # of sums of some hundred numbers of either sign


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, list[float]]:
    """What the kernels are off by in Triton's interpreter."""
    chosen = [item.callspec.params["case"] for item in request.session.items if INTERPRETED in item.nodeid]
    ended = subprocess.run(
        [sys.executable, str(HERE / "interpreted_solvers.py"), *chosen],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, list[float]] | None = json.loads(ended.stdout)
    if found is None:
        pytest.skip("Triton is not installed")
    return found


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.real) for c in CASES])
def test_the_kernels_of_solvers_find_the_same_in_the_interpreter(
    case: str, interpreted: dict[str, list[float]]
) -> None:
    assert max(interpreted[case]) <= ROUNDING


def test_no_kernel_is_offered_on_a_processor() -> None:
    assert not has_kernels(torch.zeros(2))


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def fixed(*shape: int, seed: int = 1) -> Tensor:
    return leaf(*shape, seed=seed).detach().abs()


FUSED: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "between": (
        adaround.between,
        (leaf(4, 2, 6), fixed(4, 2, 6).floor(), fixed(4, 2, 1), torch.full((4, 2, 1), 8.0), 15),
    ),
    "undecided": (adaround.undecided, (leaf(4, 2, 6), torch.tensor(3.0))),
    "divided": (nupes.divided, (fixed(4, 2, 6), fixed(4, 2, 1) + 1, leaf(4, 2, 6))),
    "landed": (nupes.landed, (leaf(4, 2, 6), leaf(4, 2, 6, seed=2), torch.tensor(0.8), fixed(4, 2, 1))),
    "moved": (jlcm.moved, (fixed(4, 12), fixed(4, 1), leaf(4, 12))),
    "passed": (jlcm.passed, (leaf(4, 12), leaf(4, 12, seed=2))),
    "pulled": (jlcm.pulled, (leaf(4, 12), leaf(4, 12, seed=2), fixed(4, 12), fixed(4, 12, seed=3))),
}


def with_gradients(name: str) -> list[Tensor]:
    """What a function makes, and the gradients of its arguments."""
    function, arguments = FUSED[name]
    made = function(*arguments)
    learned = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    return [made.detach(), *torch.autograd.grad(made.square().sum(), learned)]


@pytest.mark.parametrize("name", only(["between"], FUSED))
def test_what_is_compiled_on_a_device_makes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = with_gradients(name)
    monkeypatch.setattr(device, "has_kernels", anywhere)
    monkeypatch.setattr(device, "BACKEND", "aot_eager")  # traced and differentiated as on a device
    device._compiled.cache_clear()
    for kind in ("float32", "bfloat16"):
        with products(kind):  # type: ignore[arg-type]
            assert max(off(with_gradients(name), expected)) < 1e-6
    device._compiled.cache_clear()
    assert not device._FAILED


def test_where_nothing_can_be_compiled_a_function_is_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, tried = with_gradients("moved"), []

    def fails(made: object) -> object:
        tried.append(made)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(device, "has_kernels", anywhere)
    monkeypatch.setattr(device, "_compiled", fails)
    monkeypatch.setattr(device, "_FAILED", set())
    for _ in range(2):
        assert max(off(with_gradients("moved"), expected)) == 0
    assert len(tried) == 1


def test_a_device_without_room_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(made: object) -> object:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(device, "has_kernels", anywhere)
    monkeypatch.setattr(device, "_compiled", fails)
    with pytest.raises(torch.OutOfMemoryError):
        with_gradients("moved")


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_gradients_are_made_where_their_tensors_are(name: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device autograd calls `backward` in a thread of its own, where no device is the default."""

    def plain(gradient: Tensor, index: Tensor, entries: int) -> Tensor:
        found = torch.zeros(len(gradient), entries, dtype=torch.float64, device="cpu")
        rows = gradient.reshape(len(gradient), -1).double()
        return found.scatter_add(1, index.reshape(len(index), -1).long(), rows)

    tables, columns = LOOK_UPS[name]
    expected = looked_up(False, tables, columns)
    monkeypatch.setattr(learned, "has_kernels", anywhere if kernel else nowhere)
    monkeypatch.setattr(learned, "sums_by_row", plain)
    entries, index, table_of = to_look_up(tables, columns)
    made = learned.look_up(entries, index, table_of).sin().sum()
    with torch.device("meta"):
        (gradient,) = torch.autograd.grad(made, [entries])
    assert max(off([gradient], expected[1:])) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_kernels_of_solvers_lose_no_more_on_a_device(name: str) -> None:
    """A tie may break the other way, so what is lost is compared, not the codes."""
    w, x = weight(64, 384), inputs(384)
    lost = []
    for where in (torch.device("cpu"), torch.device("cuda")):
        found = Statistics(384, "gram", where)
        found.update(x.to(where), "a test")
        with Devices(where).scope():
            edit = SOLVERS[name].run(Target(w.to(where), None, found))
        made = edit.weight if edit.encoding is None else edit.encoding.dequantize()
        assert made is not None
        lost.append(float(((made.cpu() - w) @ x.T).square().sum()))
    assert abs(lost[1] / lost[0] - 1) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DIVISIONS)
def test_flexround_makes_the_same_weights_and_gradients_on_a_device(name: str) -> None:
    expected = divided(False, *DIVISIONS[name])
    found = divided(True, *DIVISIONS[name], device="cuda")
    assert max(off([t.cpu() for t in found], expected)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LOOK_UPS)
def test_entries_get_the_same_gradients_on_a_device(name: str) -> None:
    with torch.device("cuda"):
        found = looked_up(True, *LOOK_UPS[name], device="cuda")
    assert max(off([t.cpu() for t in found], looked_up(False, *LOOK_UPS[name]))) < 1e-5
