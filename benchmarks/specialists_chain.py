"""Merge specialists and compress the result, all in one file: what each pass does to every task, and what a kill does.

    python benchmarks/specialists_chain.py FOLDER [--kills 6]

FOLDER is what `specialists.py` wrote; it is made if it is missing. Runs merge, pruning, retraining, quantization and
correction once without interruption; then once more, killed (SIGKILL) after random times and called again until it is
done, and compares every file of the two results. Prints the report and writes results/specialists_chain.json.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import runner
import specialists
import yaml

FILE = "specialists_chain.json"
MEASURED = ("seconds", "peak_mb")  # what differs between two runs of the same


def pipeline(folder: Path) -> dict[str, Any]:
    def data(split: str) -> dict[str, Any]:
        files = {kind: str(folder / f"{kind}-{split}.jsonl") for kind in specialists.KINDS}
        return {"source": files, "samples": 40, "length": specialists.LENGTH}

    models = [str(folder / kind) for kind in specialists.KINDS]
    return {
        "calibration": data("calibration"),
        "evaluate": data("evaluation"),
        "passes": [
            {"task_arithmetic": {"models": models, "scale": 0.4}},
            {"wanda": {"sparsity": "2:4", "update": "exact"}},
            {"perp": {"train": ["bias", "norm", "full"], "learning_rate": 1e-3, "steps": 60}},
            {"flexround": {"scheme": "w4g64", "steps": 100}},
            {"eora": {"rank": 8}},
        ],
    }


def start(file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compress", "run", str(file), "demo", "-o", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file; of the report without what measures time and memory."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        data = path.read_bytes()
        if path.name == "report.json":
            data = json.dumps(without(json.loads(data))).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if k not in MEASURED}
    return [without(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    args = parser.parse_args()
    if not all((args.folder / kind).is_dir() for kind in specialists.KINDS):
        specialists.make(args.folder)
    file = args.folder / "chain.yaml"
    file.write_text(yaml.safe_dump(pipeline(args.folder), sort_keys=False))
    whole, killed = args.folder / "whole", args.folder / "killed"
    for out in (whole, killed):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}.work", ignore_errors=True)
    assert start(file, whole).wait() == 0
    rows = json.loads((whole / "report.json").read_text())["rows"]
    longest = sum(row["seconds"] for row in rows) / args.kills
    moments, kills = random.Random(0), 0
    while True:
        process = start(file, killed)
        try:
            limit = 10 + moments.uniform(0.2, 1.5) * longest if kills < args.kills else None
            assert process.wait(limit) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    same = contents(whole) == contents(killed)
    found = {"machine": runner.machine(), "kills": kills, "same": same, "rows": rows}
    print(said(found))
    runner.write(FILE, found)
    sys.exit(not same)


def said(found: dict[str, Any]) -> str:
    """The report as a table, and what killing did."""
    files = "every file of the result is the same" if found["same"] else "THE RESULTS DIFFER"
    return f"{show(found['rows'])}\n\nKilled {found['kills']} times: {files}."


def show(rows: list[dict[str, Any]]) -> str:
    head = ("after", *specialists.KINDS, "all", "MB", "seconds")
    return runner.table(
        head,
        [
            (
                Path(row["name"]).name,
                *(f"{row['sources'][kind]['perplexity']:.2f}" for kind in specialists.KINDS),
                f"{row['perplexity']:.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
