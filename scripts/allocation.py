"""Measure what each way of allocating sparsity does at 70 %, and put the table into docs/allocation.md.

    python scripts/allocation.py

Replaces the table between `<!-- allocation -->` and `<!-- /allocation -->`. No number is typed by hand.
"""

import tempfile
from typing import Any

from results import ROOT, replace

import compress

DATA = {"calibration": {"samples": 128, "length": 256}, "evaluate": {"samples": 64, "length": 512, "after": "end"}}
PRUNERS = ("wanda", "sparsegpt")
WAYS: list[dict[str, Any]] = [
    {"allocate": "uniform"},
    {"allocate": "owl"},
    {"allocate": "owl", "spread": 0.04},
    {"allocate": "alphapruning"},
    {"allocate": "alphapruning", "spread": 0.05, "allocate_by": "site"},
    {"allocate": "farms"},
    {"allocate": "farms", "spread": 0.05, "allocate_by": "site"},
    {"allocate": "global"},
]


def perplexity(pruner: str, options: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        steps = {**DATA, "passes": [{pruner: {"sparsity": 0.7, **options}}]}
        found = compress.run(steps, "demo", f"{folder}/out").rows[-1].perplexity
    assert found is not None
    print(pruner, options, round(found, 2), flush=True)
    return found


def main() -> None:
    lines = ["| allocation | " + " | ".join(PRUNERS) + " |", "|---|" + "---:|" * len(PRUNERS)]
    for options in WAYS:
        said = ", ".join(f"{key}: {value}" for key, value in options.items())
        lines.append(f"| `{said}` | " + " | ".join(f"{perplexity(p, options):.2f}" for p in PRUNERS) + " |")
    replace(ROOT / "docs" / "allocation.md", "allocation", "\n".join(lines))


if __name__ == "__main__":
    main()
