"""Tasks of lm-evaluation-harness, such as multiple-choice questions, for a model that `compress eval` measures."""

from __future__ import annotations

import difflib
import io
import logging
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from compress.config.words import known
from compress.errors import CompressError, UsageError
from compress.export.refusals import refuse_missing
from compress.logs import LOGGER
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BATCH = 8  # requests at once
SEED = 0  # of the choice of examples that stand before a question


@dataclass(frozen=True)
class Tasks:
    """Which tasks are run.

    Attributes:
        names: of tasks or groups of them.
        manager: of the library, which finds them.
    """

    names: tuple[str, ...]
    manager: Any


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """The tasks of some names, found before a model is loaded.

    Args:
        names: of tasks or groups of them.
        folder: with YAML files of tasks, which alone are then known; by default those that the library brings.

    Raises:
        UsageError: the library is not installed, there is no such folder, or no such task.
    """
    for missing in refuse_missing("lm_eval", "lm-eval"):
        raise UsageError(f"--task: {missing}")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--task-folder {folder}: no such folder")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"--task {name}: no such task; {_near(name, manager.all_tasks)}")
    return Tasks(tuple(names), manager)


def run_tasks(model: Any, tokenizer: Path, tasks: Tasks, device: torch.device) -> dict[str, Any]:
    """Task -> its metrics, and how many samples it has.

    Args:
        model: a language model.
        tokenizer: the folder with its tokenizer.
        tasks: from `find_tasks`.
        device: that computes.

    Raises:
        UsageError: the model writes no text.
        CompressError: a task cannot be run, such as for data that cannot be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if not (isinstance(model, transformers.PreTrainedModel) and model.can_generate()):
        raise UsageError(f"{type(model).__name__} writes no text; leave --task out")
    read = load_tokenizer(tokenizer, "tasks")
    drawn = sys.stderr.isatty() and LOGGER.isEnabledFor(logging.WARNING)  # else the library fills logs with progress
    with nullcontext() if drawn else redirect_stderr(io.StringIO()), torch.no_grad():
        torch.nn.Module.to(model, device)
        wrapped = HFLM(pretrained=model, tokenizer=read, batch_size=BATCH, device=str(device))
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), SEED)
        try:
            found = simple_evaluate(
                wrapped, tasks=list(tasks.names), task_manager=tasks.manager, log_samples=False, **seeds
            )
        except Exception as error:  # tasks are files of whoever wrote them, and fail in as many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CompressError(f"tasks {', '.join(tasks.names)} cannot be run: {reason}") from error
    samples = found["n-samples"]
    return {name: _metrics(each, samples.get(name, {})) for name, each in found["results"].items()}


def _metrics(found: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    """Numbers by their names, without the name of a filter that changes nothing."""
    kept = {name.removesuffix(",none"): value for name, value in found.items() if isinstance(value, float)}
    return {**kept, **({"samples": samples["effective"]} if "effective" in samples else {})}


def _near(name: str, names: Sequence[str]) -> str:
    """The nearest of many names, or all where they are few."""
    if len(names) <= 20:
        return known(name, names)
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"


__all__ = ["Tasks", "find_tasks", "run_tasks"]
