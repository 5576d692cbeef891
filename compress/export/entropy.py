"""OUT/entropy: the packed folder with its codes entropy-coded; smaller, and the same in memory once it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint import packed_layout
from compress.checkpoint.artifact import Packed
from compress.encodings import rans
from compress.encodings.format import WEIGHTS
from compress.errors import CompressError
from compress.export.base import Exporter
from compress.export.hf import loaded
from compress.export.packed import open_packed
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import bytes_of, write_as_made
from compress.io.small_file import read_object
from compress.models.companions import copy_companions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.encodings.cache import CacheForm
    from compress.export.base import Logits, PackedFolder
    from compress.progress import Bars


@dataclass(frozen=True, kw_only=True)
class Entropy(Exporter):
    """The packed folder with its codes entropy-coded, which this package decodes while it loads."""

    key: ClassVar[str] = "entropy"
    files: ClassVar[tuple[str, ...]] = (WEIGHTS, "config.json")
    used: ClassVar[tuple[str, str]] = (
        "python",
        'import compress\nfrom transformers import LOADER\n\nmodel = LOADER.from_pretrained("FOLDER")',
    )
    bounded: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        """The most: what would not be smaller is left as it is, and the entropy is not known before the codes are."""
        return spec.num_bytes

    def refuse_cache(self, form: CacheForm, specs: Mapping[str, Spec]) -> str | None:
        """Nothing: it keeps all that the packed folder has."""
        return None

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        """Weights, configuration and the tokenizer's files."""
        folder.mkdir(parents=True, exist_ok=True)
        artifact, coded = made.artifact, dict[str, dict[str, int]]()
        owners = list(packed_layout.entries(artifact))
        names = [name for _, parts in owners for name, _, _ in parts]
        counted = bars.over([owner for owner, _ in owners], len(owners), "write: entropy", "end")
        with writing(folder / WEIGHTS):
            tensors = _coded(artifact, counted, coded)
            write_as_made(folder / WEIGHTS, tensors, names, {"format": "pt"})
        config: dict[str, Any] = read_object(made.folder / "config.json")
        section = {**config["quantization_config"], "coded": coded}
        write_json({**config, "quantization_config": section}, folder / "config.json")
        copy_companions(made.folder, folder)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        """Decode every tensor, compare it with the packed one, and say how many bits are left of a weight."""
        there, owners = open_packed(folder, made.dtype).artifact, list(packed_layout.entries(made.artifact))
        count = 0
        for owner, _ in bars.over(owners, len(owners), "read back: entropy"):
            wanted = packed_layout.stored_tensors(made.artifact, owner)
            found = packed_layout.stored_tensors(there, owner)
            for name, tensor in wanted.items():
                same = (tensor.dtype, tensor.shape) == (found[name].dtype, found[name].shape)
                if not same or bytes_of(tensor) != bytes_of(found[name]):
                    raise CompressError(f"{folder}: {name} reads back differently; the disk may be failing")
            count += len(wanted)
        packed = [done for done in there.committed.values() if isinstance(done, Packed)]
        weights = sum(done.spec.shape[0] * done.spec.shape[1] for done in packed)
        return {
            "tensors_equal": count,
            "bits_per_weight": 8 * sum(done.num_bytes for done in packed) / weights,
            "packed_bits_per_weight": 8 * sum(done.spec.num_bytes for done in packed) / weights,
        }

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        return 0.0

    def runner(self, made: PackedFolder, folder: Path) -> Logits:
        return loaded(made, folder)


def _coded(artifact: Artifact, owners: Iterator[str], coded: dict[str, dict[str, int]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is written; forms of those that are entropy-coded are added to `coded`."""
    for owner in owners:
        streams = packed_layout.spec_at(artifact, owner).streams() if owner in artifact.sites else {}
        for name, tensor in packed_layout.stored_tensors(artifact, owner).items():
            leaf = name.removeprefix(f"{owner}.")
            found = rans.encode(tensor, *streams[leaf]) if leaf in streams else None
            if found is None:
                yield name, tensor
                continue
            form, stored = found
            coded[name] = form.to_json()
            yield name, stored
