"""What an exported ONNX file needs and does: memory, speed, logits."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, CompressError, UsageError
from compress.export.onnx.session import Runner, open_session
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS, WARM = 48, 8  # tokens generated, and of these not counted
PROMPT = 16


@dataclass(frozen=True)
class Loaded:
    """An ONNX file, opened.

    Attributes:
        runner: gives its logits.
        bytes: of graph and constants.
        memory: by how much the process grew while loading, in bytes; None where the system does not say.
    """

    runner: Runner
    bytes: int
    memory: int | None

    def tokens_per_second(self, vocabulary: int) -> float | None:
        """Tokens per second of one sequence that grows token by token; None for a model that does not generate."""
        if not self.runner.decodes:
            return None
        tokens = (torch.arange(PROMPT + STEPS)[None] * 7919) % vocabulary
        _, past = self.runner.step(tokens[:, :PROMPT], None)
        started = 0.0
        for i in range(STEPS):
            if i == WARM:
                started = time.perf_counter()
            _, past = self.runner.step(tokens[:, PROMPT + i : PROMPT + i + 1], past)
        return (STEPS - WARM) / (time.perf_counter() - started)


def open_onnx(path: Path, threads: int = 0) -> Loaded:
    """Open a file, or the one file of a folder.

    Raises:
        UsageError: there is none, or onnxruntime is not installed.
    """
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise UsageError(
            f"{path}: {len(files)} .onnx files; give the one to measure, or the folder that holds it alone"
        )
    try:
        import onnxruntime  # noqa: F401  (counted before, not as memory of the model)
    except ImportError as error:
        raise UsageError("onnxruntime must be installed: pip install compress-pipeline[onnx]") from error
    before = _resident()
    with running(files[0]):
        runner = Runner(open_session(files[0], threads=threads))
    after = _resident()
    size = sum(p.stat().st_size for p in files[0].parent.glob(f"{files[0].name}*"))
    return Loaded(runner, size, None if before is None or after is None else after - before)


@contextmanager
def running(path: Path) -> Iterator[None]:
    """While open, what onnxruntime has against a file is said in one sentence.

    Raises:
        CheckpointError: it cannot be opened or run.
    """
    try:
        yield
    except (CompressError, MemoryError):
        raise
    except Exception as error:  # a damaged graph fails wherever it is first used
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} cannot be run by onnxruntime: {reason}; export it again") from error


def _resident() -> int | None:
    try:
        import resource

        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    except (OSError, ImportError, IndexError, ValueError):
        return None
