"""Memory that a compressed folder takes in transformers, before and after it has been called.

    python benchmarks/load.py OUT NAME

Keeps a row under NAME in results/load.json: bytes of the weight file, of the loaded parameters, of the same model in
float32, and how much the process's private memory (no mapped pages) grew by loading and by a call. Linux only.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import compress  # noqa: F401  (teaches transformers to load the folder)
from compress.runtime.linear import PackedLinear


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main() -> None:
    folder = Path(sys.argv[1])
    before = private_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded = private_bytes()
    with torch.no_grad():
        model(input_ids=torch.arange(64)[None])
    called = private_bytes()
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    inside = {id(p) for m in packed for name, p in m.named_parameters() if name != "bias"}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    weights = plain + sum(m.in_features * m.out_features for m in packed)
    found = {
        "file_mb": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6,
        "parameters_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "float32_mb": weights * 4 / 1e6,
        "grown_by_loading_mb": (loaded - before) / 1e6,
        "grown_by_a_call_mb": (called - loaded) / 1e6,
    }
    row = {"model": sys.argv[2]} | {name: round(value, 1) for name, value in found.items()}
    print(json.dumps(row))
    file = Path(__file__).parent / "results" / "load.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [r for r in earlier if r["model"] != row["model"]] + [row]
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
