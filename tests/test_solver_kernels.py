"""Solvers that run as kernels on graphics processors find what they find on the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted_solvers import CASES, DIVISIONS, LOOK_UPS, SOLVERS, divided, looked_up, off
from textbook import inputs, weight

from compress.calibration.statistics import Statistics
from compress.engine.devices import Devices
from compress.passes.base import Target
from compress.passes.solvers.device import has_kernels

HERE = Path(__file__).parent
ROUNDING = 2e-5  # of sums of some hundred numbers of either sign


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    """What the kernels are off by in Triton's interpreter."""
    ended = subprocess.run(
        [sys.executable, str(HERE / "interpreted_solvers.py")],
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


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_solvers_find_the_same_in_the_interpreter(
    case: str, interpreted: dict[str, list[float]]
) -> None:
    assert max(interpreted[case]) <= ROUNDING


def test_no_kernel_is_offered_on_a_processor() -> None:
    assert not has_kernels(torch.zeros(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_kernels_of_solvers_lose_no_more_on_a_device(name: str) -> None:
    """A tie may break the other way, so what is lost is compared, not the codes."""
    w, x, device = weight(64, 384), inputs(384), torch.device("cuda")
    lost = []
    for where in (torch.device("cpu"), device):
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
