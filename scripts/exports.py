"""Measure the bundled model in every format and runtime, and put the table into docs/exports.md.

    python scripts/exports.py

Every format is opened in a process of its own, for the memory that loading takes, and generates token by token. Speeds
are ratios to the float32 model in transformers, measured before and after each. Writes docs/exports.json, and replaces
the table between `<!-- exports -->` and `<!-- /exports -->` in docs/exports.md. No number is typed by hand.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import ROOT, replace

import compress
from compress.config.reading import exporters
from compress.report.report import size_text

RECORD = ROOT / "docs" / "exports.json"
EVALUATED = {"source": "demo", "samples": 8, "length": 512, "after": "end"}
W4 = [{"gptq": {"scheme": "w4g64"}}]
W4_OF_LLAMA_CPP = [{"gptq": {"bits": 4, "group_size": 32, "symmetric": True}}]
W3, W2 = [{"gptq": {"scheme": "w3g64"}}], [{"gptq": {"scheme": "w2g64"}}]
TABLES = [{"codebook": {"bits": 4}}]
PROMPT, STEPS, WARM = 16, 64, 16

# What is shown, passes, where in OUT it is, what runs it.
ROWS: list[tuple[str, list[dict[str, Any]], str, str]] = [
    ("packed, gptq 4 bits", W4, "", "transformers"),
    ("packed, after `speed_up`", W4, "", "transformers, sped up"),
    ("packed, after `speed_up(exact=False)`", W4, "", "transformers, rounding"),
    ("hf, gptq 4 bits", W4, "hf", "transformers"),
    ("compressed-tensors, gptq 4 bits", W4_OF_LLAMA_CPP, "compressed-tensors", "transformers"),
    ("gguf, gptq 4 bits", W4_OF_LLAMA_CPP, "gguf", "transformers"),
    ("onnx, gptq 4 bits", W4, "onnx", "onnxruntime"),
    ("onnx, `style: qdq`", W4, "onnx:style=qdq", "onnxruntime"),
    ("genai, gptq 4 bits", W4, "genai", "onnxruntime-genai"),
    ("onnx, gptq 3 bits", W3, "onnx", "onnxruntime"),
    ("onnx, gptq 2 bits", W2, "onnx", "onnxruntime"),
    ("onnx, codebook 4 bits", TABLES, "onnx", "onnxruntime"),
    ("onnx, codebook 4 bits, `mode: fast`", TABLES, "onnx:mode=fast", "onnxruntime"),
]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def rate(step: Callable[[int], None]) -> float:
    """Tokens per second; `step` generates the i-th."""
    started = 0.0
    for i in range(STEPS):
        if i == WARM:
            started = time.perf_counter()
        step(i)
    return (STEPS - WARM) / (time.perf_counter() - started)


def transformers(folder: Path, exact: bool | None = None) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = resident()
    files = list(folder.glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": files[0].name} if files else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    if exact is not None:
        compress.speed_up(model, exact=exact)
    grown = resident() - before
    tokens = (torch.arange(PROMPT + STEPS)[None] * 7919) % model.config.vocab_size
    with torch.no_grad():
        kept = model(input_ids=tokens[:, :PROMPT], use_cache=True).past_key_values

        def step(i: int) -> None:
            model(input_ids=tokens[:, PROMPT + i : PROMPT + i + 1], past_key_values=kept, use_cache=True)

        return {"load_memory": grown, "tokens_per_second": rate(step)}


def onnxruntime(folder: Path) -> dict[str, float]:
    import torch

    from compress.export.onnx.measure import open_onnx

    opened = open_onnx(folder)
    tokens = (torch.arange(PROMPT + STEPS)[None] * 7919) % 4096
    state = {"past": opened.runner.step(tokens[:, :PROMPT], None)[1]}

    def step(i: int) -> None:
        state["past"] = opened.runner.step(tokens[:, PROMPT + i : PROMPT + i + 1], state["past"])[1]

    return {"load_memory": opened.memory or 0, "tokens_per_second": rate(step)}


def genai(folder: Path) -> dict[str, float]:
    import numpy
    import onnxruntime_genai

    before = resident()
    model = onnxruntime_genai.Model(str(folder))
    grown = resident() - before
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=PROMPT + STEPS + 1, min_length=PROMPT + STEPS + 1, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(((numpy.arange(PROMPT) * 7919) % 4096).astype(numpy.int32))
    return {"load_memory": grown, "tokens_per_second": rate(lambda _: generator.generate_next_token())}


RUNTIMES: dict[str, Callable[[Path], dict[str, float]]] = {
    "transformers": transformers,
    "transformers, sped up": lambda folder: transformers(folder, exact=True),
    "transformers, rounding": lambda folder: transformers(folder, exact=False),
    "onnxruntime": onnxruntime,
    "onnxruntime-genai": genai,
}


def alone(runtime: str, folder: Path) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--runtime", runtime, "--folder", str(folder)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measure(temporary: Path) -> list[dict[str, Any]]:
    demo = Path(compress.demo.MODEL_DIR)
    weights = sum(file.stat().st_size for file in demo.glob("*.safetensors"))
    plain = alone("transformers", demo)
    rows: list[dict[str, Any]] = [
        {"format": "the original, in float32", "runtime": "transformers", "bytes": weights, **plain, "times": 1.0}
    ]
    made: dict[str, Path] = {}
    for name, passes, to, runtime in ROWS:
        key = json.dumps(passes)
        if key not in made:
            made[key] = temporary / f"out{len(made)}"
            data = {"calibration": {"samples": 128, "length": 512}, "evaluate": EVALUATED}
            compress.run({**data, "passes": passes}, "demo", made[key])
        out = made[key]
        difference, shipped = (None if "," in runtime else 0.0), None
        if to:
            found = next(iter(compress.export_to(out, exporters([to])).values()))
            difference, shipped = found.get("max_logit_difference"), found.get("as_shipped")
        folder = out / to.partition(":")[0]
        kinds = ("*.safetensors", "*.onnx*", "*.gguf")
        stored = sum(file.stat().st_size for kind in kinds for file in folder.glob(kind))
        before = alone("transformers", demo)["tokens_per_second"]
        mine = alone(runtime, folder)
        after = alone("transformers", demo)["tokens_per_second"]
        rows.append(
            {
                "format": name,
                "runtime": runtime.partition(",")[0],
                "bytes": stored,
                **mine,
                "times": mine["tokens_per_second"] / ((before + after) / 2),
                "difference": difference,
                "shipped": None if shipped is None else shipped["max_logit_difference"],
                "shipped_kl": None if shipped is None else shipped["kl"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | runtime | file | memory to load | speed | logits differ by | as shipped |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        there = "" if row.get("difference") is None else f"{row['difference']:.1g}"
        shipped = "" if row.get("shipped") is None else f"{row['shipped']:.1g} (KL {row['shipped_kl']:.1g})"
        lines.append(
            f"| {row['format']} | {row['runtime']} | {size_text(row['bytes'])} | {size_text(row['load_memory'])} | "
            f"{row['times']:.2f} | {there} | {shipped} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=list(RUNTIMES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runtime:
        print(json.dumps(RUNTIMES[args.runtime](args.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(Path(temporary))
    RECORD.write_text(json.dumps(rows, indent=1) + "\n")
    replace(ROOT / "docs" / "exports.md", "exports", table(rows))


if __name__ == "__main__":
    main()
