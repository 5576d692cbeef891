"""`compress.testing`: a pass of one's own that breaks a promise is told which, and a good one passes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import compress.testing
from compress.config.pipeline import METHODS
from compress.encodings import Uniform, fit, quantize
from compress.passes import LinearPass
from compress.passes.base import Edit, Target
from compress.testing import BrokenPromiseError, check_pass, check_runs, check_tensors
from compress.testing.promises import known

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (Path(__file__).parent.parent / "docs" / "writing_a_pass.md").read_text()
options = dataclass(frozen=True, kw_only=True)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@options
class Scaled(LinearPass):
    """Every weight is multiplied.

    Args:
        by: this.
    """

    by: float = 0.5

    key: ClassVar[str] = "scaled"

    def produces(self, kind: str) -> str:
        return kind

    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight * self.by, mask=target.mask)

    def stand_in(self) -> LinearPass:
        return self


@options
class Writes(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight.mul_(self.by).clone(), mask=target.mask)


@options
class Draws(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight + target.weight * torch.rand(target.weight.shape), mask=target.mask)


@options
class Unmasks(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight * self.by)


@options
class Revives(Scaled):
    def run(self, target: Target) -> Edit:
        kept = torch.ones_like(target.weight, dtype=torch.bool)
        return Edit(weight=target.weight, mask=None if target.mask is None else kept)


@options
class Cuts(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight[1:], mask=target.mask)


@options
class Returns(Scaled):
    def run(self, target: Target) -> Edit:
        return target.weight  # type: ignore[return-value]


@options
class Doubles(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=-2 * target.weight, mask=target.mask)


@options
class Mixes(Scaled):
    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight * torch.ones(target.weight.shape, device="cpu"), mask=target.mask)


@options
class Promises(Scaled):
    def produces(self, kind: str) -> str:
        return "quantized"


@options
class Remembers(Scaled):
    seen: ClassVar[list[float]] = []

    def run(self, target: Target) -> Edit:
        self.seen.append(0.0)
        return Edit(weight=target.weight / len(self.seen), mask=target.mask)


@options
class Fails(Scaled):
    def stand_in(self) -> LinearPass:
        return Kept(by=self.by)


@options
class Kept(Scaled):
    @property
    def needs(self) -> Any:
        return "gram"


@options
class Rows(Scaled):
    @property
    def rowwise(self) -> bool:
        return True

    def run(self, target: Target) -> Edit:
        return Edit(weight=target.weight / target.weight.abs().max(), mask=target.mask)


@options
class Codes(Scaled):
    def produces(self, kind: str) -> str:
        return "quantized" if kind == "dense" else "sparse-quantized"

    def run(self, target: Target) -> Edit:
        scale, zero = fit(target.weight, 4)
        codes = quantize(target.weight, scale, zero, 4)
        return Edit(mask=target.mask, encoding=Uniform(codes, scale, zero, 4, symmetric=False))


@options
class Undescribed(Scaled):
    """Nothing is said of `and_by`."""

    and_by: float = 1.0


def test_a_pass_that_keeps_its_promises_passes_and_is_forgotten_again() -> None:
    check_pass(Scaled())
    assert "scaled" not in METHODS


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Writes, r"it changes the tensors that it is given"),
        (Draws, r"it makes something else the second time"),
        (Unmasks, r"zeros that were already there have come back"),
        (Revives, r"zeros that were already there have come back"),
        (Cuts, r"new values of shape \(7, 48\), not \(8, 48\)"),
        (Returns, r"it returned a Tensor, and should an Edit"),
        (Doubles, r"its relative error is 3"),
        (Mixes, r"is given tensors of two devices: make new tensors like those"),
        (Promises, r"`produces` says dense becomes quantized, and it becomes dense"),
        (Remembers, r"it makes something else the second time"),
        (Fails, r"its stand-in needs gram of inputs"),
        (Rows, r"rows come out otherwise when others stand above them"),
        (Undescribed, r"its option and_by is not described under `Args:`"),
    ],
)
def test_a_broken_promise_is_named_with_the_line_of_the_class(kind: type[Scaled], said: str) -> None:
    Remembers.seen.clear()
    with known(kind), pytest.raises(BrokenPromiseError, match=said) as raised:
        check_tensors(kind())
    assert re.search(rf"{re.escape(__file__)}:\d+$", str(raised.value))
    assert isinstance(raised.value, AssertionError)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Codes, "say in `form` what its codes are like"),
        (Draws, "an interrupted run makes another compress.safetensors"),
    ],
)
def test_a_promise_about_whole_runs_that_is_broken_is_named(kind: type[Scaled], said: str) -> None:
    with known(kind), pytest.raises(BrokenPromiseError, match=said):
        check_runs(kind())


def test_the_test_of_the_page_passes_with_the_pass_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "powers_of_two.py").write_text(BLOCKS[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "powers_of_two", raising=False)
    found: dict[str, Any] = {}
    exec(compile(BLOCKS[1], "writing_a_pass.md", "exec"), found)
    found["test_it_keeps_what_every_pass_promises"]()
    assert sys.modules.pop("powers_of_two").__file__ == str(tmp_path / "powers_of_two.py")


def test_pytest_is_not_needed() -> None:
    files = list(Path(compress.testing.__file__).parent.glob("*.py"))
    assert len(files) > 5
    assert not [file.name for file in files if "import pytest" in file.read_text()]
