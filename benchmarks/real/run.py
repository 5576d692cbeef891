"""Run ready-made pipelines on real language models, and write docs/real.md.

    python benchmarks/real/run.py FOLDER                                   # all on both: many hours
    python benchmarks/real/run.py FOLDER --models smollm2 --only gptq-w4 rtn-w4
    python benchmarks/real/run.py FOLDER --missing                         # only what has no result yet

FOLDER holds, or will hold, the models and texts of fetch.py. Pipelines are the ready-made ones with other data:
calibration on web text (C4), evaluation on another text (Wikipedia), so that no method is judged on what it saw.
Results are kept in benchmarks/results/real.json; no number of the page is typed by hand.
"""

import json
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import yaml
from fetch import fetched

import compress
from compress.report.report import size_text

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "compress" / "config" / "presets"
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
PAGE = ROOT / "docs" / "real.md"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M"}
CALIBRATION = {"samples": 64, "length": 512}
EVALUATION = {"samples": 32, "length": 512, "after": "end"}
INTRODUCTION = """# Measured on real models

Ready-made pipelines on language models that arrive in packages of the registry, by
`python benchmarks/real/run.py FOLDER`: {calibration} tokens of web text (C4) for calibration, {evaluation} of
Wikipedia for what is measured. Both models came as files of about 4.5 bits per weight: the weights of SmolLM2 lie near
a 4-bit grid of groups of 32, which flatters 4 bits in groups of 32 and nothing else. Minutes are those of two processor
cores that were shared with other work. KL is that to the original, in nats per token. The file is all that is stored,
embeddings in 16 bits included.
"""


def names() -> list[str]:
    """Ready-made pipelines of one model."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml") if not p.stem.startswith("merge-"))


def measured(name: str, model: Path, texts: Path) -> dict[str, Any]:
    """Run a ready-made pipeline on real texts: what the last row says, bytes of the file, seconds."""
    pipeline = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    if "calibration" in pipeline:
        pipeline["calibration"] |= {"source": str(texts / "c4-calibration.txt"), **CALIBRATION}
    pipeline["evaluate"] = {"source": str(texts / "wiki-evaluation.txt"), **EVALUATION}
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        report = compress.run(pipeline, str(model), f"{folder}/out")
        seconds = time.monotonic() - start
        file = sum(f.stat().st_size for f in (Path(folder) / "out").glob("*.safetensors"))
    first, last = report.rows[0], report.rows[-1]
    return {
        "original": first.perplexity,
        "original_bytes": sum(f.stat().st_size for f in model.glob("*.safetensors")),
        "perplexity": last.perplexity,
        "kl": last.kl,
        "bits_per_weight": last.bits_per_weight,
        "sparsity": last.sparsity,
        "file": file,
        "seconds": seconds,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, the lowest perplexity first."""
    rows = sorted(results.items(), key=lambda item: item[1]["perplexity"])
    first = rows[0][1]
    lines = [
        "| pipeline | perplexity | change | KL | bits/weight | zeros | file | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| the original | {first['original']:.3f} | | | 16.00 | 0% | {size_text(first['original_bytes'])} | |",
    ]
    return "\n".join(lines + [line(name, row) for name, row in rows])


def line(name: str, row: dict[str, Any]) -> str:
    cells = [
        f"[{name}](../compress/config/presets/{name}.yaml)",
        f"{row['perplexity']:.3f}",
        f"{row['perplexity'] / row['original'] - 1:+.2%}",
        f"{row['kl']:.4f}",
        f"{row['bits_per_weight']:.2f}",
        f"{row['sparsity']:.0%}",
        size_text(row["file"]),
        f"{row['seconds'] / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_page(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    sizes = {"calibration": CALIBRATION, "evaluation": EVALUATION}
    parts = [INTRODUCTION.format(**{k: f"{v['samples']} windows of {v['length']}" for k, v in sizes.items()})]
    parts += [f"## {title}\n\n{table(results[model])}\n" for model, title in MODELS.items() if results.get(model)]
    PAGE.write_text("\n".join(parts))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="*", choices=names(), default=names(), metavar="PIPELINE")
    parser.add_argument("--missing", action="store_true", help="leave out what has a result")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    texts = fetched("texts", given.folder)
    for model in given.models:
        folder, kept = fetched(model, given.folder), results.setdefault(model, {})
        for name in given.only:
            if given.missing and name in kept:
                continue
            kept[name] = measured(name, folder, texts)
            print(model, name, kept[name], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_page(results)


if __name__ == "__main__":
    main()
