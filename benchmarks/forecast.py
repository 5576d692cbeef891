"""What a plan says of memory and disk, beside what the run takes; every pipeline in a process of its own.

    python benchmarks/forecast.py FOLDER [NAME ...]

FOLDER is where models, texts and results go. Memory is the largest resident memory of the process, and disk the most
that lay in the folder of the run at a look every few milliseconds. Prints a table, kept in results/forecast.json. With
names, only these rows are measured again.
"""

import json
import shutil
import subprocess
import sys
import threading
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import runner

LARGE: dict[str, dict[str, int]] = {  # model -> what of it is large
    "WIDE": {"vocab_size": 128_000},
    "BROAD": {"intermediate_size": 5120, "num_hidden_layers": 1},
}
DATA = "source: demo, samples: 16, length: 512"
PIPELINES: dict[str, tuple[str, str]] = {  # name -> model, pipeline
    "rtn": ("demo", f"evaluate: {{{DATA}}}\npasses: [{{rtn: {{bits: 4, group_size: 64}}}}]"),
    "gptq": ("demo", f"calibration: {{{DATA}}}\npasses: [{{gptq: {{bits: 4, group_size: 64}}}}]"),
    "perp": (
        "demo",
        f"calibration: {{{DATA}}}\nevaluate: {{{DATA}}}\npasses: [magnitude, {{perp: {{steps: 4}}}}]",
    ),
    "sparse_soup": ("demo", f"calibration: {{{DATA}}}\npasses: [magnitude, {{sparse_soup: {{steps: 4}}}}]"),
    "merge": ("demo", f"evaluate: {{{DATA}}}\npasses: [{{average: {{models: [demo]}}}}, rtn]"),
    "five exports": (
        "demo",
        "evaluate: {source: demo, samples: 2, length: 64}\n"
        "passes: [{rtn: {bits: 4, group_size: 64, symmetric: true}}]\n"
        "export: [hf, onnx, genai, gguf, compressed-tensors]",
    ),
    "large text": ("demo", "calibration: {source: TEXT, samples: 4, length: 64}\npasses: [{gptq: {group_size: 64}}]"),
    "large vocabulary": ("WIDE", f"evaluate: {{{DATA}}}\npasses: [rtn]"),
    "large vocabulary, perp": (
        "WIDE",
        f"calibration: {{{DATA}}}\nevaluate: {{{DATA}}}\npasses: [magnitude, {{perp: {{steps: 1}}}}]",
    ),
    "many neurons, width_prune": ("BROAD", f"calibration: {{{DATA}}}\npasses: [{{width_prune: {{parts: [mlp]}}}}]"),
    "the same by activation": (
        "BROAD",
        f"calibration: {{{DATA}}}\npasses: [{{width_prune: {{parts: [mlp], score: activation}}}}]",
    ),
    "the same, half of them go": (
        "BROAD",
        f"calibration: {{{DATA}}}\npasses: [{{width_prune: {{parts: [mlp], sparsity: 0.5}}}}, rtn]",
    ),
}
TEXT_BYTES = 8_000_000
FILE = "forecast.json"
LOOK = 0.005  # seconds


def write_text(file: Path) -> None:
    """A text of 8 MB."""
    from compress.demo import data

    text = "\n\n".join(data.texts("calibration"))
    file.write_text((text * (1 + TEXT_BYTES // len(text)))[:TEXT_BYTES], encoding="utf-8")


def write_model(folder: Path, **changes: int) -> None:
    """A random model that is large in one way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from compress.models import hub

    options = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **changes}
    config = LlamaConfig(
        **options, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hub.resolve("demo") / name, folder / name)


def child(pipeline: str, model: str, out: str) -> None:
    """One run, whatever the machine has, and its peak."""
    import common

    import compress
    from compress.planning import resources

    resources.check_resources = lambda *_: None  # type: ignore[assignment]
    compress.run(pipeline, model, out)
    common.report(memory=common.peak_mb() << 20)


def planned(pipeline: Path, model: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "compress", "plan", pipeline, model, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def used(folder: Path) -> int:
    """Bytes on the disk of what a folder holds, a file of several names counted once."""
    sizes = {}
    for file in folder.rglob("*"):
        try:
            facts = file.stat()
        except OSError:
            continue  # renamed since
        sizes[facts.st_ino] = facts.st_blocks * 512
    return sum(sizes.values())


def measured(pipeline: Path, model: str, folder: Path) -> dict[str, int]:
    """The most memory and disk of a run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(LOOK):
            most[0] = max(most[0], used(folder))

    watching = threading.Thread(target=look)
    watching.start()
    try:
        facts = runner.run(sys.executable, "forecast.py", "--child", pipeline, model, folder / "out")
    finally:
        done.set()
        watching.join()
        shutil.rmtree(folder)
    return {"memory": int(facts["memory"]), "disk": most[0]}


def row(name: str, folder: Path) -> dict[str, Any]:
    model, text = PIPELINES[name]
    large, long = folder / model.lower(), folder / "long.txt"
    if model in LARGE and not large.exists():
        write_model(large, **LARGE[model])
    if "TEXT" in text and not long.exists():
        write_text(long)
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(text.replace("TEXT", str(long)), encoding="utf-8")
    model = str(large) if model in LARGE else model
    plan, found = planned(pipeline, model), measured(pipeline, model, folder / "run")
    return {
        "pipeline": name,
        "memory planned": plan["peak_memory"],
        "memory used": found["memory"],
        "when": plan["peak_memory_when"],
        "disk planned": plan["disk"],
        "disk used": found["disk"],
    }


def main() -> None:
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
        return
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models, texts and results go")
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(PIPELINES)}")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = runner.RESULTS / FILE
    rows = {each["pipeline"]: each for each in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for name in args.names or PIPELINES:
        rows[name] = row(name, args.folder)
        print(show([rows[name]]), file=sys.stderr, flush=True)
        runner.write(FILE, {"machine": runner.machine(), "rows": list(rows.values())})
    print(show(list(rows.values())))


def show(rows: list[dict[str, Any]]) -> str:
    head = ("pipeline", "memory planned MB", "used", "planned / used", "disk planned MB", "used", "planned / used")
    table = []
    for r in rows:
        cells: list[object] = [r["pipeline"]]
        for what in ("memory", "disk"):
            plan, use = r[f"{what} planned"], r[f"{what} used"]
            cells += [f"{plan / 1e6:.1f}", f"{use / 1e6:.1f}", f"{plan / use:.2f}"]
        table.append(cells)
    return runner.table(head, table)


if __name__ == "__main__":
    main()
