"""The Hugging Face folder: packed weights in one safetensors file, written and checked tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact, Packed
from compress.encodings import Spec, pack, spec_of
from compress.errors import CompressError
from compress.ledger import writing
from compress.progress import Bars
from compress.runtime.register import METHOD, WEIGHTS

# What travels along from the source folder: never weights, never code.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.model",
              "generation_config.json", "chat_template*", "preprocessor_config.json")  # fmt: skip
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Entry = tuple[str, tuple[int, ...], torch.dtype]


def entries(artifact: Artifact) -> Iterator[tuple[str, list[Entry]]]:
    """(tensor or site name, its stored tensors): parameters in the model's order, tied ones once, then buffers."""
    by_parameter = {s.parameter: s for s in artifact.graph.sites}
    for name, _ in artifact.graph.tensors():
        site = by_parameter.get(name)
        if name in artifact.graph.tied or (artifact.added(name) and name not in artifact.vectors):
            continue
        if site is not None and site.name in artifact.committed:
            spec = spec_at(artifact, site.name)
            yield site.name, [(f"{site.name}.{leaf}", shape, dtype) for leaf, (shape, dtype) in spec.tensors().items()]
        elif name in artifact.vectors:
            size = spec_at(artifact, name).shape[1]
            yield name, [(name, (size,), artifact.vector_dtype(name))]
        else:
            stored = artifact.name_in_source(name)
            yield name, [(name, artifact.source.shape(stored), artifact.source.dtype(stored))]


def spec_at(artifact: Artifact, name: str) -> Spec:
    """The spec of a committed site or vector."""
    done = artifact.committed.get(name) or artifact.vectors[name]
    return done.spec if isinstance(done, Packed) else spec_of(done)


def stored_bytes(artifact: Artifact) -> int:
    """Bytes of all weights as they would be written now."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize for _, parts in entries(artifact) for _, shape, dtype in parts
    )


def write(
    artifact: Artifact, folder: Path, config: dict[str, Any], source: Path | None, version: str, bars: Bars
) -> None:
    """Write weights, configuration and the source's tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / WEIGHTS):
        _write_weights(artifact, folder / WEIGHTS, bars)
    modules = {name: spec_at(artifact, name).to_json() for name in sorted(artifact.committed)}
    section: dict[str, Any] = {"quant_method": METHOD, "version": version, "modules": modules}
    added = sorted(name.removesuffix(".bias") for name in artifact.vectors if artifact.added(name))
    if added:
        section["added_biases"] = added
    config = {**config, "quantization_config": section}
    with writing(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if source:
        for found in sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if p.is_file()}):
            with writing(folder / found.name):
                shutil.copyfile(found, folder / found.name)


def _write_weights(artifact: Artifact, file: Path, bars: Bars) -> None:
    # safetensors' own writer wants every tensor in memory; the format is a length, a header and the bytes in order.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    plan = list(entries(artifact))
    for _, parts in plan:
        for name, shape, dtype in parts:
            end = position + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for owner, parts in bars.over(plan, len(plan), "write: weights"):
            tensors = stored_tensors(artifact, owner)
            for name, _, _ in parts:
                out.write(_bytes(tensors[name]))


def stored_tensors(artifact: Artifact, owner: str) -> dict[str, Tensor]:
    """The tensors of one entry, by full name."""
    done = artifact.committed.get(owner)
    if owner in artifact.vectors:
        return {owner: artifact.tensor(owner)}
    if done is None:
        return {owner: artifact.source.read(artifact.name_in_source(owner))}
    packed = done.tensors() if isinstance(done, Packed) else pack(done)[1]
    return {f"{owner}.{leaf}": value for leaf, value in packed.items()}


def verify(artifact: Artifact, folder: Path, bars: Bars) -> int:
    """Re-open the written file and compare every tensor with what was meant; returns how many were compared.

    Raises:
        CompressError: a tensor differs.
    """
    count = 0
    with (folder / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        plan = list(entries(artifact))
        for owner, parts in bars.over(plan, len(plan), "read back: weights"):
            meant = stored_tensors(artifact, owner)
            for name, shape, dtype in parts:
                there = header[name]
                file.seek(start + there["data_offsets"][0])
                read = file.read(there["data_offsets"][1] - there["data_offsets"][0])
                same = read == bytes(_bytes(meant[name]))
                if not same or there["shape"] != list(shape) or there["dtype"] != _NAMES[dtype]:
                    raise CompressError(f"{folder / WEIGHTS}: {name} reads back differently; the disk may be failing")
                count += 1
    return count


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = _raw(tensor).numpy()
    return memoryview(array)
