"""A model taken through the package as a user would: run, load by its own class, export, load again, compare."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from entry import Entry
from torch import Tensor, nn

import compress
from compress.export import EXPORTERS

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 4, "group_size": 16, "fallback": "channel"},
    "gptq": {"bits": 4, "group_size": 16, "fallback": "channel"},
    "wanda": {"sparsity": 0.5},
    "flexround": {"bits": 4, "group_size": 16, "fallback": "channel", "steps": 3},
}
CONTAINERS: dict[str, Any] = {
    exporter.key: exporter for exporter in EXPORTERS if exporter.key in ("hf", "compressed-tensors")
}


class WrongModelError(AssertionError):
    """What was written is not the model that went in."""


@dataclass
class Tried:
    """What came out of one method.

    Attributes:
        share: of the numbers in matrices that it reached; embeddings and what is said to stay dense left out.
        reached: of all numbers in matrices, embeddings left out.
        difference: between outputs of the folder, loaded by its own class, and of the same values in plain weights.
        exports: containers that were written and read back -> what went wrong, or nothing.
    """

    share: float = 0.0
    reached: float = 0.0
    difference: float | None = None
    exports: dict[str, str] = field(default_factory=dict)


def saved(entry: Entry, folder: Path) -> nn.Module:
    """The model as `save_pretrained` writes it."""
    model = entry.build()
    model.save_pretrained(folder)
    return model


def tried(entry: Entry, method: str, source: Path, out: Path, containers: tuple[str, ...]) -> Tried:
    """Run one method on a saved model.

    Args:
        entry: which was saved.
        method: of `METHODS`.
        source: where it was saved.
        out: the folder to write.
        containers: to write OUT in, beside plain weights, and read again.

    Raises:
        CompressError: the package refuses.
        WrongModelError: what was written is another model.
    """
    excluded = {"exclude": list(entry.exclude)} if entry.exclude else {}
    # What is left is measured here, and little in a small model is much of it.
    steps = {"passes": [{method: METHODS[method] | excluded}], "allow_dense": True}
    compress.run(steps, source, out, calibration=entry.calibration(), evaluation=entry.evaluation())
    found = Tried(*shares(entry, out, own(entry, source)))
    compress.export_to(out, [compress.Hf()])
    found.difference = difference(entry, own(entry, out), own(entry, out / "hf"))
    for key in containers:
        try:
            compress.export_to(out, [CONTAINERS[key]()])
            found.exports[key] = ""
        except compress.CompressError as error:
            found.exports[key] = first_line(error)
    return found


def own(entry: Entry, folder: Path) -> nn.Module:
    """A folder loaded by the class that its config.json names, which must be the class that was saved.

    Raises:
        WrongModelError: it names another, or tensors are missing or left over.
    """
    named = json.loads((folder / "config.json").read_text())["architectures"]
    if named != [entry.architecture]:
        raise WrongModelError(f"{folder.name} is of {named}, and {entry.architecture} was saved")
    load = getattr(transformers, entry.architecture).from_pretrained
    model, said = load(folder, output_loading_info=True)
    wrong = {key: sorted(said[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said[key]}
    if wrong:
        raise WrongModelError(f"{folder.name}, loaded by its own class: {wrong}")
    found: nn.Module = model.eval()
    return found


def shares(entry: Entry, out: Path, model: nn.Module) -> tuple[float, float]:
    """Shares of the numbers in a model's matrices that OUT holds compressed: of those meant to be, and of all."""
    compressed = reached(out)
    meant = whole = there = everywhere = 0
    for name, numbers in matrices(model):
        got = min(numbers, sum(size for site, size in compressed.items() if is_of(site, name)))
        whole, everywhere = whole + numbers, everywhere + got
        if not entry.stays_dense(name):
            meant, there = meant + numbers, there + got
    return there / max(1, meant), everywhere / max(1, whole)


def reached(out: Path) -> dict[str, int]:
    """Site -> how many numbers of it are packed."""
    modules: Mapping[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    return {name: spec["shape"][0] * spec["shape"][1] for name, spec in modules.items()}


def is_of(site: str, parameter: str) -> bool:
    """Whether a site is a parameter, or one expert of it."""
    module = parameter.removesuffix(".weight")
    return site in (module, parameter) or (site.startswith(f"{module}.") and site.removeprefix(f"{module}.").isdigit())


def matrices(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters of two dimensions or more, but for embeddings and what turns hidden states into words."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    apart |= {id(head.weight)} if isinstance(getattr(head, "weight", None), Tensor) else set()
    yield from ((name, p.numel()) for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in apart)


@torch.no_grad()
def difference(entry: Entry, packed: nn.Module, dense: nn.Module) -> float:
    """Largest difference between all outputs of two models."""
    batch = entry.batch(3)
    pairs = zip(tensors(packed(**batch)), tensors(dense(**batch)), strict=True)
    found = max(float((mine - theirs).abs().max()) for mine, theirs in pairs if mine.numel())
    gc.collect()
    return found


def tensors(outputs: Any) -> list[Tensor]:
    """Every floating-point tensor of what a model returns, but for caches."""
    if isinstance(outputs, Tensor):
        return [outputs.double()] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        return [tensor for value in outputs.values() for tensor in tensors(value)]
    return [tensor for value in outputs for tensor in tensors(value)] if isinstance(outputs, list | tuple) else []


def first_line(error: BaseException) -> str:
    """What went wrong, for a table."""
    said = str(error).strip().splitlines() or [""]
    plain = isinstance(error, compress.CompressError | WrongModelError)
    return said[0] if plain else f"{type(error).__name__}: {said[0]}"
