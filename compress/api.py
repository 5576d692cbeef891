"""The two entry points: `run` for a pipeline file and a model on disk, `apply` for passes and a module in memory."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import given, hub, manager, merging, meter, plan, progress, report, resources
from compress import graph as graphs
from compress.artifact import Artifact, open_folder
from compress.calibration import collect
from compress.calibration.precision import Products
from compress.deltas.file import DELTA, Delta
from compress.deltas.source import with_delta
from compress.destination import refuse
from compress.encodings import Weight
from compress.errors import CompressError, ConfigError, NonFiniteError, UsageError
from compress.evaluate import logits_in
from compress.export import safetensors
from compress.export.files import compare_tensors
from compress.export.packed import open_packed
from compress.exporting import write_all
from compress.graph import forward
from compress.ledger import FolderLedger, MemoryLedger, key_of, publish, write_text, writing
from compress.passes import DeltaPass, Pass
from compress.pipeline import GATES, Calibration, Evaluation, Pipeline, dump, load, mistakes
from compress.report import Report
from compress.residence import Context, MadeDelta, streamed
from compress.runtime.register import WEIGHTS
from compress.sources import ModuleSource

LOGITS_TOLERANCE = 0.0  # packed and in-memory results multiply the same numbers in the same order


def version() -> str:
    """Of this package."""
    try:
        return installed_version("compress-pipeline")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Result:
    """What `apply` made.

    Attributes:
        model: the compressed module; its weights are the dequantized ones, and it rounds inputs that are quantized.
        weights: site name -> what is stored: codes, mask, values.
        report: sizes, errors and, with evaluation data, perplexity or accuracy after every pass.
    """

    model: nn.Module
    weights: dict[str, Weight]
    report: Report


def apply(
    model: nn.Module,
    passes: Sequence[Pass | Sequence[Pass]],
    calibration: given.Given | None = None,
    *,
    evaluation: given.Given | None = None,
    max_increase: float | None = None,
    max_drop: float | None = None,
    seed: int = 0,
    inplace: bool = False,
    store_dtype: torch.dtype | None = None,
    products: Products = "bfloat16",
) -> Result:
    """Run passes over a module in memory.

    Args:
        model: a transformers causal language model or image classifier, or any module with Linear or Conv2d layers.
        passes: in order; a nested list is fused block by block, as `blockwise:` in a pipeline file.
        calibration: (samples, length) int64 token ids for a language model, else inputs (samples, ...), or those and
            (samples,) integer labels; from several sources, a mapping of their names to such data.
        evaluation: (windows, length) token ids of a language model, to measure perplexity and KL after every pass; of
            a classifier, its inputs and (samples,) integer labels, to measure accuracy and KL; from several sources, a
            mapping of their names to such data.
        max_increase: the gate: largest relative increase of perplexity.
        max_drop: the gate of a classifier: largest fall of accuracy, 0.01 for one point.
        seed: of every random choice.
        inplace: change `model` itself instead of a copy.
        store_dtype: the type that changed dense weights are kept in; None keeps each parameter's own. A model loaded in
            float32 from a bfloat16 file gives the command line's numbers with torch.bfloat16.
        products: how float32 matrices are multiplied while calibrating: `bfloat16` rounds the factors, `float32` does
            not and is several times slower on processors that have both.

    Returns:
        The compressed module and what is stored of every weight.

    Raises:
        ConfigError: impossible options or orders.
        DataError: calibration missing or of the wrong kind.
        GateError: the gate was not met.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=8, length=128)
        >>> result = compress.apply(model, [compress.Wanda(sparsity="2:4"), compress.Gptq(bits=4)], calibration=tokens)
        >>> round(result.report.rows[-1].sparsity, 2)
        0.5
    """
    stages = tuple(tuple(p) if isinstance(p, Sequence) else (p,) for p in passes)
    model = (model if inplace else copy.deepcopy(model)).eval()
    graph = graphs.find(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, dtype), given.dataset(graph, "evaluation", evaluation, dtype)
    )
    gates = {"max_increase": max_increase, "max_drop": max_drop}
    pipeline = Pipeline(
        passes=stages,
        calibration=given.described(Calibration, data.calibration, {}),
        evaluate=given.described(Evaluation, data.evaluation, gates),
        seed=seed,
        products=products,
    )
    problems = mistakes(pipeline)
    if problems:
        raise ConfigError(problems, "apply")
    source = _Stored(model, store_dtype)
    artifact = Artifact(graph, source, dict(graph.tied))
    dtypes = {name: tensor.dtype for name, tensor in graph.tensors()}
    made = plan.make(pipeline, graph, dtypes)
    merging.check(pipeline, artifact, "apply")
    merging.check_data(pipeline, data.calibration, graph, "apply")
    context = Context(artifact, MemoryLedger(), seed, dtype, products, resident=True, bars=progress.Bars())
    measured = manager.execute(pipeline, made, context, data, type(model).__name__)
    weights = {name: w for name, w in context.artifact.committed.items() if isinstance(w, Weight)}
    for name, weight in weights.items():
        if weight.inputs is not None:
            collect.quantize_inputs(model.get_submodule(name), weight.inputs.apply)
    return Result(model, weights, measured)


class _Stored(ModuleSource):
    """A module's values, with changed ones kept in a type of choice."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None):
        super().__init__(module)
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or super().dtype(name)


def run(
    pipeline: "str | Path | Mapping[str, Any] | Pipeline",
    model: "str | Path",
    out: "str | Path",
    *,
    calibration: given.Given | None = None,
    evaluation: given.Given | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    bars: progress.Bars | None = None,
) -> Report:
    """Run a pipeline on a model on disk and write the compressed folder.

    Killed at any moment, the same call continues and ends bit-identical. The unfinished state is kept in `OUT.work`.

    Args:
        pipeline: a YAML file, or a mapping of the same shape.
        model: `demo`, a local folder or a hub id.
        out: the folder to write; must not exist unless it is this very run's result.
        calibration: (samples, length) token ids, or images, instead of the pipeline's source.
        evaluation: the same, for measuring; of an image model, (images, labels).
        overwrite: replace an existing `out`.
        fresh: forget what an interrupted run had finished.
        bars: progress; silent by default.

    Returns:
        The report, also written as OUT/report.json.

    Raises:
        UsageError: before any work, for everything that can be known then.
        GateError, ResourceError, CompressError: while running.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", f"{folder}/out")
        >>> report.rows[-1].name
        'rtn'
    """
    steps = load(pipeline)
    destination, bars = Path(out).absolute(), bars or progress.Bars()
    work = destination.parent / f"{destination.name}.work"
    opened = open_model(model)
    refuse(destination, opened.folder, overwrite)
    graph = opened.artifact.graph
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, _dtype(steps, opened)),
        given.dataset(graph, "evaluation", evaluation, _dtype(steps, opened)),
    )
    steps = _with_given(steps, data)
    file = str(pipeline) if isinstance(pipeline, str | Path) else "pipeline"
    made = plan.make(steps, graph, opened.dtypes, file)
    merged = merging.check(steps, opened.artifact, file)
    resolved = dump(steps)
    with bars.shown():
        data = _data(steps, opened, data, bars)
    merging.check_data(steps, data.calibration, graph, file)
    hashes = [meter.hash_of(each) for each in (data.calibration, data.evaluation)]
    identity = key_of(opened.artifact.source.fingerprint(), resolved, hashes, *merged)
    finished = _finished(destination, identity, steps)
    if finished and not (overwrite or fresh):
        shutil.rmtree(work, ignore_errors=True)
        return finished
    if destination.exists() and not overwrite:
        raise UsageError(f"{out} exists and is not the result of this run; choose another -o, or give --overwrite")
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    resources.check(made, destination)
    _refuse_non_finite(opened.artifact)
    dtype = _dtype(steps, opened)
    context = Context(opened.artifact, FolderLedger(work), steps.seed, dtype, steps.products, resident=False, bars=bars)
    with bars.shown():
        measured = manager.execute(steps, made, context, data, str(model))
        _export(context, opened, steps, measured, data, work / "out", destination, identity, resolved)
    shutil.rmtree(work, ignore_errors=True)
    return measured


def _refuse_non_finite(artifact: Artifact) -> None:
    """NaN or infinity in a tensor that no pass looks at: embeddings, norms, biases."""
    sites = {s.parameter for s in artifact.graph.sites if s.block is not None}
    for name, _ in artifact.graph.tensors():
        if name not in sites:
            value = artifact.source.read(artifact.name_in_source(name))
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NonFiniteError(f"{name} holds NaN or infinity in the source; get a clean checkpoint")


@dataclass(frozen=True)
class Opened:
    """A model folder, matched with its structure."""

    folder: Path
    config: Any
    artifact: Artifact

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Parameter or buffer name -> stored type."""
        a = self.artifact
        return {n: a.source.dtype(a.name_in_source(n)) for n, _ in a.graph.tensors()}


def open_model(model: "str | Path") -> Opened:
    """Resolve, check and match a model; reads headers, no weight."""
    folder = hub.resolve(model)
    config = graphs.read_config(folder)
    hub.refuse_quantized(folder, config)
    graph = graphs.find(graphs.build(config))
    return Opened(folder, config, open_folder(folder, graph))


def _dtype(steps: Pipeline, opened: Opened) -> torch.dtype:
    if steps.dtype != "auto":
        chosen: torch.dtype = getattr(torch, steps.dtype)
        return chosen
    configured = getattr(opened.config, "dtype", None)
    return configured if isinstance(configured, torch.dtype) else torch.float32


def _with_given(steps: Pipeline, data: manager.Data) -> Pipeline:
    calibration = given.described(Calibration, data.calibration, {})
    kept = {name: getattr(steps.evaluate, name) for name in (*GATES, "after")} if steps.evaluate else {}
    evaluation = given.described(Evaluation, data.evaluation, kept)
    return replace(steps, calibration=calibration or steps.calibration, evaluate=evaluation or steps.evaluate)


def _data(steps: Pipeline, opened: Opened, data: manager.Data, bars: progress.Bars) -> manager.Data:
    """Read what the pipeline names; given data win."""
    calibration, evaluation = data.calibration, data.evaluation
    graph, dtype = opened.artifact.graph, _dtype(steps, opened)
    needed = any(p.calibrated for stage in steps.passes for p in stage)
    if calibration is None and needed and steps.calibration:
        found = given.read(steps.calibration, opened.folder, "calibration", bars.over)
        calibration = given.checked(graph, "calibration", found, dtype)
    if evaluation is None and steps.evaluate:
        found = given.read(steps.evaluate, opened.folder, "evaluation", bars.over)
        evaluation = given.checked(graph, "evaluation", found, dtype)
    return manager.Data(calibration if needed else None, evaluation)


def _finished(destination: Path, identity: str, steps: Pipeline) -> Report | None:
    """The report of a whole folder that this very run wrote earlier."""
    try:
        data = json.loads((destination / "report.json").read_text())
        same = data["verified"]["run"] == identity
        rows = [report.Row(**row) for row in data.pop("rows")]
        needed = [WEIGHTS, "config.json", "pipeline.yaml"]
        needed += [f"{exporter.key}/{file}" for exporter in steps.export for file in exporter.files]
        needed += [f"delta/{DELTA}" for stage in steps.passes for pass_ in stage if isinstance(pass_, DeltaPass)]
        whole = all((destination / name).is_file() for name in needed)
        return Report(rows=rows, **data) if same and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _export(
    context: Context,
    opened: Opened,
    steps: Pipeline,
    measured: Report,
    data: manager.Data,
    partial: Path,
    destination: Path,
    identity: str,
    resolved: str,
) -> None:
    """Write beside the final name, read back, compare, then rename."""
    shutil.rmtree(partial, ignore_errors=True)
    config = json.loads((opened.folder / "config.json").read_text())
    safetensors.write(context.artifact, partial, config, opened.folder, version(), context.bars)
    compared = safetensors.verify(context.artifact, partial, context.bars)
    measured.verified = {"run": identity, "tensors_equal": compared}
    if data.evaluation is not None:
        measured.verified["max_logit_difference"] = _logit_difference(context, partial, data.evaluation.inputs[:2])
    if steps.export:
        made = open_packed(partial, context.dtype)
        measured.verified |= write_all(made, steps.export, destination, data.evaluation, context.bars)
    if context.delta is not None:
        measured.verified["delta"] = {"tensors_equal": _put_delta(context.delta, partial / "delta", context)}
    write_text(partial / "pipeline.yaml", resolved)
    write_text(partial / "report.json", measured.to_json())
    write_text(partial / "README.md", report.card(measured, resolved, graphs.loader(opened.config).__name__))
    publish(partial / WEIGHTS, partial / WEIGHTS)
    if destination.exists():
        shutil.rmtree(destination)
    partial.rename(destination)


def _put_delta(made: MadeDelta, folder: Path, context: Context) -> int:
    """Copy the delta into the result, open it there, and compare what it makes of the base with the merged checkpoint.

    Returns:
        How many tensors were compared.
    """
    folder.mkdir()
    with writing(folder / DELTA):
        shutil.copyfile(made.file, folder / DELTA)
    model = with_delta(context.given, Delta.open(folder / DELTA))
    layout, read = list(safetensors.entries(model)), partial(safetensors.stored_tensors, model)
    compared = compare_tensors(layout, read, made.merged, context.bars, "delta")
    publish(folder / DELTA, folder / DELTA)
    return compared


def _logit_difference(context: Context, folder: Path, inputs: Tensor) -> float:
    """Largest difference of the packed model's logits from the in-memory result's; more than none is an error."""
    loaded = hub.load(folder, context.dtype)
    with torch.no_grad():
        there = logits_in(forward(replace(context.graph, model=loaded), inputs))
        with streamed(context):
            here = logits_in(forward(context.graph, inputs))
    difference = float((there - here).abs().max())
    if not difference <= LOGITS_TOLERANCE:
        raise CompressError(f"the written model's logits differ by {difference:.3g} from the in-memory result's")
    return difference
