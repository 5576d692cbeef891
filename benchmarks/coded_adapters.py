"""What a random LoRA adapter of the bundled model becomes as a compressed delta: of the weights, or of its factors.

    python benchmarks/coded_adapters.py

Rank 8 on the queries and values of every block. Prints a table and writes results/coded_adapters.json.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import runner
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.demo import MODEL_DIR

FILE = "coded_adapters.json"
RANK, ALPHA, SIZE = 8, 16, 0.05
CODED: dict[str, dict[str, Any]] = {
    "weights": {},
    "factors": {"factors": True},
    "factors, density 0.5": {"factors": True, "density": 0.5},
    "factors, density 0.5, magnitude `mean`": {"factors": True, "density": 0.5, "magnitude": "mean"},
    "factors, density 0.1": {"factors": True, "density": 0.1},
}


def weights(folder: Path) -> dict[str, Tensor]:
    """The matrices that the adapter adds to."""
    values = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name: value.float() for name, value in values.items() if name.endswith(("q_proj.weight", "v_proj.weight"))}


def write_adapter(folder: Path) -> dict[str, Tensor]:
    """As PEFT writes one. Returns what it adds to each matrix."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    factors, added = {}, {}
    for name, value in weights(MODEL_DIR).items():
        a, b = (SIZE * torch.randn(shape, generator=generator) for shape in ((RANK, value.shape[1]),
                                                                             (value.shape[0], RANK)))  # fmt: skip
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        added[name] = ALPHA / RANK * b @ a
    save_file(factors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": "demo", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return added


def measured(adapter: Path, added: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the file, and of the tensors in it; how far the change of the weights is from the adapter's."""
    with tempfile.TemporaryDirectory() as scratch:
        compress.run({"passes": [{"compeft": {"models": [str(adapter)], **options}}]}, "demo", f"{scratch}/out")
        file = Path(f"{scratch}/out/delta/delta.safetensors")
        with safe_open(file, "pt") as opened:
            codes = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
        base, made = weights(MODEL_DIR), weights(Path(f"{scratch}/out"))
        lost = sum(float((made[n] - base[n] - change).square().sum()) for n, change in added.items())
        whole = sum(float(change.square().sum()) for change in added.values())
        return {"bytes": file.stat().st_size, "codes": codes, "error": (lost / whole) ** 0.5}


def show(rows: list[dict[str, Any]]) -> str:
    head = ("coded", "file", "codes in it", "relative error of the change")
    return runner.table(
        head,
        [(r["coded"], f"{r['bytes'] / 1e3:.1f} KB", f"{r['codes'] / 1e3:.1f} KB", f"{r['error']:.2f}") for r in rows],
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        added = write_adapter(adapter)
        rows = [{"coded": name} | measured(adapter, added, options) for name, options in CODED.items()]
    print(show(rows), file=sys.stderr)
    runner.write(FILE, {"machine": runner.machine(), "rows": rows})


if __name__ == "__main__":
    main()
