"""Merge models from folder to folder, this package beside mergekit: the same numbers, then time and memory.

    python benchmarks/merge.py FOLDER --peer-python .venv-mergekit/bin/python

Equality: three tiny float32 models; every tensor of both results is compared. dare_linear drops at random, so both are
given the masks of ours: the fine-tunes are written with the dropped entries put back to the base's, and density 1.

Time and memory: copies of the random Llama checkpoint (22 blocks: 1.1 billion parameters, 2.2 GB in bfloat16)
with noise, written into FOLDER where they are missing; each run in a process of its own. Prints a table and keeps it in
results/merge.json.

seconds  from the first read to the finished folder; "with imports" is the whole process
peak     largest resident memory; also counts pages mapped from the checkpoint, which can be dropped at any time
private  the same without mapped pages (sampled; only on Linux)
"""

import json
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import checkpoint
import memory
import runner
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FILE = "merge.json"
NOISE = 1e-3
CLOSE = 1e-6  # entries further apart are counted: of ties' equal magnitudes at the cut each tool keeps others
OTHERS = 3  # beside the base

# Our pass beside the peer's method, its parameters and those of each model.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"average": {"weights": [1.0, 0.5, 2.0]}}, {"merge_method": "linear", "weights": [1.0, 0.5, 2.0]}),
    "slerp": ({"slerp": {"t": [0.0, 0.7, 0.3]}}, {"merge_method": "slerp", "parameters": {"t": [0.0, 0.7, 0.3]}}),
    "task_arithmetic": (
        {"task_arithmetic": {"scale": 0.5, "weights": [1.0, 0.5]}},
        {"merge_method": "task_arithmetic", "weights": [1.0, 0.5], "parameters": {"lambda": 0.5}},
    ),
    "ties": (
        {"ties": {"density": 0.2, "weights": [1.0, 0.5], "scale": 0.5, "tie": "positive"}},
        {"merge_method": "ties", "weights": [1.0, 0.5], "density": 0.2, "parameters": {"lambda": 0.5}},
    ),
    "dare_linear": (
        {"dare": {"density": 1.0, "weights": [1.0, 0.5]}},
        {"merge_method": "dare_linear", "weights": [1.0, 0.5], "density": 1.0},
    ),
    "breadcrumbs": (
        {"breadcrumbs": {"density": 0.6, "gamma": 0.1, "weights": [1.0, 0.5], "scale": 0.5}},
        {
            "merge_method": "breadcrumbs",
            "weights": [1.0, 0.5],
            "density": 0.6,
            "parameters": {"lambda": 0.5, "gamma": 0.1},
        },
    ),
    "breadcrumbs_ties": (
        {"breadcrumbs": {"density": 0.6, "gamma": 0.1, "merge": "ties", "tie": "positive", "weights": [1.0, 0.5]}},
        {
            "merge_method": "breadcrumbs_ties",
            "weights": [1.0, 0.5],
            "density": 0.6,
            "parameters": {"gamma": 0.1},
        },
    ),
    "model_stock": ({"model_stock": {}}, {"merge_method": "model_stock"}),
    "nuslerp": ({"nuslerp": {"weights": [1.0, 0.5]}}, {"merge_method": "nuslerp", "weights": [1.0, 0.5]}),
}
TIMED = ("linear", "slerp", "task_arithmetic", "ties")


def configured(method: str, models: list[Path], dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our pipeline and the peer's configuration; the first model is the base."""
    (ours, theirs), count = METHODS[method], len(models)
    ((key, options),) = ours.items()
    options = {**options, "models": [str(m) for m in models[1:]]}
    theirs = dict(theirs)
    weights = theirs.pop("weights", None)
    density = theirs.pop("density", None)
    given = models if method in ("linear", "slerp") else models[1:]
    if weights is not None:
        weights = (weights * count)[: len(given)]
        options["weights"] = weights
    entries: list[dict[str, Any]] = [{"model": str(m)} for m in given]
    for i, entry in enumerate(entries):
        own = {} if weights is None else {"weight": weights[i]}
        if density is not None:
            own["density"] = density
        if own:
            entry["parameters"] = own
    base = {} if method == "linear" else {"base_model": str(models[0])}
    peer = {**theirs, **base, "models": entries, "dtype": "float32", "out_dtype": dtype}
    return {"passes": [{key: options}]}, peer


def write_changed(source: Path, folder: Path, seed: int) -> None:
    """A copy with noise on every tensor, shard by shard."""
    if (folder / checkpoint.DONE).exists():
        return
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", checkpoint.DONE), dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(source.glob("*.safetensors")):
        changed = {
            name: (v.float() + NOISE * torch.empty(v.shape).normal_(generator=generator)).to(v.dtype)
            for name, v in load_file(file).items()
        }
        save_file(changed, folder / file.name, {"format": "pt"})
    shutil.copyfile(source / checkpoint.DONE, folder / checkpoint.DONE)


def small_models(folder: Path) -> list[Path]:
    """A tiny float32 Llama and two others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "small-0"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(base)
    found = [base]
    for seed in (1, 2):
        other = folder / f"small-{seed}"
        shutil.rmtree(other, ignore_errors=True)
        write_changed(base, other, seed)
        found.append(other)
    return found


def with_our_masks(models: list[Path], folder: Path, density: float = 0.5) -> list[Path]:
    """Fine-tunes whose dropped entries are the base's and whose others are rescaled, as our `dare` drops them."""
    import compress

    found = [models[0]]
    for i, model in enumerate(models[1:]):
        out = folder / f"masked-{i}"
        shutil.rmtree(out, ignore_errors=True)
        steps = {"passes": [{"dare": {"models": [str(model)], "density": density}}], "seed": i, "export": ["hf"]}
        compress.run(steps, models[0], folder / "masked.out", overwrite=True)
        shutil.copytree(folder / "masked.out" / "hf", out)
        found.append(out)
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            values |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return values


def differences(folder: Path, peer_python: Path) -> list[dict[str, Any]]:
    models = small_models(folder)
    rows = []
    for method in METHODS:
        given = models[:2] if method == "slerp" else models
        if method == "dare_linear":
            given = with_our_masks(models, folder)
        pipeline, peer = configured(method, given, "float32")
        results = {}
        for side, python, config in (("ours", sys.executable, pipeline), ("peer", peer_python, peer)):
            out = folder / f"out-{side}"
            shutil.rmtree(out, ignore_errors=True)
            start(side, python, config, given[0], out, folder)
            results[side] = tensors(out)
        ours, theirs = results["ours"], results["peer"]
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        apart = torch.cat([(ours[n].float() - theirs[n].float()).abs().flatten() for n in ours])
        close = apart < CLOSE
        rows.append({
            "method": method, "numbers": len(apart), "equal": int((apart == 0).sum()), "apart": int((~close).sum()),
            "largest_difference": float(apart[close].max()),
        })  # fmt: skip
    return rows


def start(
    side: str, python: Path | str, config: dict[str, Any], model: Path, out: Path, folder: Path
) -> dict[str, Any]:
    file = folder / f"{side}.json"  # YAML too
    file.write_text(json.dumps(config))
    return runner.run(python, f"merge_{side}.py", file, model, out)


def timed(folder: Path, layers: int, method: str, side: str, python: Path | str) -> dict[str, Any]:
    base = folder / f"layers-{layers}"
    checkpoint.write(base, layers)
    others = [folder / f"layers-{layers}-{k}" for k in range(1, OTHERS + 1)]
    for seed, other in enumerate(others):
        write_changed(base, other, seed)
    # As many models are read by all: three fine-tunes; the base of a task vector comes on top.
    models = others[:2] if method == "slerp" else others if method == "linear" else [base, *others]
    config = configured(method, models, "bfloat16")[side == "peer"]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    for model in models:
        memory.read_once(model)
    result = start(side, python, config, models[0], out, folder)
    shutil.rmtree(out)
    return {"layers": layers, "method": method, "models": len(models), **result}


def show(rows: list[dict[str, Any]]) -> str:
    head = ("method", "tool", "blocks", "models", "seconds", "with imports", "peak MiB", "private MiB")
    return runner.table(
        head,
        [
            (r["method"], r["tool"], r["layers"], r["models"], f"{r['seconds']:.1f}", f"{r['wall']:.1f}", r["peak_mb"],
             r["anonymous_mb"])
            for r in rows
        ],
        text_columns=2,
    )  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints and results of the runs go")
    parser.add_argument("--layers", type=int, default=22, help="number of blocks; 0: only whether the numbers agree")
    parser.add_argument("--methods", nargs="+", choices=TIMED, default=list(TIMED))
    parser.add_argument("--sides", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-mergekit/bin/python"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = runner.RESULTS / FILE
    earlier: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    rows = {(r["method"], r["tool"]): r for r in earlier.get("rows", [])}
    about = {
        "machine": runner.machine(),
        "peer": runner.versions(args.peer_python, "mergekit", "torch", "transformers"),
        "equality": differences(args.folder, args.peer_python),
    }
    print(
        runner.table(
            ("method", "numbers", "equal", "largest difference of the others", f"over {CLOSE}"),
            [
                (r["method"], r["numbers"], r["equal"], f"{r['largest_difference']:.1e}", r["apart"])
                for r in about["equality"]
            ],
        )
    )
    pythons = {"ours": sys.executable, "peer": args.peer_python}
    for method in args.methods if args.layers else ():
        for side in args.sides:
            print(f"{side} {method}, {args.layers} blocks", file=sys.stderr, flush=True)
            row = timed(args.folder, args.layers, method, side, pythons[side])
            rows[row["method"], row["tool"]] = row
            runner.write(FILE, about | {"rows": [rows[key] for key in sorted(rows)]})
    runner.write(FILE, about | {"rows": [rows[key] for key in sorted(rows)]})
    print(show([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
