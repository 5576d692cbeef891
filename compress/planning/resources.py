"""Whether the machine has what a plan needs."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from compress.errors import ResourceError

if TYPE_CHECKING:
    from pathlib import Path

    from compress.planning.plan import Plan


def check_resources(plan: Plan, destination: Path) -> None:
    """Refuse now what would run out of disk or memory later.

    Raises:
        ResourceError: not enough of either.
    """
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.disk:
        raise ResourceError(
            f"the run needs about {plan.disk / 1e6:.0f} MB on the disk of {parent}, which has {free / 1e6:.0f} MB free"
        )
    memory = available_memory()
    if memory is not None and memory < plan.peak_memory:
        raise ResourceError(
            f"the run needs about {plan.peak_memory / 1e6:.0f} MB of memory, and {memory / 1e6:.0f} MB are available; "
            "fewer or shorter calibration samples need less"
        )


def available_memory() -> int | None:
    """Bytes, where the system says."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
