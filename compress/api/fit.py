"""Options of a quantizer for each layer of a model on disk, chosen under a budget of bytes, and the run with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from compress import progress
from compress.api.fit_options import DEFAULT_OPTIONS, budget_of, differing, quantizer_in, suited, with_options
from compress.api.output_folder import work_of
from compress.api.run import run
from compress.api.work import prepare
from compress.calibration.data import numbered_together
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.finite import refuse_non_finite
from compress.config.reading import load_pipeline
from compress.config.runtimes import runtime_named
from compress.config.writing import dump
from compress.encodings.format import WEIGHTS
from compress.engine.fit.choice import Choices, refuse_out_of_reach
from compress.engine.fit.sensitivity import DIVERGENCE_TOKENS, GRADIENT_TOKENS, Groups, Sensitivity, find_losses
from compress.engine.ledger import FolderLedger
from compress.engine.stage import calibration_batches
from compress.errors import CompressError, ConfigError, DataError, Problem, UsageError
from compress.io import lock
from compress.io.atomic import write_text
from compress.io.keys import hash_of, key_of
from compress.models.architecture import has_logits
from compress.planning import plan
from compress.planning.in_memory import refuse_too_large
from compress.planning.overrides import with_overrides
from compress.planning.resources import check_memory
from compress.report.fitted import Fitted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from compress.api import data as given
    from compress.api.fit_options import Budget
    from compress.api.work import Work
    from compress.calibration.data import Dataset
    from compress.config.pipeline import Pipeline
    from compress.engine.fit.sensitivity import Losses
    from compress.passes.base import LinearPass
    from compress.report.report import Report, Row

DEFAULT_PIPELINE = "gptq-w4"
PIPELINE, FITTED = "pipeline.yaml", "fit.json"


@dataclass(frozen=True)
class Fit:
    """What `fit` made.

    Attributes:
        fitted: what was chosen, and what else there was to choose.
        pipeline: file of the pipeline with the choice.
        report: of the run; None where nothing was run.
    """

    fitted: Fitted
    pipeline: Path
    report: Report | None


@undisturbed()
def fit(
    model: str | Path,
    out: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    pipeline: str | Path | Mapping[str, Any] | Pipeline | None = None,
    options: Sequence[str | Mapping[str, Any]] = DEFAULT_OPTIONS,
    groups: Groups | None = None,
    runtime: str | None = None,
    sensitivity: Sensitivity = "fisher",
    work: str | Path | None = None,
    dry_run: bool = False,
    calibration: given.Given | None = None,
    evaluation: given.Given | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    device: str | None = None,
    bars: progress.Bars | None = None,
    on_fit: Callable[[Fitted], None] = lambda fitted: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Fit:
    """Choose the options of a quantizer for each layer under a budget, and run the pipeline with them.

    One sweep over the original model tells what each layer would lose with each option. It is kept in `OUT.fit`, so
    that another budget for the same OUT, or with the same `work`, takes no more than the choice. The choice is written
    there as an ordinary pipeline, `pipeline.yaml`, with everything that there was to choose, `fit.json`.

    Args:
        model: `demo`, a local folder, a hub id, or an adapter.
        out: the folder to write; see `run`.
        size: the largest file of weights, such as "1.2GB" or a number of bytes. What no option changes counts.
        bits: instead of it, the most stored bits for each weight of the layers that are chosen for.
        pipeline: one with a single quantizer that works on one matrix at a time, of which bits and the like are
            chosen, and with the data; by default gptq on the bundled text.
        options: between which is chosen: texts such as "w3g64" for 3 bits and a scale for 64 columns, or mappings of
            options of the quantizer.
        groups: which layers are given the same option: of `site` none, of `fused` those with the same inputs (queries,
            keys and values; gate and up), of `block` all in one. By default `site`, or what the runtime asks for.
        runtime: what is to run the result, such as "vllm": of the default options those with which it computes, groups
            that it multiplies as one matrix, and its container.
        sensitivity: how losses are measured: `kl` by divergences of predictions, `fisher` by gradients of what layers
            put out, `error` by comparing that alone.
        work: the folder of the sweep instead of `OUT.fit`.
        dry_run: choose, and run nothing.
        calibration: as of `run`.
        evaluation: as of `run`.
        overwrite: as of `run`.
        fresh: as of `run`; the sweep is done anew too.
        device: as of `run`.
        bars: as of `run`.
        on_fit: is given what was chosen before it is run.
        on_row: as of `run`.

    Raises:
        UsageError: before any work, for everything that can be known then, a budget that no choice meets among it;
            after the sweep, for one that none meets of layers with the same option.
        GateError, ResourceError, CompressError: while running.

    Example:
        >>> import compress, tempfile
        >>> steps = {"passes": [{"rtn": {"bits": 4}}], "calibration": {"samples": 4, "length": 64}}
        >>> options = {"pipeline": steps, "sensitivity": "error", "dry_run": True}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = compress.fit("demo", f"{folder}/out", bits=3.5, **options)
        >>> made.fitted.chosen.bits <= 3.5
        True
    """
    steps = load_pipeline(_default() if pipeline is None else pipeline)
    if runtime is not None:
        steps, options = suited(steps, runtime, options)
    groups = groups or ("fused" if runtime is not None and runtime_named(runtime).fuses else "site")
    for name, value, known in (("groups", groups, Groups), ("sensitivity", sensitivity, Sensitivity)):
        if value not in get_args(known):
            raise UsageError(f"{name} {value!r}: known are {', '.join(get_args(known))}")
    budget, bars = budget_of(size, bits), bars or progress.Bars()
    passes = with_options(quantizer_in(steps), options)
    first = replace(steps, passes=((next(iter(passes.values())),),))
    found: dict[str, Any] = {"calibration": calibration, "evaluation": evaluation}
    found |= {"overwrite": overwrite, "device": device}
    if steps.calibration is None and calibration is None:
        said = "is missing: fit looks at what layers put out, such as calibration: {source: demo}"
        raise ConfigError([Problem("calibration", said)])
    prepared = prepare(first, model, out, bars=bars, calibrated=True, **found)
    data = prepared.data.calibration
    assert data is not None
    _refuse(prepared, passes, data, sensitivity, budget)
    destination = Path(out).absolute()
    folder = destination.with_name(f"{destination.name}.fit") if work is None else Path(work).absolute()
    if folder in (destination, work_of(destination)):
        raise UsageError(f"{folder} is where the result is written; give the sweep another folder")
    with lock.held(folder):
        losses = _swept(prepared, passes, data, groups, sensitivity, folder, fresh)
        choices = Choices(prepared.opened.artifact, losses, list(passes))
        chosen = choices.within_bits(budget.bits) if budget.bits else choices.within_size(budget.size or 0)
        fitted = Fitted(
            str(model), first.passes[0][0].key, sensitivity, groups, budget.said(),
            choices.point(chosen), choices.uniform(), choices.front(), choices.by_group(), choices.layers(chosen),
        )  # fmt: skip
        made = _fitted_pipeline(prepared.steps, passes, fitted)
        write_text(folder / FITTED, fitted.to_json())
        write_text(folder / PIPELINE, dump(made))
    on_fit(fitted)
    if dry_run:
        return Fit(fitted, folder / PIPELINE, None)
    report = run(made, model, out, fresh=fresh, bars=bars, on_row=on_row, **found)
    _refuse_larger(destination, budget)
    return Fit(fitted, folder / PIPELINE, report)


def _default() -> Pipeline:
    """The pipeline of a quantizer, whatever the widths of its layers."""
    steps = load_pipeline(DEFAULT_PIPELINE)
    ((pass_,),) = steps.passes
    return replace(steps, passes=((replace(pass_, fallback="channel"),),), description="", lines={})  # type: ignore[call-arg]


def _refuse(
    prepared: Work, passes: Mapping[str, LinearPass], data: Dataset, sensitivity: Sensitivity, budget: Budget
) -> None:
    """Refuse what an option cannot do, a measure cannot see, or no choice can meet.

    Raises:
        UsageError: says which.
        ResourceError: not enough memory.
    """
    opened, steps = prepared.opened, prepared.steps
    graph = opened.artifact.graph
    planned = []
    for label, pass_ in passes.items():
        own = replace(steps, passes=((pass_,),), lines={})
        made = plan.make(own, graph, opened.dtypes, f"option {label}", where=prepared.plan.places)
        check_memory(made)
        planned.append(made.stages[0][0].specs)
    refuse_out_of_reach(opened.artifact, planned, size=budget.size, bits=budget.bits)
    if sensitivity == "error":
        return
    if not (graph.is_language_model or graph.is_image_model or has_logits(graph.model)):
        raise UsageError(f"{type(graph.model).__name__} predicts nothing to compare; give sensitivity error")
    if data.named:
        raise DataError(f"sensitivity {sensitivity} takes data with one input for each sample; give error")
    tokens = GRADIENT_TOKENS if sensitivity == "fisher" else DIVERGENCE_TOKENS
    refuse_too_large(graph, min(tokens, data.inputs.numel()), sensitivity == "fisher", prepared.plan.places)


def _refuse_larger(out: Path, budget: Budget) -> None:
    """Say that a result is above the budget after all.

    Raises:
        CompressError: it is.
    """
    written = (out / WEIGHTS).stat().st_size
    if budget.size is not None and written > budget.size:
        raise CompressError(
            f"{out} has {written} bytes of weights, more than the {budget.size} that were allowed: scales of a layer "
            "did not fit float16 once the layers before it were quantized; give a little less"
        )


def _swept(
    prepared: Work,
    passes: Mapping[str, LinearPass],
    data: Dataset,
    groups: Groups,
    sensitivity: Sensitivity,
    folder: Path,
    fresh: bool,
) -> Losses:
    """What each group of layers would lose with each option, from a folder where that is known."""
    if fresh:
        for file in (*folder.glob("s00-*.json"), *folder.glob("s00-*.safetensors")):
            file.unlink()
    watch = prepared.watch()
    ledger = FolderLedger(folder, check=watch.refuse_changed)
    context = prepared.context(ledger)
    (samples,), named = numbered_together(data)
    assert samples is not None
    context = replace(context, named=named)
    facts: list[Any] = [prepared.opened.artifact.source.fingerprint(), hash_of(data)]
    facts += [torch.get_num_threads(), context.seed]
    facts += [str(context.dtype), context.products, prepared.plan.places.name, vars(context.experts)]
    code = ledger.code_of([type(p) for p in passes.values()], [find_losses.__module__])
    with context.devices.scope(), prepared.bars.shown():
        refuse_non_finite(context.artifact, context.dtype, prepared.bars)
        batches = calibration_batches(context, samples)
        key = key_of(*facts, code)
        return find_losses(context, list(passes.values()), samples.inputs, batches, sensitivity, groups, key)


def _fitted_pipeline(steps: Pipeline, passes: Mapping[str, LinearPass], fitted: Fitted) -> Pipeline:
    """The pipeline with what was chosen."""
    options = differing(passes)
    most, overrides = with_overrides({name: options[layer.option] for name, layer in fitted.layers.items()})
    ((pass_,),) = steps.passes
    asked = ", ".join(f"{name} {value:.12g}" for name, value in fitted.budget.items())
    said = f"{pass_.key} fitted to {asked}: {fitted.chosen.bytes} bytes, {fitted.chosen.bits:.4f} bits per weight"
    return replace(steps, passes=((replace(pass_, **most, overrides=overrides),),), description=said)


__all__ = ["Fit", "fit"]
