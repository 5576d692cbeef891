"""What `apply` made, written as the folder that a run writes: packed, with its report and its pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from compress import progress
from compress.api.output_folder import RESULT, clear_result, publish_folder, refuse_destination, working_for
from compress.checkpoint import packed_layout
from compress.config.writing import dump
from compress.encodings.format import version
from compress.errors import UsageError
from compress.io.atomic import write_text

if TYPE_CHECKING:
    from compress.config.pipeline import Pipeline
    from compress.engine.context import Context
    from compress.report.report import Report


@dataclass(frozen=True)
class Made:
    """What a folder is written of.

    Attributes:
        pipeline: that was run.
        context: behind the last stage.
    """

    pipeline: Pipeline
    context: Context


def save(made: Made, report: Report, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a packed folder, read it back and compare.

    Args:
        made: by `apply`.
        report: of the run.
        folder: to write; must not exist.
        tokenizer: of transformers, or a processor, that is saved beside the weights.

    Raises:
        UsageError: the folder exists, or the model is none of transformers.
        CheckpointError, CompressError: what was written reads back differently.
    """
    model: Any = made.context.graph.model
    destination = Path(folder).absolute()
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is no model of transformers, which loads a folder by its configuration; keep what "
            "`weights` holds, with compress.encodings.pack"
        )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UsageError(f"tokenizer must be one of transformers; got {type(tokenizer).__name__}")
    if destination.exists():
        raise UsageError(f"{destination} exists; give another folder")
    refuse_destination(destination, {}, overwrite=False)
    artifact, bars = made.context.artifact, progress.Bars()
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    settings["dtype"] = str(made.context.dtype).removeprefix("torch.")
    with working_for(destination) as work, clear_result(work), bars.shown():
        written = work / RESULT
        packed_layout.write_packed(artifact, written, settings, None, version(), bars)
        packed_layout.verify(artifact, written, bars)
        write_text(written / "pipeline.yaml", dump(made.pipeline))
        write_text(written / "report.json", report.to_json())
        if model.can_generate():
            model.generation_config.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        publish_folder(written, destination)


__all__ = ["Made", "save"]
