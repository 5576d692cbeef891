"""A command in several processes, as `torchrun` starts them: who of them says what, and how all of them end.

Process 0 says all there is to say. An error is said once, by the process that fails first; the others end without a
word, with its exit code. Every process watches process 0, and process 0 all others: one that was killed is missed at
once, whatever the others are doing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from compress.cli.interrupts import Stopped
from compress.errors import PeerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from compress.cli.interrupts import Interrupts
    from compress.engine.executor import Executor

TOGETHER = ("run", "quantize", "prune", "merge", "eval")  # the commands that several processes share
MEETING = timedelta(minutes=10)  # until all processes are there
WORKING = timedelta(days=30)  # until one answers the others; whether it is alive is seen at once
GRACE = 5.0  # seconds in which a process that was told to end does so
PATIENCE = 1.0  # seconds in which a process that goes says so


@dataclass(frozen=True)
class Place:
    """Which of several processes this one is.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: its number among those of its machine.
    """

    rank: int
    world: int
    local: int


def are_shared(words: Sequence[str]) -> bool:
    """Whether a command line is one that several processes share."""
    first = next((word for word in words if not word.startswith("-")), "")
    return first in TOGETHER and not {"-h", "--help"} & set(words)


def place() -> Place | None:
    """Which process this is, as the environment says; None where it is alone.

    Raises:
        UsageError: what the environment says is incomplete.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return None
        found = Place(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
        if not 0 <= found.rank < world or not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
            raise ValueError
    except (KeyError, ValueError) as error:
        raise UsageError(
            "WORLD_SIZE is set, but RANK, MASTER_ADDR or MASTER_PORT is not or does not fit: start several processes "
            "with torchrun, or unset WORLD_SIZE"
        ) from error
    return found


def executor() -> Executor | None:
    """Shares the work among the processes that have met; None where this one is alone."""
    here = place()
    if here is None:
        return None
    from compress.engine.exchange import Exchange
    from compress.engine.several import SeveralProcesses

    return SeveralProcesses(Exchange.here(), here.local)


def refuse_alone(command: str | None) -> None:
    """Refuse several processes for a command that they would all do.

    Raises:
        UsageError: says how to start it.
        SystemExit: process 0 says it.
    """
    here = place() if command not in (None, *TOGETHER) else None
    if here is not None and here.rank:
        raise SystemExit(2)
    if here is not None:
        raise UsageError(f"`compress {command}` is done by one process; start it without torchrun, or unset WORLD_SIZE")


def shared(command: Callable[[], Any], here: Place, interrupts: Interrupts) -> Any:
    """Run a command in this process and the others.

    Args:
        command: what all of them run.
        here: which of them this is.
        interrupts: through which the end of another one reaches the main thread.

    Returns:
        What the command returns.

    Raises:
        SystemExit: another process has failed, and said why.
    """
    with ExitStack() as stack:
        if here.rank:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        company = _Company(here, interrupts)
        try:
            company.meet()
            code = command()
            company.part()
            return code
        except BaseException as error:
            failure = error
    # Outside of the handler: what follows an exception is judged by what it followed.
    if isinstance(failure, SystemExit):
        company.part()
        raise failure
    interrupts.ignore()
    code = company.fail(int(getattr(failure, "exit_code", 1)))
    if code is not None:
        raise SystemExit(code)
    raise failure


class _Lost(Stopped):
    """Another process has ended."""

    def __init__(self, rank: int, world: int):
        super().__init__(signal.SIGTERM)
        self.rank, self.world = rank, world

    @property
    def exit_code(self) -> int:
        return 1

    @property
    def said(self) -> str:
        return f"process {self.rank} of {self.world} has ended"


class _Company:
    """The processes of a command, which miss one another."""

    def __init__(self, here: Place, interrupts: Interrupts):
        self.here, self.interrupts = here, interrupts
        self.watched = range(1, here.world) if here.rank == 0 else range(1)
        self.store: Any = None
        self.group: Any = None
        self.threads: list[threading.Thread] = []
        self.missed = threading.Event()
        self.told: int | None = None  # the exit code of another process that said that it has failed
        self.going = False  # in good order or not: the end of another process is none of its business any longer

    def meet(self) -> None:
        """Wait for the others, and begin to watch.

        Raises:
            CompressError: they do not come.
        """
        import torch

        if torch.cuda.is_available() and self.here.local < torch.cuda.device_count():
            torch.cuda.set_device(self.here.local)
        failures: list[RuntimeError] = []
        # In a thread, so that a signal ends the waiting, too.
        meeting = threading.Thread(target=self._meet, args=(failures,), daemon=True)
        meeting.start()
        while meeting.is_alive():
            meeting.join(0.1)
        if failures:
            address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise PeerError(f"not all of {self.here.world} processes have met at {address}") from failures[0]
        for other in self.watched:
            thread = threading.Thread(target=self._watch, args=(other,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _meet(self, failures: list[RuntimeError]) -> None:
        import torch

        dist: Any = torch.distributed  # which does not say that it exports what its documentation names
        try:
            store, rank, world = next(iter(dist.rendezvous("env://", timeout=MEETING)))
            self.store = dist.PrefixStore("compress", store)
            self.store.set(f"here-{rank}", "")
            self.store.wait([f"here-{each}" for each in range(world)], MEETING)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WORKING)
            self.group = dist.new_group(backend="gloo", timeout=WORKING)
        except RuntimeError as error:
            failures.append(error)

    def part(self) -> None:
        """Go, once all have done their work."""
        from torch import distributed as dist

        if self.group is not None and not self.going:
            dist.barrier(group=self.group)
            self.going = True
            self._tell(0)
            for thread in self.threads:
                thread.join(PATIENCE)
            dist.destroy_process_group()

    def fail(self, code: int) -> int | None:
        """End the others. Returns the exit code of the run where another process has said why; else this one must."""
        self.going = True
        other = self._failed_before(code)
        self._tell(1 + code if other is None else 1 + other)
        return other

    def _failed_before(self, code: int) -> int | None:
        """The exit code of the process that failed before this one; remembers this one's where none did."""
        mine = f"{self.here.rank} {code}"
        try:
            first = self.store.compare_set("failed", "", mine).decode()
            return None if first == mine else int(first.split()[1])
        except (RuntimeError, AttributeError):  # whoever holds the store is gone, or it was never reached
            self.missed.wait(PATIENCE)
            return self.told if self.here.rank < 2 else self.told or 1

    def _tell(self, said: int) -> None:
        """Say to those that watch this process that it goes: 0 in good order, 1 + exit code where something failed."""
        import torch
        from torch import distributed as dist

        for other in self.watched if self.group is not None else ():
            with suppress(RuntimeError):  # it is gone already
                dist.send(torch.tensor([said], device="cpu"), dst=other, group=self.group)

    def _watch(self, other: int) -> None:
        """Wait for another process to go; in a thread of its own."""
        import torch
        from torch import distributed as dist

        said = torch.zeros(1, dtype=torch.int64, device="cpu")
        try:
            dist.recv(said, src=other, group=self.group)
            if not said:
                return
            self.told = int(said) - 1
        except RuntimeError:  # the connection has broken: it was killed, or its machine was
            pass
        self.missed.set()
        if self.going:
            return
        lost = _Lost(other, self.here.world)
        self.interrupts.stop(lost)
        time.sleep(GRACE)
        # The main thread is deep in some library, which it does not come back from.
        code = self.fail(lost.exit_code)
        if code is None:
            print(f"{lost.said}; give the same command again to go on", file=sys.__stderr__, flush=True)
        os._exit(lost.exit_code if code is None else code)


__all__ = ["Place", "executor", "place", "refuse_alone", "shared"]
