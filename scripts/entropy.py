"""Measure what an entropy code takes off results on the bundled model, and put the table into docs/exports.md.

    python scripts/entropy.py [--results FOLDER] [--only "gptq, 4 bits"]

Results are made in a folder for a time, or kept in FOLDER and taken from there. Numbers are kept in docs/entropy.json;
the table between `<!-- entropy -->` and `<!-- /entropy -->` is made of them. No number is typed by hand.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from results import ROOT, replace

import compress
from compress.api.export import export_to
from compress.checkpoint.artifact import Packed
from compress.export.packed import packed_layers
from compress.io.safetensors_file import read_tensors
from compress.report.distribution import distribution_of

RECORD = ROOT / "docs" / "entropy.json"
# What is shown -> a ready-made pipeline, or a pass on few data, which changes little of what its codes are like.
ROWS: dict[str, str | dict[str, Any]] = {
    "rtn, 4 bits, a scale per row": {"rtn": {"bits": 4}},
    "gptq, 4 bits, of 64 columns": "gptq-w4",
    "gptq, 3 bits, of 64 columns": "gptq-w3",
    "gptq, 2 bits, of 64 columns": "gptq-w2",
    "codebook, 3 bits": "codebook-w3",
    "nupes, 3 bits": {"nupes": {"bits": 3, "steps": 10}},
    "jlcm, 2 bits": {"jlcm": {"bits": 2, "steps": 10}},
}


def made(name: str, folder: Path) -> Path:
    """A finished folder."""
    what, out = ROWS[name], folder / "".join(c for c in name if c.isalnum())
    if not out.exists():
        short = {"source": "demo", "samples": 8, "length": 256}
        compress.run(what if isinstance(what, str) else {"calibration": short, "passes": [what]}, "demo", out)
    return out


def entropy_of(packed: dict[str, Packed]) -> float:
    """Bits per weight if each layer's codes took their entropy, and all else what it takes."""
    bits = 0.0
    for layer in packed.values():
        found, (width, _), weights = distribution_of(layer), layer.spec.streams()["codes"], layer.spec.shape
        assert found.entropy is not None
        codes = weights[0] * weights[1]
        bits += 8 * layer.spec.num_bytes - codes * (width - found.entropy)
    return bits / sum(layer.spec.shape[0] * layer.spec.shape[1] for layer in packed.values())


def measured(out: Path) -> dict[str, float]:
    """Bits per weight packed, coded and at best, bytes of the files, and how quickly one thread decodes."""
    facts = export_to(out, [compress.Entropy()])["entropy"]
    assert facts["max_logit_difference"] == 0
    files = [(folder / "compress.safetensors").stat().st_size for folder in (out, out / "entropy")]
    layers = [layer for layer in packed_layers(out / "entropy").values() if layer.coded]
    plain = packed_layers(out)
    stored = [read_tensors(layer.file, [f"{layer.site}.{leaf}" for leaf in layer.coded]) for layer in layers]
    started = time.process_time()
    decoded = 0
    for layer, tensors in zip(layers, stored, strict=True):
        for leaf, form in layer.coded.items():
            decoded += form.decode(tensors[f"{layer.site}.{leaf}"], layer.spec.tensors()[leaf][0]).numel()
    speed = decoded / (time.process_time() - started) / 1e6
    return {
        "packed": facts["packed_bits_per_weight"], "coded": facts["bits_per_weight"], "least": entropy_of(plain),
        "packed_file": files[0], "coded_file": files[1], "decoded_mb_per_second": speed,
    }  # fmt: skip


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [
        "| result | bits per weight packed | coded | at the entropy of single codes | file | decoded, one thread |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in (name for name in ROWS if name in found):
        row = found[name]
        lines.append(
            f"| {name} | {row['packed']:.3f} | {row['coded']:.3f} | {row['least']:.3f} "
            f"| {row['packed_file'] / 1e6:.2f} -> {row['coded_file'] / 1e6:.2f} MB "
            f"| {row['decoded_mb_per_second']:.0f} MB/s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="where results are kept")
    parser.add_argument("--only", nargs="*", help="rows to measure again; the others are kept")
    args = parser.parse_args()
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or ROWS:
            found[name] = measured(made(name, args.results or Path(folder)))
            print(name, found[name], flush=True)
    RECORD.write_text(json.dumps({name: found[name] for name in ROWS if name in found}, indent=1) + "\n")
    replace(ROOT / "docs" / "exports.md", "entropy", table(found))


if __name__ == "__main__":
    main()
