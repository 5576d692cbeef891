"""What every pass promises about a whole run: it is planned, goes on where it stopped, and its result loads."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compress.api.run import carry_out
from compress.api.work import prepare
from compress.config.pipeline import Pipeline
from compress.engine.ledger import FolderLedger
from compress.logs import LOGGER
from compress.passes import DepthPass, ExpertsPass, Magnitude, MergePass, Rtn
from compress.progress import Bars
from compress.testing.broken import demand
from compress.testing.promises import OTHER_SEED

if TYPE_CHECKING:
    from compress.engine.ledger import Record
    from compress.passes import Pass
    from compress.report.report import Report

VOCABULARY = 128
BLOCKS = 2
MOST_BLOCKS = 4  # of a model that blocks are taken out of
LARGEST_DIFFERENCE = 1e-3  # of logits that are read back
LARGEST_SURPRISE = 0.1  # of the bytes that were planned
VARYING = ("report.json", "manifest.json", "README.md")  # name seconds and memory


class _Interrupted(BaseException):
    """The run was ended from outside; no pass can catch it."""


class _Interrupting(FolderLedger):
    """Ends the run when the first unit of its last stage is finished."""

    last: str

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        found = super().commit(unit, key, records)
        self._end(unit)
        return found

    def commit_row(self, unit: str, key: str, row: Any) -> None:
        super().commit_row(unit, key, row)
        self._end(unit)

    def _end(self, unit: str) -> None:
        if unit.startswith(self.last):
            raise _Interrupted


@dataclass(frozen=True)
class Ran:
    """A finished run."""

    folder: Path
    report: Report
    planned_bytes: int


def check_runs(pass_: Pass, model: str | Path | None = None) -> None:
    """Run a pass on a model: planned, interrupted, resumed, read back.

    Args:
        pass_: with its options.
        model: a folder; by default a tiny random one is made.

    Raises:
        BrokenPromiseError: a promise is not kept.
        UsageError: the pass cannot work on the model; give one that it can work on.
    """
    with tempfile.TemporaryDirectory(prefix="compress-") as name:
        here = Path(name)
        folder = _tiny_model(here / "model", pass_) if model is None else Path(model)
        if isinstance(pass_, MergePass) and model is None:
            pass_ = _with_models(pass_, here)
        steps = Pipeline(passes=(*_before(pass_), (pass_,)))
        torch.manual_seed(0)
        whole = _run(steps, folder, here / "whole")
        _planned(whole)
        torch.manual_seed(OTHER_SEED)
        _goes_on(steps, folder, here / "again", whole)
        _loads(whole)


def _run(steps: Pipeline, model: Path, out: Path, interrupted: bool = False) -> Ran:
    """One run from beginning to end, or until the first unit of the last pass."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(VOCABULARY, (count, 16), generator=generator) for count in (4, 2)]
    work = prepare(steps, model, out, calibration=data[0], evaluation=data[1], device="cpu", bars=Bars(drawn=False))
    ledger: type[FolderLedger] = FolderLedger
    if interrupted:
        ledger = type("_Ended", (_Interrupting,), {"last": f"s{len(steps.passes) - 1:02d}"})
    return Ran(out, carry_out(work, out, make_ledger=ledger), work.plan.final_bytes)


def _planned(ran: Ran) -> None:
    """Refuse a result of another size than was planned."""
    made, planned = ran.report.rows[-1].bytes, ran.planned_bytes
    said = f"`plan` says {planned} bytes of weights, and the result has {made}: say in `form` what its codes are like"
    demand(abs(made - planned) <= LARGEST_SURPRISE * planned, said)


def _goes_on(steps: Pipeline, model: Path, out: Path, whole: Ran) -> None:
    """Refuse a run that is not the same when it was interrupted, or when the global generator was another."""
    LOGGER.debug("interrupting %s", steps.passes[-1][0].key)
    try:
        _run(steps, model, out, interrupted=True)
        demand(False, "its run finishes nothing that could be kept")
    except _Interrupted:
        pass
    again = _run(steps, model, out)
    for file in sorted(whole.folder.iterdir()):
        same = file.name in VARYING or file.read_bytes() == (again.folder / file.name).read_bytes()
        demand(
            same, f"an interrupted run makes another {file.name}: draw random numbers from the generator that is given"
        )


def _loads(ran: Ran) -> None:
    """Refuse a result that transformers does not load, or that computes something else when it is read back."""
    difference = ran.report.verified.get("max_logit_difference", 0.0)
    said = f"logits differ by {difference:.3g} when the result is read back"
    demand(difference is None or difference <= LARGEST_DIFFERENCE, said)
    loaded = AutoModelForCausalLM.from_pretrained(ran.folder).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(8)[None]).logits
    demand(bool(torch.isfinite(logits).all()), "the result that is loaded puts out NaN or infinity")


def _tiny_model(folder: Path, pass_: Pass) -> Path:
    """A random model that a pass of its kind can work on."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
        "num_hidden_layers": MOST_BLOCKS if isinstance(pass_, DepthPass) else BLOCKS,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(pass_, ExpertsPass):
            made: Any = MixtralForCausalLM(MixtralConfig(**options, num_local_experts=4, num_experts_per_tok=2))
        else:
            made = LlamaForCausalLM(LlamaConfig(**options))
    made.save_pretrained(folder)
    return folder


def _with_models(pass_: MergePass, here: Path) -> MergePass:
    """A merge with as many models that are there."""
    folders = []
    for number in range(len(pass_.models)):
        model = AutoModelForCausalLM.from_pretrained(here / "model")
        generator = torch.Generator().manual_seed(number + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(here / f"other-{number}")
        folders.append(str(here / f"other-{number}"))
    return dataclasses.replace(pass_, models=tuple(folders))


def _before(pass_: Pass) -> tuple[tuple[Pass, ...], ...]:
    """What must come before a pass that does not take dense weights."""
    if "dense" in pass_.accepts:
        return ()
    if "sparse" in pass_.accepts:
        return ((Magnitude(sparsity=0.5),),)
    return ((Rtn(bits=4, group_size=32),),)


__all__ = ["check_runs"]
