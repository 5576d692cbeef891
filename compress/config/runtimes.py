"""What runs a compressed model, which container it reads, and which codes it computes with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

GROUP = 64  # columns that share a scale where nothing else is asked for
BITS = tuple(range(2, 9))  # that uniform codes may have


@dataclass(frozen=True)
class Runtime:
    """A program that runs models.

    Attributes:
        format: the container that it reads; None is the packed folder itself.
        bits: of the uniform codes that it computes with.
        groups: columns that may share a scale; empty where any number may.
        multiple: columns that share a scale are a multiple of this.
        group: columns that share a scale unless another number is asked for.
        symmetric: widths at which codes have no zero point, which it reads in fewer bits, or alone.
        uniform: whether it takes no codes but uniform ones.
        super_blocks: whether it takes them, the K-quants of llama.cpp.
        fuses: whether it multiplies queries, keys and values as one matrix, and gate and up, with one scheme for all.
        stored: bits per weight that it keeps codes in, where that is not their own width.
    """

    format: str | None
    bits: tuple[int, ...] = BITS
    groups: tuple[int, ...] = ()
    multiple: int = 1
    group: int = GROUP
    symmetric: tuple[int, ...] = ()
    uniform: bool = False
    super_blocks: bool = True
    fuses: bool = False
    stored: Mapping[int, float] = field(default_factory=dict)

    @property
    def widths(self) -> str:
        """Its bits in words."""
        if len(self.bits) > 2 and self.bits == tuple(range(self.bits[0], self.bits[-1] + 1)):
            return f"{self.bits[0]} to {self.bits[-1]}"
        *first, last = map(str, self.bits)
        return f"{', '.join(first)} or {last}"

    @property
    def sizes(self) -> str:
        """How many columns may share a scale, in words."""
        return f"multiples of {self.multiple}" if self.multiple > 1 else ", ".join(map(str, self.groups)) or "any"

    def takes_group(self, group: int | None) -> bool:
        """Whether so many columns may share a scale; None is a whole row."""
        if group is None or not (self.groups or self.multiple > 1):
            return True
        return group % self.multiple == 0 if self.multiple > 1 else group in self.groups


# vLLM and SGLang: by their source (`compressed_tensors_wNa16`, `gptq_marlin`), not run here. llama.cpp: blocks of GGML,
# see docs/exports.md. MLX: beside zero points scales take float32.
LLAMA_CPP = {2: 4.5, 3: 4.5, 4: 4.5, 5: 5.5, 6: 8.5, 7: 8.5, 8: 8.5}
SERVED: dict[str, Any] = {
    "bits": (4, 8), "groups": (32, 64, 128), "symmetric": BITS, "uniform": True, "super_blocks": False, "fuses": True,
}  # fmt: skip
RUNTIMES: dict[str, Runtime] = {
    "transformers": Runtime(None),
    "vllm": Runtime("compressed-tensors", **SERVED),
    "sglang": Runtime("gptq", **SERVED),
    "mlx": Runtime("mlx", (2, 3, 4, 5, 6, 8), (32, 64, 128), symmetric=(4, 5, 6, 8), uniform=True, super_blocks=False),
    "llama.cpp": Runtime("gguf", multiple=32, group=32, symmetric=(4, 5, 6, 7, 8), uniform=True, stored=LLAMA_CPP),
    "onnxruntime": Runtime("onnx"),
}


def runtime_named(name: str) -> Runtime:
    """A runtime by what it is called.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise UsageError(f"--for {name}: known are {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def refuse_scheme(name: str, bits: int, group: int | None) -> None:
    """Refuse codes that a runtime does not compute with. `group`: columns that share a scale; None for a whole row.

    Raises:
        UsageError: says what would fit.
    """
    runtime = runtime_named(name)
    if bits not in runtime.bits:
        would = next((width for width in runtime.bits if width >= bits), runtime.bits[-1])
        raise UsageError(f"--bits {bits}: {name} runs {runtime.widths} bits here; --bits {would} would fit")
    if not runtime.takes_group(group):
        raise UsageError(
            f"--group-size {group}: {name} takes {runtime.sizes}, or 0 for one scale per row; --group-size "
            f"{runtime.group} would fit"
        )


__all__ = ["RUNTIMES", "Runtime", "refuse_scheme", "runtime_named"]
