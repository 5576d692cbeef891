"""Compress what specialists of the bundled model have learned: how small it becomes, and how much of its use is left.

    python benchmarks/specialists_deltas.py FOLDER

FOLDER is what `specialists.py` wrote; it is made if it is missing. For each specialist the gain is how far it lowers
the perplexity on docstrings of its kind, from modules that it was not trained on; "kept" is the share of it that the
base with the compressed delta has. Prints a table and writes results/specialists_deltas.json.
"""

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import runner
import specialists

import compress

FILE = "specialists_deltas.json"
FORMATS: dict[str, dict[str, Any]] = {
    "compeft, density 0.1": {"compeft": {"density": 0.1}},
    "compeft, density 0.2": {"compeft": {"density": 0.2}},
    "compeft, density 0.3": {"compeft": {}},
    "compeft, density 0.5": {"compeft": {"density": 0.5}},
    "bitdelta, 1 bit": {"bitdelta": {"steps": 0}},
    "bitdelta, 1 bit, 100 steps": {"bitdelta": {"steps": 100, "learning_rate": 1e-2}},
}


def measured(folder: Path, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One format on one specialist."""
    ((key, options),) = entry.items()
    data = {split: {"source": str(folder / f"{kind}-{split}.jsonl"), "samples": 40, "length": specialists.LENGTH}
            for split in ("calibration", "evaluation")}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = {
            "calibration": data["calibration"],
            "evaluate": data["evaluation"],
            "passes": [{key: {"models": [str(folder / kind)], **options}}],
        }
        report = compress.run(pipeline, "demo", f"{scratch}/out")
        size = Path(f"{scratch}/out/delta/delta.safetensors").stat().st_size
    base, tuned, made = (row.perplexity for row in report.rows)
    return {
        "base": base, "tuned": tuned, "made": made, "kept": (base - made) / (base - tuned), "bytes": size,
        "smaller": report.rows[1].bytes / size,
    }  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not all((folder / kind).is_dir() for kind in specialists.KINDS):
        specialists.make(folder)
    rows: list[dict[str, Any]] = []
    for name, entry in FORMATS.items():
        rows.append({"format": name} | {kind: measured(folder, kind, entry) for kind in specialists.KINDS})
        print(rows[-1], file=sys.stderr, flush=True)
    print(show(rows))
    runner.write(FILE, {"machine": runner.machine(), "rows": rows})


def show(rows: list[dict[str, Any]]) -> str:
    head = ("format", "times smaller", *(f"gain kept: {kind}" for kind in specialists.KINDS))
    return runner.table(
        head,
        [
            (
                row["format"],
                f"{row[specialists.KINDS[0]]['smaller']:.1f}",
                *(f"{row[kind]['kept']:.1%}" for kind in specialists.KINDS),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
