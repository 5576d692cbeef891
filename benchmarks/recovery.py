"""How much of what llm-compressor's pruners lose our recipe of this package brings back, on the bundled model.

    python benchmarks/recovery.py --peer-python .venv-peer/bin/python

Runs the peer on the tokens that `scripts/recovery.py` used; its record, docs/recovery.json, has our side. Prints a
table and writes results/recovery.json.

closed  the share of the way from their better perplexity down to the dense model's that ours goes; above 1 it is
        better than the dense model
"""

import json
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import quality
import runner

SPARSITIES = {"0.5": "50%", "2:4": "2:4", "0.7": "70%"}
OURS = "... then perp, all kept weights"
FILE = "recovery.json"
RECORD = Path(__file__).parent.parent / "docs" / "recovery.json"


def show(rows: list[dict[str, Any]]) -> str:
    head = ("sparsity", "dense", "their wanda", "their sparsegpt", "ours", "closed", "our s", "their s")
    return runner.table(
        head,
        [
            (
                r["sparsity"],
                *(f"{r[key]:.2f}" for key in ("dense", "wanda", "sparsegpt", "ours")),
                f"{r['closed']:.0%}",
                f"{r['our_seconds']:.0f}",
                f"{r['their_seconds']:.0f}",
            )
            for r in rows
        ],
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peer/bin/python"))
    args = parser.parse_args()
    quality.CALIBRATION = (256, 512)
    model, rows = quality.demo_model(), []
    record = json.loads(RECORD.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npz"
        quality.write_tokens(tokens, model)
        for sparsity, name in SPARSITIES.items():
            ours = {row["recipe"]: row for row in record[name]}
            dense = ours["the original"]["perplexity"]
            print(sparsity, file=sys.stderr, flush=True)
            theirs = {
                method: runner.run(args.peer_python, "peer.py", model, tokens, f"{method}:{sparsity}")
                for method in ("wanda", "sparsegpt")
            }
            best = min(theirs.values(), key=lambda found: found["perplexity"])
            rows.append(
                {
                    "sparsity": sparsity,
                    "dense": dense,
                    **{method: found["perplexity"] for method, found in theirs.items()},
                    "ours": ours[OURS]["perplexity"],
                    "closed": (best["perplexity"] - ours[OURS]["perplexity"]) / (best["perplexity"] - dense),
                    "our_seconds": ours[OURS]["seconds"],
                    "their_seconds": best["seconds"],
                }
            )
            about = {"machine": runner.machine(), "calibration": quality.CALIBRATION, "evaluation": quality.EVALUATION}
            runner.write(FILE, about | {"peer": runner.versions(args.peer_python, "llmcompressor"), "rows": rows})
    print(show(rows))


if __name__ == "__main__":
    main()
