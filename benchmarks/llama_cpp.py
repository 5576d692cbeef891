"""What llama.cpp computes from our GGUF files, beside the packed model in float32.

    python -m venv .venv-llama && .venv-llama/bin/pip install xllamacpp
    python benchmarks/llama_cpp.py --llama-python .venv-llama/bin/python

The bundled model, rounded to nearest; the ten likeliest tokens after each of some prompts. Writes
results/llama_cpp.json.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import runner
import torch
from transformers import AutoTokenizer

import compress
from compress.models.loading import load_model

FILE = "llama_cpp.json"
PROMPTS, LENGTH = 64, 64
WHAT: dict[str, dict[str, Any]] = {
    "none (5 % zeros)": {"magnitude": {"sparsity": 0.05}},
    "8 bits, symmetric": {"rtn": {"bits": 8, "group_size": 32, "symmetric": True}},
    "4 bits": {"rtn": {"bits": 4, "group_size": 32}},
    "4 bits, symmetric": {"rtn": {"bits": 4, "group_size": 32, "symmetric": True}},
    "3 bits": {"rtn": {"bits": 3, "group_size": 32}},
}


def compare(pass_: dict[str, Any], python: Path, scratch: Path) -> dict[str, Any]:
    out, file = scratch / "out", scratch / "prompts.json"
    evaluate = {"source": "demo", "samples": PROMPTS, "length": 512}
    report = compress.run({"passes": [pass_], "export": ["gguf"], "evaluate": evaluate}, "demo", out, overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = compress.load_tokens("demo", tokenizer, samples=PROMPTS, length=LENGTH, split="evaluation")
    texts = tokenizer.batch_decode(tokens)
    file.write_text(json.dumps(list(zip(tokens.tolist(), texts, strict=True))))
    with torch.no_grad():
        meant = load_model(out, torch.float32)(tokens).logits[:, -1].log_softmax(-1)
    found = runner.run(python, "llama_cpp_run.py", out / "gguf" / "model.gguf", file)
    differences = [abs(float(meant[i, n]) - p) for i, likely in enumerate(found["likely"]) for n, p in likely]
    same = [likely[0][0] == int(meant[i].argmax()) for i, likely in enumerate(found["likely"])]
    cut = [count == len(tokenizer(text)["input_ids"]) for count, text in zip(found["counts"], texts, strict=True)]
    return {
        "types": report.verified["gguf"]["types"],
        "mb": round((out / "gguf" / "model.gguf").stat().st_size / 1e6, 2),
        "perplexity": report.rows[-1].perplexity,
        "in_transformers": report.verified["gguf"]["max_logit_difference"],
        "largest": max(differences),
        "mean": sum(differences) / len(differences),
        "same_first": sum(same),
        "same_cuts": sum(cut),
        "prompts": len(same),
    }


def show(rows: list[dict[str, Any]]) -> str:
    head = (
        "weights",
        "matrices in",
        "MB",
        "perplexity",
        "transformers, logits",
        "llama.cpp, mean",
        "largest",
        "same first",
    )
    body = []
    for row in rows:
        types = ", ".join(kind for kind in row["types"] if kind != "F32")
        numbers = (row["mb"], f"{row['perplexity']:.3f}", row["in_transformers"])
        shares = (f"{row['mean']:.4f}", f"{row['largest']:.3f}", f"{row['same_first']} of {row['prompts']}")
        body.append((row["what"], types, *numbers, *shares))
    return runner.table(head, body, text_columns=2)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, default=Path(".venv-llama/bin/python"))
    args = parser.parse_args()
    about = {
        "machine": runner.machine(),
        "model": "demo",
        "prompts": [PROMPTS, LENGTH],
        "ours": runner.versions(sys.executable, "torch", "transformers", "gguf"),
        "llama": runner.versions(args.llama_python, "xllamacpp"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        rows = [{"what": what, **compare(p, args.llama_python, Path(scratch))} for what, p in WHAT.items()]
    runner.write(FILE, about | {"rows": rows})
    print(show(rows))


if __name__ == "__main__":
    main()
