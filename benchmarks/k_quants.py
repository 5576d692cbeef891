"""Super-blocks of rtn and gptq beside what llama.cpp's own quantizer makes of the same weights, on the bundled model.

    python -m venv .venv-llama && .venv-llama/bin/pip install xllamacpp
    python benchmarks/k_quants.py q4_k --llama-python .venv-llama/bin/python

llama.cpp's quantizer runs in that Python (llama_cpp_blocks.py), once as it is and once with an importance matrix: the
mean squares of the inputs of the calibration data. What it makes is dequantized by the package gguf and measured as a
plain model, on the windows that rtn and gptq are measured on.
"""

import subprocess
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from shutil import copytree
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress.api.evaluate import measure_model
from compress.config.pipeline import Evaluation
from compress.demo import MODEL_DIR

SCRIPT = Path(__file__).parent / "llama_cpp_blocks.py"
CALIBRATION = {"source": "demo", "samples": 128, "length": 256}
EVALUATION = {"source": "demo", "samples": 64, "length": 512}


def importance(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Weight -> (I,) mean squares of the layer's inputs."""
    found: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = found.get(name, 0) + given[0].float().square().flatten(0, -2).mean(0)

        return hook

    hooks = [m.register_forward_pre_hook(add(f"{n}.weight")) for n, m in model.named_modules() if n.endswith("_proj")]
    with torch.no_grad():
        for rows in tokens.split(8):
            model(rows)
    for hook in hooks:
        hook.remove()
    return found


def by_llama_cpp(kind: str, python: str, weights: dict[str, Tensor], by_inputs: dict[str, Tensor] | None) -> Any:
    """Quality of the model with weights as llama.cpp rounds them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        given, blocks = folder / "given.safetensors", folder / "blocks.safetensors"
        chosen = {name: weights[name].float() for name in weights if "_proj" in name}
        save_file({**chosen, **{f"{n}@inputs": v for n, v in (by_inputs or {}).items()}}, given)
        subprocess.run([python, str(SCRIPT), kind, str(given), str(blocks)], check=True)
        copytree(MODEL_DIR, folder / "model")
        made = dict(weights)
        for name, value in load_file(blocks).items():
            type_ = gguf.GGMLQuantizationType[kind.upper()]
            made[name] = torch.from_numpy(gguf.quants.dequantize(value.numpy(), type_).copy())
        save_file(made, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        return measure_model(str(folder / "model"), Evaluation(**EVALUATION), against="demo")


def by_us(kind: str, method: str, search: str) -> Any:
    """The last row of a run."""
    pipeline = {
        "calibration": CALIBRATION, "evaluate": EVALUATION,
        "passes": [{method: {"scheme": kind, "scale_search": search}}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        return compress.run(pipeline, "demo", Path(scratch) / "out").rows[-1]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
    parser.add_argument("--llama-python", required=True, help="a Python that has xllamacpp")
    asked = parser.parse_args()
    model, tokenizer = compress.demo.load()
    tokens = compress.load_tokens("demo", tokenizer, samples=128, length=256)
    weights, inputs = load_file(MODEL_DIR / "model.safetensors"), importance(model.float(), tokens)
    for name, given in (("llama.cpp", None), ("llama.cpp with an importance matrix", inputs)):
        found = by_llama_cpp(asked.kind, asked.llama_python, weights, given)
        print(f"{name}: perplexity {found['perplexity']:.2f}, KL {found['kl']:.4f}", flush=True)
    for method, search in (("rtn", "mse"), ("gptq", "weighted")):
        row = by_us(asked.kind, method, search)
        print(f"{method}, {search}: perplexity {row.perplexity:.2f}, KL {row.kl:.4f}", flush=True)


if __name__ == "__main__":
    main()
