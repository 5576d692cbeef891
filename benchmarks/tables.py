"""Put results/*.json into its README.md and pages of docs/: no number is typed by hand.

python benchmarks/tables.py
"""

import json
import re
from pathlib import Path
from typing import Any

import coded_adapters
import digits
import experts
import forecast
import generate
import memory
import merge
import quality
import recovery
import runner
import specialists_chain
import specialists_deltas

PAGE = Path(__file__).parent / "README.md"
EXPORTS = Path(__file__).parent.parent / "docs" / "exports.md"
MERGING = Path(__file__).parent.parent / "docs" / "merging.md"
METHODS = Path(__file__).parent.parent / "docs" / "methods"


def loaded(rows: list[dict[str, float]]) -> str:
    head = ("model", "file MB", "parameters MB", "in float32 MB", "grown by loading MB", "grown by a call MB")
    keys = ("file_mb", "parameters_mb", "float32_mb", "grown_by_loading_mb", "grown_by_a_call_mb")
    return runner.table(head, [(row["model"], *(row[k] for k in keys)) for row in rows])


def layers(found: dict[str, Any]) -> str:
    head = ("weights", "file MB", "memory to load MB", "ms", "times as quick as float32")
    rows = [
        (r["weights"], f"{r['bytes'] / 1e6:.1f}", f"{r['load_memory'] / 1e6:.1f}", f"{r['ms']:.2f}",
         f"{r['times_float32']:.1f}")
        for r in found["rows"]
    ]  # fmt: skip
    return runner.table(head, rows)


def large(found: dict[str, Any]) -> str:
    made, run = found["export"], found["generate"]
    head = (
        "packed MB",
        "exported MB",
        "seconds",
        "peak MiB",
        "logits differ by",
        "memory to load MB",
        "tokens per second",
    )
    row = (
        f"{found['packed_bytes'] / 1e6:.0f}", f"{run['bytes'] / 1e6:.0f}", f"{made['seconds']:.0f}", made["peak_mb"],
        f"{made['max_logit_difference']:.1g}", f"{run['load_memory'] / 1e6:.0f}", f"{run['tokens_per_second']:.0f}",
    )  # fmt: skip
    return runner.table(head, [row])


def put(page: Path, name: str, text: str) -> None:
    """Between the marks of that name."""
    new = re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
        lambda m: f"{m[1]}{text.rstrip()}\n{m[2]}",
        page.read_text(),
        flags=re.S,
    )
    page.write_text(new)


def main() -> None:
    for name, show in (
        ("quality", quality.show),
        ("recovery", recovery.show),
        ("learned", quality.show),
        ("memory", memory.show),
        ("load", loaded),
        ("generate", generate.show),
        ("merge", merge.show),
        ("digits", digits.show),
        ("forecast", forecast.show),
        ("specialists_deltas", specialists_deltas.show),
    ):
        file = runner.RESULTS / f"{name}.json"
        if file.exists():
            put(PAGE, name, show(json.loads(file.read_text())["rows"]))
    file = runner.RESULTS / specialists_chain.FILE
    if file.exists():
        for page in (PAGE, MERGING):
            put(page, "chain", specialists_chain.said(json.loads(file.read_text())))
    file = runner.RESULTS / specialists_deltas.FILE
    for page in (METHODS / "compeft.md", METHODS / "bitdelta.md") if file.exists() else ():
        put(page, "specialists_deltas", specialists_deltas.show(json.loads(file.read_text())["rows"]))
    for name, shown, method in (
        ("digits", digits.show_losses, "adamerging"),
        ("experts", experts.show, "expert_merge"),
        ("experts_copies", experts.show_copies, "expert_merge"),
        ("coded_adapters", coded_adapters.show, "compeft"),
    ):
        put(METHODS / f"{method}.md", name, shown(json.loads((runner.RESULTS / f"{name}.json").read_text())["rows"]))
    for name, shown in (("onnx-layers", layers), ("onnx-memory", large)):
        file = runner.RESULTS / f"{name.replace('-', '_')}.json"
        if file.exists():
            put(EXPORTS, name, shown(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
