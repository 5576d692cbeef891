"""`compress eval`: a finished model, whatever runs it, measured on data that is read by its tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.api import data as given
from compress.api.output_folder import refuse_changed
from compress.api.tasks import find_tasks, run_tasks
from compress.api.together import device_for, refuse_differing
from compress.calibration.metrics import evaluate, measure, pooled
from compress.calibration.reference import Reference
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.opening import load_measured, load_merged, measured_in, open_folder
from compress.engine.executor import SingleProcess
from compress.errors import DataError, UsageError
from compress.io.keys import digest_of_file, hash_of
from compress.models import adapters, loading
from compress.models.logits import logits_in, logits_of, rows_at_once
from compress.planning.places import chosen_device, device_name
from compress.progress import Bars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.api.tasks import Tasks
    from compress.calibration.data import Dataset
    from compress.calibration.metrics import Quality
    from compress.config.pipeline import Evaluation
    from compress.engine.executor import Executor
    from compress.export.onnx.session import Runner

Runtime = Literal["transformers", "onnxruntime"]


@undisturbed()
def measure_model(
    model: str,
    section: Evaluation,
    *,
    against: str | None = None,
    runtime: Runtime = "transformers",
    threads: int = 0,
    device: str | None = None,
    executor: Executor | None = None,
    bars: Bars | None = None,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
) -> dict[str, Any]:
    """Quality and size; of an ONNX file also its speed and the memory that loading it takes.

    Args:
        model: `demo`, a folder, a hub id or an adapter; for onnxruntime a folder with one .onnx file, or that file.
        section: the data.
        against: the original, for the divergence.
        runtime: what runs the model.
        threads: of onnxruntime; 0 for its own choice.
        device: what transformers computes on: `auto`, which None stands for, `cpu`, `cuda`, `cuda:1`.
        executor: how several processes share the batches, each of which calls this; one does it alone by default.
        bars: progress; by default, bars where stderr is a terminal.
        tasks: names of tasks of lm-evaluation-harness to run as well, on the original too where there is one.
        task_folder: with YAML files of tasks, which alone are then known.

    Raises:
        UsageError: no such model or task, or a runtime or library that is not installed.
        CheckpointError: a folder whose files are not what its manifest says.
        DataError: nothing that can be read.
    """
    bars, executor = bars or Bars(), executor or SingleProcess()
    if runtime == "onnxruntime" and executor.world > 1:
        raise UsageError("onnxruntime is measured by one process; start it without torchrun")
    if runtime == "onnxruntime" and device is not None:
        raise UsageError("device chooses what transformers computes on; onnxruntime computes on the processor")
    if task_folder is not None and not tasks:
        raise UsageError("--task-folder holds tasks, and none is named; give --task")
    if tasks and (runtime == "onnxruntime" or executor.world > 1):
        raise UsageError("--task is for one process that runs transformers; start it without torchrun and --runtime")
    asked = find_tasks(tasks, task_folder) if tasks else None
    with bars.shown():
        if runtime == "onnxruntime":
            return _onnx(Path(model), section, against, threads, bars)
        where = chosen_device(device_for(device or "auto", executor))
        return _torch(model, section, against, where, executor, bars, asked)


def _torch(
    model: str,
    section: Evaluation,
    against: str | None,
    device: torch.device,
    executor: Executor,
    bars: Bars,
    tasks: Tasks | None,
) -> dict[str, Any]:
    found = adapters.locate(model)
    for folder in found.folders:
        refuse_changed(folder)
    opened = None if found.adapter is None else open_folder(found.folder, found.adapter)
    tokenizer = found.folder if opened is None else opened.tokenizer
    dtype = measured_in(found.folder) if opened is None else opened.dtype
    reader = given.reader_of(section, tokenizer, found.folder)
    data = given.read_data(section, reader, "evaluation", bars.over)
    described = [found.folder / "config.json", *([] if found.adapter is None else [found.adapter / adapters.CONFIG])]
    refuse_differing(executor, {"model": [digest_of_file(file) for file in described], "data": hash_of(data)})
    loaded = loading.load_model(found.folder, dtype) if opened is None else load_merged(opened)
    original = load_measured(against) if against else None
    matched = given.matched(loaded, given.with_masks(loaded, data, tokenizer))
    shown = _progress(bars)
    options: dict[str, Any] = {"against": original, "device": device, "progress": shown, "together": executor}
    parts = {name: evaluate(loaded, part, **options) for name, part in matched.split().items()}
    weights = sum(f.stat().st_size for folder in found.folders for f in folder.glob("*.safetensors"))
    answer = {"model": model, **_result(parts, section, data), "bytes": weights, "device": device_name(device)}
    if tasks is not None:
        measured = {"tasks": loaded, **({} if original is None else {"tasks_of_original": original})}
        answer |= {name: run_tasks(each, tokenizer, tasks, device) for name, each in measured.items()}
    return answer


def _progress(bars: Bars) -> Callable[[Iterable[Tensor], int], Iterator[Tensor]]:
    return lambda batches, total: bars.over(batches, total, "evaluate: batches", "end")


def _onnx(path: Path, section: Evaluation, against: str | None, threads: int, bars: Bars) -> dict[str, Any]:
    from compress.export.onnx.measure import open_onnx, running

    if not path.exists():
        raise UsageError(f"no such file or folder: {path}; --runtime onnxruntime takes what `export: [onnx]` wrote")
    folder = path if path.is_dir() else path.parent
    refuse_changed(folder)
    tokenizer = folder if (folder / "tokenizer.json").is_file() else folder.parent
    data = given.read_data(section, given.reader_of(section, tokenizer), "evaluation", bars.over)
    inputs, labels = data.inputs, data.labels
    opened = open_onnx(path, threads)
    if data.named or (labels is None) != ("input_ids" in opened.runner.inputs):
        wanted = "text" if "input_ids" in opened.runner.inputs else "images with labels"
        raise DataError(f"{section.source}: {path} takes {wanted}")
    original = None if against is None else _logits(load_measured(against, torch.float32), labels is None)
    with running(path):
        parts = {name: _compared(opened.runner, part, original, bars) for name, part in data.split().items()}
        speed = opened.tokens_per_second(int(inputs.max()) + 1) if labels is None else None
    found = {"model": str(path), **_result(parts, section, data), "bytes": opened.bytes, "load_memory": opened.memory}
    if labels is None:
        found["tokens_per_second"] = speed
    return found


def _compared(runner: Runner, data: Dataset, original: Callable[[Tensor], Any] | None, bars: Bars) -> Quality:
    """Quality of an ONNX file on one source, and its divergence from the original."""
    reference = None
    if original is not None:
        reference = Reference()
        measure(original, data.inputs, labels=data.labels, reference=reference, keep=True, progress=_progress(bars))
    logits = partial(_onnx_logits, runner)
    return measure(logits, data.inputs, labels=data.labels, reference=reference, progress=_progress(bars))


def _logits(model: Any, tokens: bool) -> Callable[[Tensor], Tensor | Iterator[Tensor]]:
    if tokens:
        return lambda batch: logits_of(model, lambda: model(input_ids=batch, use_cache=False), batch)
    return lambda batch: logits_in(model(batch.float())).float()


def _onnx_logits(runner: Runner, batch: Tensor) -> Tensor | Iterator[Tensor]:
    """Logits of an ONNX file, which computes those of whole windows: of as many as are not too large."""
    rows = rows_at_once(len(batch), runner.width * batch[0].numel())
    if "input_ids" not in runner.inputs or rows == len(batch):
        return runner(batch)
    return (runner(part)[:, :-1].flatten(0, 1) for part in torch.split(batch, rows))


def _result(parts: Mapping[str, Quality], section: Evaluation, data: Dataset) -> dict[str, Any]:
    """What was measured, of all sources together and, where they have names, of each."""
    quality = pooled(list(parts.values()))
    found = {**_figures(quality), "source": section.source}
    if len(parts) > 1:
        found["sources"] = {name: _figures(each) for name, each in parts.items()}
    if quality.perplexity is not None and not data.named:
        windows = quality.tokens // (section.length - 1)
        found |= {"windows": windows, "length": section.length, "protocol": section.protocol}
    elif quality.perplexity is not None:
        found["samples"] = len(data)
    return found


def _figures(quality: Quality) -> dict[str, Any]:
    kl = {"kl": quality.kl, "kl_tokens": quality.kl_tokens}
    if quality.accuracy is not None:
        return {"accuracy": quality.accuracy, "samples": quality.tokens, **kl}
    if quality.perplexity is None:
        return {"relative_error": quality.relative_error, "cosine": quality.cosine, "samples": quality.tokens, **kl}
    return {"perplexity": quality.perplexity, "tokens": quality.tokens, **kl}
