"""Measure every score of width_prune with and without repair, and how training heals, and put both into its page.

    python scripts/widths.py [--only scores healed]

Works on the bundled model. Writes docs/widths.json, and replaces what stands between `<!-- scores -->` and
`<!-- /scores -->`, and between the marks of `healed`, in docs/methods/width_prune.md. No number is typed by hand.
"""

import argparse
import json
from typing import Any

from results import ROOT, replace
from torch import Tensor

import compress

RECORD, PAGE = ROOT / "docs" / "widths.json", ROOT / "docs" / "methods" / "width_prune.md"
LENGTH, WINDOWS = 256, 8
SCORES = ("magnitude", "activation", "fluctuation", "taylor", "obs")
# Name of the column -> parts that are made narrower, and what share of them goes.
COLUMNS: dict[str, tuple[tuple[Any, ...], float]] = {
    "mlp 20 %": (("mlp",), 0.2),
    "mlp 40 %": (("mlp",), 0.4),
    "heads and mlp 40 %": (("heads", "mlp"), 0.4),
}
PERP = compress.Perp(train=("bias", "norm", "lora"), objective="next_token", steps=60)
HEALED: dict[str, compress.WidthPrune] = {
    "20 % (mlp; no group goes)": compress.WidthPrune(),
    "40 %, mlp": compress.WidthPrune(sparsity=0.4, parts=("mlp",)),
    "40 %, heads and mlp": compress.WidthPrune(sparsity=0.4),
    "the same by `magnitude` without repair": compress.WidthPrune(sparsity=0.4, score="magnitude", repair="none"),
}


def tokens(samples: int, split: Any = "calibration") -> Tensor:
    _, tokenizer = compress.demo.load()
    return compress.load_tokens("demo", tokenizer, samples=samples, length=LENGTH, split=split)


def perplexities(passes: list[Any], samples: int) -> list[dict[str, Any]]:
    """A row for the original, and one behind each pass."""
    model, _ = compress.demo.load()
    judged = tokens(WINDOWS, "evaluation")
    rows = compress.apply(model, passes, tokens(samples), evaluation=judged, inplace=True).report.rows
    return [{"perplexity": row.perplexity, "bytes": row.bytes} for row in rows]


def scores() -> list[dict[str, Any]]:
    """Every score with every repair that goes with it, nothing healed."""
    found = []
    for score in SCORES:
        for repair in ("none", "least_squares") if score != "obs" else ("least_squares",):
            row: dict[str, Any] = {"score": score, "repair": repair}
            for column, (parts, share) in COLUMNS.items():
                pass_ = compress.WidthPrune(sparsity=share, parts=parts, score=score, repair=repair)  # type: ignore[arg-type]
                first, last = perplexities([pass_], samples=16)
                row |= {column: last["perplexity"], "original": first["perplexity"]}
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def healed() -> list[dict[str, Any]]:
    """Pruned, and then trained."""
    found = []
    for name, pass_ in HEALED.items():
        before, pruned, after = perplexities([pass_, PERP], samples=64)
        found.append(
            {"pruned by": name, "weights": pruned["bytes"] / before["bytes"], "pruned": pruned["perplexity"],
             "healed": after["perplexity"]}
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return found


def scores_shown(rows: list[dict[str, Any]]) -> str:
    lines = [f"| `score` | `repair` | {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * len(COLUMNS)}"]
    for row in rows:
        lines.append(f"| `{row['score']}` | `{row['repair']}` | {' | '.join(f'{row[c]:.2f}' for c in COLUMNS)} |")
    return "\n".join([*lines, "", f"Before anything goes it is {rows[0]['original']:.2f}."])


def healed_shown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | weights | pruned | healed |", "|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['pruned by']} | {100 * row['weights']:.0f} % | {row['pruned']:.2f} | {row['healed']:.2f} |"
        )
    return "\n".join(lines)


TABLES = {"scores": (scores, scores_shown), "healed": (healed, healed_shown)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=TABLES, help="what is measured again; the rest is kept")
    args = parser.parse_args()
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in args.only or TABLES:
        measure, shown = TABLES[name]
        found[name] = measure()
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        replace(PAGE, name, shown(found[name]))


if __name__ == "__main__":
    main()
