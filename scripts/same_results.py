"""Whether two versions of the package make the same of every ready-made pipeline, to the bit.

    python scripts/same_results.py record before.json      # in a checkout of one commit
    python scripts/same_results.py record after.json       # in a checkout of another
    python scripts/same_results.py compare before.json after.json

Runs every pipeline of the package on the bundled model with little data and few steps. Recorded are the hash of every
file of weights, and the report without times and paths. Only public names are used, so that any two versions compare.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import compress
from compress.demo import MODEL_DIR
from compress.passes import PASSES

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT / "compress" / "config" / "presets", ROOT / "pipelines")
WEIGHTS = {".safetensors", ".onnx", ".data", ".gguf"}
VARYING = {"seconds", "run", "model", "load_seconds", "peak_mb"}


def record(only: list[str]) -> dict[str, Any]:
    """Pipeline -> what it makes."""
    folder = next(f for f in FOLDERS if f.is_dir())
    found = {}
    with tempfile.TemporaryDirectory() as place:
        models = [_changed(Path(place) / f"model-{seed}", seed) for seed in (1, 2)]
        for file in (f for f in sorted(folder.glob("*.yaml")) if not only or f.stem in only):
            print(file.stem, file=sys.stderr, flush=True)
            out = Path(place) / file.stem
            report = compress.run(_small(yaml.safe_load(file.read_text()), models), "demo", out)
            files = sorted(f for f in out.rglob("*") if f.suffix in WEIGHTS)
            told = json.loads(json.dumps(json.loads((out / "report.json").read_text())).replace(place, ""))
            found[file.stem] = {
                "files": {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
                "report": _steady(told),
            }
            assert report.rows
    return found


def _changed(folder: Path, seed: int) -> str:
    """A model like the bundled one, a little different, as fine-tunes are."""
    folder.mkdir()
    for file in MODEL_DIR.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(MODEL_DIR / "model.safetensors")
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = (tensors[name].float() + 2e-3 * noise).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _small(pipeline: dict[str, Any], models: list[str]) -> dict[str, Any]:
    """With little data, few steps, and models that exist here."""

    learning = {p.key for p in PASSES if "steps" in {f.name for f in fields(p)}}

    def small(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry
        ((key, options),) = entry.items()
        if key == "blockwise":
            return {key: [small(each) for each in options]}
        options = dict(options or {})
        if "models" in options:
            options["models"] = models[: len(options["models"])]
        if key in learning and (key != "global_magnitude" or "cuts" in options):
            options["steps"] = 5
        return {key: options}

    pipeline["passes"] = [small(entry) for entry in pipeline["passes"]]
    if pipeline.get("calibration"):
        pipeline["calibration"] |= {"samples": 16, "length": 128}
    if pipeline.get("evaluate"):
        pipeline["evaluate"] = {"source": "demo", "samples": 4, "length": 256}
    return pipeline


def _steady(value: Any) -> Any:
    """A report without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in sorted(value.items()) if k not in VARYING}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two records differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f"{path}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{path}/{key}")
    elif before != after:
        yield f"{path}: {str(before)[:80]} -> {str(after)[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorded = commands.add_parser("record")
    recorded.add_argument("file", type=Path)
    recorded.add_argument("--only", nargs="*", default=[], help="pipelines by name; all by default")
    compare = commands.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        given.file.write_text(json.dumps(record(given.only), indent=1))
        return
    before, after = json.loads(given.before.read_text()), json.loads(given.after.read_text())
    found = list(differences(before, after))
    print("\n".join(found) or f"{len(before)} pipelines: the same to the bit")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
