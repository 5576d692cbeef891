"""Tokens per second that `generate` gives at batch 1, with packed weights and with plain ones, in one process.

    python benchmarks/generate.py [--rounds 7] [--tokens 64] [--threads 2]

Compresses the bundled model in every way of WAYS, loads each result plain and after `compress.speed_up` with every
option of OPTIONS, and lets all of them generate by turns: the rate is that of the best round. "weights" are the bytes
that all linear layers but the head hold, what kernels keep beside the packed tensors included.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import runner
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress.passes import Pass
from compress.runtime.linear import PackedLinear

RESULTS = runner.RESULTS / "generate.json"
PROMPT = 16
WAYS: dict[str, list[Pass]] = {
    "w4 g64": [compress.Rtn(bits=4, group_size=64)],
    "w8": [compress.Rtn(bits=8)],
    "w3 g64": [compress.Rtn(bits=3, group_size=64)],
    "w2 g64": [compress.Rtn(bits=2, group_size=64)],
    "codebook 4": [compress.Codebook(bits=4)],
    "power 3": [compress.PowerQuant(bits=3)],
    "2:4 + w4 g64": [compress.Magnitude(sparsity="2:4"), compress.Rtn(bits=4, group_size=64)],
}
OPTIONS: dict[str, dict[str, object] | None] = {
    "as loaded": None,
    "exact": {},
    "exact, 17 bits": {"spare_bits": 17},
    "rounded": {"exact": False},
}


def rate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens / (time.perf_counter() - start)


def linear_layers(model: PreTrainedModel) -> int:
    return sum(4 * m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))


def show(rows: list[dict[str, Any]]) -> str:
    head = ("weights", "how", "kernels", "tokens per second", "of float32", "weights MB", "largest error")
    keys = ("weights", "how", "kernels", "tokens_per_second", "ratio", "mb", "error")
    return runner.table(head, [tuple(row[k] for k in keys) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense, tokenizer = compress.demo.load()
    windows = compress.load_tokens("demo", tokenizer, samples=16, length=128)
    prompt = windows[:1, :PROMPT]
    models = {("float32", "dense"): dense}
    rows = [{"weights": "float32", "how": "dense", "kernels": {}, "error": 0.0, "mb": linear_layers(dense) / 1e6}]
    for way, passes in WAYS.items():
        with TemporaryDirectory() as folder:
            pipeline = compress.Pipeline(passes=tuple((p,) for p in passes))
            compress.run(pipeline, "demo", Path(folder) / "out", calibration=windows)
            for how, options in OPTIONS.items():
                model = AutoModelForCausalLM.from_pretrained(Path(folder) / "out").eval()
                layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
                held = sum(m.spec.num_bytes for m in layers)
                row = {"weights": way, "how": how, "kernels": {}, "error": 0.0}
                if options is not None:
                    done = compress.speed_up(model, **options)
                    sizes = [m.in_features * m.out_features / 8 for m in layers]
                    held += sum(found.spare_bits * size for found, size in zip(done.layers, sizes, strict=True))
                    row |= {"kernels": done.kernels, "error": max(found.error for found in done.layers)}
                models[way, how] = model
                rows.append(row | {"mb": held / 1e6})
    best = dict.fromkeys(models, 0.0)
    for _ in range(arguments.rounds):
        for key, model in models.items():
            best[key] = max(best[key], rate(model, prompt, arguments.tokens))
    for row in rows:
        found = best[row["weights"], row["how"]]
        row |= {"tokens_per_second": round(found, 1), "ratio": round(found / best["float32", "dense"], 3)}
        row |= {"mb": round(row["mb"], 2), "error": float(f"{row['error']:.2g}")}
        row["kernels"] = ", ".join(row["kernels"])
    about = {
        "machine": runner.machine(),
        "model": "demo",
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "ours": {package: version(package) for package in ("torch", "transformers")},
    }
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(show(rows))


if __name__ == "__main__":
    main()
