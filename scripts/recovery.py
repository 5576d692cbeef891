"""Measure how much of what pruning loses each way of recovering brings back, and put it into docs/results.md.

    python scripts/recovery.py [--only 50% 2:4 70%]

Everything learns from the same calibration data. Writes docs/recovery.json, and replaces the table between
`<!-- recovery -->` and `<!-- /recovery -->` in docs/results.md. No number is typed by hand.
"""

import argparse
import json
import tempfile
from typing import Any

from results import PAGE, ROOT, replace

import compress
from compress.report.report import size_text

RECORD = ROOT / "docs" / "recovery.json"
DATA = {"calibration": {"samples": 256, "length": 512}, "evaluate": {"samples": 64, "length": 512}}
SPARSITIES: dict[str, Any] = {"50%": 0.5, "2:4": "2:4", "70%": 0.7}
STEPS = 100
FEW = {"rank": 3, "learning_rate": 5e-3, "steps": STEPS}
FULL = {"train": ["bias", "norm", "full"], "learning_rate": 2e-3, "steps": STEPS}
BEHIND: list[dict[str, Any]] = [
    {"gptq": {"scheme": "w4g64"}},
    {"eora": {"rank": None, "budget": 0.25, "adapter_bits": 4}},
]


def recipes(sparsity: Any) -> dict[str, list[dict[str, Any]]]:
    """Name of the row -> the passes; what stands in BEHIND has rows of its own."""
    refit = {"wanda": {"sparsity": sparsity, "update": "exact"}}
    found: dict[str, list[dict[str, Any]]] = {}
    if isinstance(sparsity, float):
        cut = {"global_magnitude": {"sparsity": sparsity}}
        found = {
            "global_magnitude": [cut],
            "... then perp, rank 3 (1.6% of the parameters)": [cut, {"perp": FEW}],
            "... then perp, all that is kept": [cut, {"perp": FULL}],
        }
    found |= {
        "wanda": [{"wanda": {"sparsity": sparsity}}],
        "sparsegpt": [{"sparsegpt": {"sparsity": sparsity}}],
        "wanda with `update: exact`": [refit],
        "... then perp_reconstruct": [refit, {"perp_reconstruct": {"learning_rate": 2e-3, "steps": 100}}],
        "... then perp, all kept weights": [refit, {"perp": FULL}, *BEHIND],
    }
    if sparsity == 0.7:
        found["... then sparse_soup of three"] = [refit, {"sparse_soup": {**FULL, "steps": 60}}]
    return found


def measure(sparsity: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, passes in recipes(SPARSITIES[sparsity]).items():
        with tempfile.TemporaryDirectory() as folder:
            rows = compress.run({**DATA, "passes": passes}, "demo", f"{folder}/out").rows
        if not found:
            found.append(row(sparsity, "the original", rows[0], 0.0))
        pruned = 2 if len(passes) > 1 else 1  # the rows that stand for this name; those behind have their own
        seconds = sum(r.seconds for r in rows[: pruned + 1])
        found.append(row(sparsity, name, rows[pruned], seconds))
        if len(rows) == 5:
            found.append(row(sparsity, "... ... then 4 bits by gptq", rows[3], seconds + rows[3].seconds))
            found.append(
                row(
                    sparsity,
                    "... ... then eora, a quarter of a bit",
                    rows[4],
                    seconds + rows[3].seconds + rows[4].seconds,
                )
            )
        print(json.dumps(found[-1]), flush=True)
    return found


def row(sparsity: str, name: str, measured: Any, seconds: float) -> dict[str, Any]:
    return {
        "zeros": sparsity,
        "recipe": name,
        "perplexity": measured.perplexity,
        "kl": measured.kl,
        "bytes": measured.bytes,
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| zeros | recipe | perplexity | KL | weights | seconds |", "|---|---|---:|---:|---:|---:|"]
    for number, r in enumerate(rows):
        if r["recipe"] == "the original" and number:
            continue
        zeros, kl = ("", "") if r["kl"] is None else (r["zeros"], f"{r['kl']:.4f}")
        lines.append(
            f"| {zeros} | {r['recipe']} | {r['perplexity']:.2f} | {kl} | {size_text(r['bytes'])} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="sparsities to measure again; the others' results are kept")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for sparsity in args.only or SPARSITIES:
        found[sparsity] = measure(sparsity)
        RECORD.write_text(json.dumps({s: found[s] for s in SPARSITIES if s in found}, indent=1) + "\n")
    replace(PAGE, "recovery", table([r for s in SPARSITIES for r in found.get(s, [])]))


if __name__ == "__main__":
    main()
