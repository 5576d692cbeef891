"""Run the ready-made pipelines on the bundled model and put their results into the documentation.

    python scripts/results.py [--only gptq-w4 ...]

Writes docs/results.json, and replaces the table between `<!-- results -->` and `<!-- /results -->` in docs/results.md,
the short one in README.md, and the rows between `<!-- measured -->` and `<!-- /measured -->` in docs/methods/*.md. No
number is typed by hand. Afterwards scripts/choosing.py puts them into the package.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import compress
from compress.report.report import size_text

ROOT = Path(__file__).parent.parent
PRESETS = ROOT / "compress" / "config" / "presets"
RESULTS = ROOT / "docs" / "results.json"
PAGE = ROOT / "docs" / "results.md"
HIGHLIGHTS = {  # pipelines on the first screen, and what they are in a few words
    "gptq-w4": "4 bits by GPTQ",
    "flexround-w3": "3 bits, rounding learned",
    "flexround-w2": "2 bits, rounding learned",
    "sparsegpt-50-gptq-w4-eora": "half of the weights, 4 bits, a correction",
    "wanda-2of4-perp": "2 of every 4 weights, retrained",
}


def run(name: str) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        report = compress.run(name, "demo", f"{folder}/out")
        file = (Path(folder) / "out" / "compress.safetensors").stat().st_size
    return [{**vars(row), "file": file, "data": report.data} for row in report.rows]


def table(results: dict[str, list[dict[str, object]]], names: list[str]) -> str:
    lines = [
        "| pipeline | perplexity | change | KL | weights | bits/weight | zeros |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = results[names[0]][0]
    lines.append(line("the original", first))
    lines += [line(f"[{name}](../compress/config/presets/{name}.yaml)", results[name][-1]) for name in names]
    d = first["data"]
    lines.append("")
    lines.append(
        f"Perplexity on documentation the model never saw: {d['tokens']} tokens in windows of {d['length']}; KL to the "
        "original in nats per token; bits per weight over the matrices inside the blocks, everything stored counted."
    )
    return "\n".join(lines)


def highlights(results: dict[str, list[dict[str, object]]]) -> str:
    """The few rows that README.md shows."""
    lines = ["| | perplexity | KL | weights | bits/weight |", "|---|---:|---:|---:|---:|"]
    rows = [("the original, 16 bits", results[next(iter(HIGHLIGHTS))][0])]
    rows += [(f"{words}: `{name}`", results[name][-1]) for name, words in HIGHLIGHTS.items()]
    for name, row in rows:
        kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
        lines.append(
            f"| {name} | {row['perplexity']:.2f} | {kl} | {size_text(row['bytes'])} | {row['bits_per_weight']:.2f} |"
        )
    return "\n".join(lines)


def line(name: str, row: dict[str, object]) -> str:
    change = "" if row["change"] is None else f"{row['change']:+.2%}"
    kl = "" if row["kl"] is None else f"{row['kl']:.4f}"
    return (
        f"| {name} | {row['perplexity']:.2f} | {change} | {kl} | {size_text(row['bytes'])} "
        f"| {row['bits_per_weight']:.2f} | {row['sparsity']:.0%} |"
    )


def replace(path: Path, mark: str, text: str) -> None:
    page = path.read_text()
    new = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.S)
    path.write_text(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="pipelines to run again; none: write what is recorded")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    # A merge of the demo with itself, which stands for a user's models, has nothing to show.
    names = sorted(p.stem for p in PRESETS.glob("*.yaml") if not p.stem.startswith("merge-"))
    for name in names if args.only is None else args.only:
        results[name] = run(name)
        print(line(name, results[name][-1]), flush=True)
    RESULTS.write_text(json.dumps({n: results[n] for n in names if n in results}, indent=1) + "\n")
    names = sorted((n for n in names if n in results), key=lambda n: results[n][-1]["perplexity"])
    replace(PAGE, "results", table(results, names))
    replace(ROOT / "README.md", "highlights", highlights(results))
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        method = page.stem
        rows = [n for n in names if any(method == r["name"] for r in results[n])]
        if rows:
            replace(page, "measured", table(results, rows).replace("](../compress/", "](../../compress/"))


if __name__ == "__main__":
    main()
