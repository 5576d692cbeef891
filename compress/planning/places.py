"""Where a run computes, what memory it may take there, and where activations wait."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.config.pipeline import DEVICE, SIZE
from compress.errors import UsageError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.config.pipeline import MemoryOf

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{prefix}iB": 1 << 10 * (i + 1) for i, prefix in enumerate("KMGT")}
FREE_SHARE = 0.95  # of a device's free memory: an allocator leaves gaps


@dataclass(frozen=True)
class Places:
    """Where a run computes, and what it may take.

    Attributes:
        compute: the device.
        device_limit: bytes of its memory; None on the processor, whose memory is the host's.
        host_limit: bytes of the host's memory that were given; None where it may take what is available.
    """

    compute: torch.device
    device_limit: int | None = None
    host_limit: int | None = None

    @property
    def apart(self) -> bool:
        """Whether the device has memory of its own."""
        return self.compute.type != "cpu"

    @property
    def name(self) -> str:
        """The device in words; results are the same to the bit on devices of one name."""
        return device_name(self.compute)


def on_processor() -> Places:
    """The places of a run that computes on the processor and may take all there is."""
    return Places(torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """Such as cpu, or cuda (NVIDIA H100 80GB HBM3)."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def chosen_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:1` names.

    Raises:
        UsageError: no such name, or it is not there.
    """
    if not re.fullmatch(DEVICE, name):
        raise UsageError(f"device {name!r} is not one like auto, cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = int(name.partition(":")[2] or (0 if name == "auto" else torch.cuda.current_device() if count else 0))
    if not count:
        raise UsageError(f"device {name}: torch {torch.__version__} finds no CUDA device here; {_without(name)}")
    if number >= count:
        named = ", ".join(f"cuda:{i}" for i in range(count))
        raise UsageError(f"device {name}: this machine has {named}; give one of them, or auto")
    return torch.device("cuda", number)


def _without(name: str) -> str:
    built = torch.version.cuda is not None
    fix = "check the driver with nvidia-smi" if built else "install a torch that is built for CUDA"
    return f"{fix}, or give auto or cpu"


def places(device: str, max_memory: Mapping[MemoryOf, str]) -> Places:
    """The places of a run, as its settings choose them.

    Raises:
        UsageError: the device is not there, or has less memory than it is to use.
    """
    return places_on(chosen_device(device), max_memory)


def places_on(compute: torch.device, max_memory: Mapping[MemoryOf, str]) -> Places:
    """The places of a run on a device, within limits; `places` says what is wrong with them."""
    limits: dict[str, int] = {name: size_in_bytes(size) for name, size in max_memory.items()}
    if compute.type != "cuda":
        if "device" in limits:
            raise UsageError(
                "max_memory.device limits the memory of a graphics processor, and this run computes on the processor: "
                "give max_memory.host, or a device"
            )
        return Places(compute, None, limits.get("host"))
    free, total = torch.cuda.mem_get_info(compute)
    wanted = limits.get("device", int(free * FREE_SHARE))
    if wanted > total:
        raise UsageError(f"max_memory.device is {wanted / 1e9:.1f} GB, and {compute} has {total / 1e9:.1f} GB")
    return Places(compute, wanted, limits.get("host"))


def size_in_bytes(text: str) -> int:
    """12GB -> 12 * 10**9; GiB and the like count in powers of two.

    Raises:
        UsageError: no size.
    """
    if not re.fullmatch(SIZE, text):
        raise UsageError(f"max_memory: {text!r} is not a size such as 12GB")
    number = text.rstrip("KMGTiB ")
    return int(float(number) * UNITS[text.removeprefix(number).strip()])
