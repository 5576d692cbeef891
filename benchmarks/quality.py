"""Perplexity and time of the same methods in this package and in llm-compressor, on the bundled model.

    python benchmarks/quality.py --peer-python .venv-peer/bin/python

Both tools get the same model, the same calibration tokens and the same evaluation, each run in a process of its own.
They take turns (ours, peer, ours, peer, ...), so that a slow minute of the machine meets both; times are medians.
Prints a table and writes results/quality.json.

difference  our perplexity above (+) or below (-) theirs
ratio       our time by theirs, the median over the pairs of neighbouring runs; below 1 we are quicker
"""

import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import runner

WHATS = (
    "base",
    *(f"rtn:{bits}:64" for bits in (4, 3, 2)),
    *(f"gptq:{bits}:64" for bits in (4, 3, 2)),
    *(f"{method}:{sparsity}" for method in ("wanda", "sparsegpt") for sparsity in ("0.5", "2:4")),
)
CALIBRATION = (128, 256)
EVALUATION = (64, 512)
FILE = "quality.json"


def demo_model() -> Path:
    from compress.demo import MODEL_DIR

    return Path(MODEL_DIR)


def write_tokens(file: Path, model: Path) -> None:
    """The demo source, cut for `model`; what it calibrates on and what it evaluates on share no module."""
    from transformers import AutoTokenizer

    from compress.calibration.tokens import load_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    (samples, length), (windows, width) = CALIBRATION, EVALUATION
    calibration = load_tokens("demo", tokenizer, samples=samples, length=length, split="calibration")
    evaluation = load_tokens("demo", tokenizer, samples=windows, length=width, split="evaluation")
    np.savez(file, calib=calibration.numpy(), eval=evaluation.numpy())


def compare(
    what: str, model: Path, tokens: Path, peer_python: Path, repeats: int, script: str = "peer.py"
) -> dict[str, Any]:
    """One row: `repeats` pairs of runs."""
    ours, theirs = [], []
    for _ in range(1 if what == "base" else repeats):
        ours.append(runner.run(sys.executable, "ours.py", model, tokens, what))
        theirs.append(runner.run(peer_python, script, model, tokens, what))
    row: dict[str, Any] = {"what": what}
    for side, runs in (("ours", ours), ("theirs", theirs)):
        row[side] = {
            "perplexity": median(r["perplexity"] for r in runs),
            "seconds": median(r["seconds"] for r in runs),
            "peak_mb": median(r["peak_mb"] for r in runs),
            "runs": [{k: r[k] for k in ("perplexity", "seconds", "wall", "peak_mb")} for r in runs],
        }
    row["difference_percent"] = 100 * (row["ours"]["perplexity"] / row["theirs"]["perplexity"] - 1)
    pairs = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True) if b["seconds"]]
    row["time_ratio"] = median(pairs) if pairs else None
    return row


def show(rows: list[dict[str, Any]]) -> str:
    head = ("what", "our perplexity", "their perplexity", "difference", "our s", "their s", "ratio")
    return runner.table(
        head,
        [
            (
                r["what"],
                f"{r['ours']['perplexity']:.3f}",
                f"{r['theirs']['perplexity']:.3f}",
                f"{r['difference_percent']:+.2f} %",
                f"{r['ours']['seconds']:.2f}",
                f"{r['theirs']['seconds']:.2f}",
                "" if r["time_ratio"] is None else f"{r['time_ratio']:.2f}",
            )
            for r in rows
        ],
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama-like Hugging Face folder (default: the bundled model)")
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peer/bin/python"))
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    parser.add_argument("--what", nargs="+", default=WHATS, help="experiments (default: all)")
    parser.add_argument("--peer-batch", type=int, default=1, help="windows the peer takes at once (its default: 1)")
    args = parser.parse_args()
    os.environ["PEER_BATCH"] = str(args.peer_batch)
    file = FILE if args.peer_batch == 1 else FILE.replace(".", f"-batch-{args.peer_batch}.")
    model = args.model or demo_model()

    rows: list[dict[str, Any]] = []
    about = {
        "machine": runner.machine(),
        "model": "demo" if args.model is None else model.name,
        "calibration": CALIBRATION,
        "evaluation": EVALUATION,
        "repeats": args.repeats,
        "peer_batch": args.peer_batch,
        "ours": runner.versions(sys.executable, "torch", "transformers"),
        "peer": runner.versions(args.peer_python, "llmcompressor", "torch", "transformers"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npz"
        write_tokens(tokens, model)
        for what in args.what:
            print(what, file=sys.stderr, flush=True)
            rows.append(compare(what, model, tokens, args.peer_python, args.repeats))
            runner.write(file, about | {"rows": rows})
    print(show(rows))


if __name__ == "__main__":
    main()
