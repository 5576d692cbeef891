"""Whether the machine has what a plan needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.planning.need import Need
    from compress.planning.plan import Plan

MEMBERSHIP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of a control group in version 2 and in version 1: limits, what is used, and what of it are droppable pages.
LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
USED = ("memory.current", "memory.usage_in_bytes")
DROPPABLE = ("inactive_file", "total_inactive_file")


def check_resources(plan: Plan, destination: Path, work: Path) -> None:
    """Refuse now what would run out of disk or memory later.

    Args:
        plan: of the run.
        destination: that is going to be written.
        work: folder of unfinished work; what lies there already is part of what is planned.

    Raises:
        ResourceError: not enough of either.
    """
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed = plan.disk.total - sum(f.stat().st_size for f in work.glob("*") if f.is_file())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            f"the run needs about {_mb(needed)} on the disk of {parent}, which has {_mb(free)} free "
            f"({_said(plan.disk)}); make room, or choose another disk for -o"
        )
    check_memory(plan)


def check_memory(plan: Plan) -> None:
    """Refuse now what would run out of memory later, of the host or of the device that computes.

    Raises:
        ResourceError: not enough of either, or more than is allowed.
    """
    memory, limit = available_memory(), plan.places.host_limit
    said = f"the run needs about {_mb(plan.memory.total)} of memory, and"
    if memory is not None and memory < plan.memory.total:
        raise ResourceError(
            f"{said} {_mb(memory)} are available ({_said(plan.memory)}); fewer or shorter samples need less"
        )
    if limit is not None and limit < plan.memory.total:
        raise ResourceError(
            f"{said} max_memory.host allows {_mb(limit)} ({_said(plan.memory)}); allow more, or give fewer or shorter "
            "samples"
        )
    need, most = plan.device, plan.places.device_limit
    if need is not None and most is not None and most < need.total:
        raise ResourceError(
            f"the run needs about {_mb(need.total)} on {plan.places.compute}, where it may take {_mb(most)} "
            f"({_said(need)}); give a larger max_memory.device where there is more, shorter samples, or device: cpu"
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _said(need: Need) -> str:
    largest = sorted(need.parts.items(), key=lambda part: -part[1])[:3]
    return f"while {need.moment}: {', '.join(f'{name} {_mb(size)}' for name, size in largest)}"


def available_memory() -> int | None:
    """Bytes that this process may have, those that it has already included, where the system says.

    The least of what the machine has left and what each control group leaves that the process is in.
    """
    left = [found for found in (_machine(), *group_limits(MEMBERSHIP, CGROUPS)) if found is not None]
    return min(left) + _own() if left else None


def _machine() -> int | None:
    found = _numbers(Path("/proc/meminfo")).get("MemAvailable")
    if found is not None:
        return found << 10
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _own() -> int:
    return _numbers(Path("/proc/self/status")).get("RssAnon", 0) << 10


def group_limits(membership: Path, root: Path) -> Iterator[int]:
    """Bytes that each control group of this process, and each above it, leaves.

    Args:
        membership: the file in which a process finds its groups, a line each: number, controllers, path.
        root: where the groups are.
    """
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            yield from _left(folder)


def _left(group: Path) -> Iterator[int]:
    used = next((n for name in USED if (n := _number(group / name)) is not None), 0)
    pages = _numbers(group / "memory.stat")
    droppable = next((pages[name] for name in DROPPABLE if name in pages), 0)
    for name in LIMITS:
        limit = _number(group / name)
        if limit is not None:
            yield max(0, limit - used + droppable)


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, or a word such as `max`."""
    text = "".join(_lines(file)[:1]).strip()
    return int(text) if text.isdigit() else None


def _numbers(file: Path) -> dict[str, int]:
    """Name -> number, of a file with one of each in a line."""
    words = [line.replace(":", " ").split() for line in _lines(file)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
