"""What a run of several processes agrees on before it begins, and what it keeps its results in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compress.encodings.format import version
from compress.engine.several import SeveralProcesses
from compress.engine.shared_ledger import SharedLedger
from compress.errors import UsageError
from compress.io.keys import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from compress.engine.executor import Executor
    from compress.engine.ledger import FolderLedger, MemoryLedger


def device_for(name: str, executor: Executor) -> str:
    """What a process of a run computes on, where the run is to compute on `name`: a graphics processor of its own.

    Raises:
        UsageError: all were to compute on one.
    """
    if not isinstance(executor, SeveralProcesses) or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise UsageError(f"device {name}: each of several processes takes one of its own; give auto, cuda or cpu")
    return f"cuda:{executor.local}"


def refuse_differing(executor: Executor, facts: Mapping[str, Any]) -> None:
    """Refuse processes that would not do the same work.

    Args:
        executor: of all of them.
        facts: what the result depends on: what it is called -> its value.

    Raises:
        UsageError: names the process and what differs.
    """
    if executor.world == 1:
        return
    own = {
        **facts,
        "version of compress or torch": [version(), torch.__version__],
        "number of threads": torch.get_num_threads(),
        "kind of processor": torch.backends.cpu.get_cpu_capability(),  # which decides how sums are rounded
    }
    first, *others = executor.gathered({name: key_of(value) for name, value in own.items()})
    for rank, other in enumerate(others, start=1):
        differing = [name for name in first if other.get(name) != first[name]]
        if differing:
            raise UsageError(
                f"process {rank} has another {differing[0]} than process 0; every machine needs the same model, data, "
                "pipeline and versions, and as many threads for each process"
            )


def shared(
    executor: Executor, kept: FolderLedger | None, folder: Path, check: Callable[[], None] = lambda: None
) -> MemoryLedger:
    """The ledger of a run.

    Args:
        executor: of the run.
        kept: what process 0 keeps results in; None in every other process.
        folder: where copies may lie of what this process does not see.
        check: raises where what this process reads has changed.
    """
    if isinstance(executor, SeveralProcesses):
        return SharedLedger(executor.exchange, kept, folder, check)
    assert kept is not None
    return kept


__all__ = ["device_for", "refuse_differing", "shared"]
