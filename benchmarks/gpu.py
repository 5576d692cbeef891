"""Passes and kernels on a graphics processor: a random model of the shape of a Llama of 8 B, a few blocks of it.

    python benchmarks/gpu.py [--smoke] [--only PART ...] [--blocks 4]

Needs no network, and of this repository only `compress` and this folder. `--smoke` runs everything on the processor,
with a tiny model, to see that it runs. Prints one table, and keeps it in results/gpu.json where it ran on a device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent)]

import compress  # noqa: E402
from compress.passes import Pass  # noqa: E402
from compress.planning.places import device_name  # noqa: E402

RESULTS = ROOT / "results" / "gpu.json"
LIMIT = "3.8GB"  # of the device, in the row that says so


@dataclass(frozen=True)
class Size:
    """Shape of the model and of the calibration data."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    samples: int
    length: int
    steps: int


FULL = Size(4096, 14336, 32, 8, 32_000, 128, 2048, 200)
SMOKE = Size(128, 256, 4, 2, 256, 8, 64, 4)


@dataclass(frozen=True)
class Row:
    """A line of the table. `value` is in `unit`; `memory` is the largest that the device held, in GB."""

    what: str
    value: float
    unit: str
    memory: float | None = None
    note: str = ""


def model_of(size: Size, blocks: int, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=blocks, vocab_size=size.vocabulary,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=size.length,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens_of(size: Size) -> Tensor:
    return torch.randint(size.vocabulary, (size.samples, size.length), generator=torch.Generator().manual_seed(1))


def group_of(size: Size) -> int:
    return 32 if size is SMOKE else 128


def passes(size: Size) -> dict[str, tuple[Pass, int]]:
    """Name -> a pass, and on how many blocks it is measured at most."""
    return {
        "rtn": (compress.Rtn(bits=4, group_size=group_of(size)), 4),
        "wanda": (compress.Wanda(sparsity=0.5), 4),
        "gptq": (compress.Gptq(bits=4, group_size=group_of(size)), 4),
        "sparsegpt": (compress.SparseGpt(sparsity="2:4"), 4),
        "flexround": (
            compress.FlexRound(bits=4, group_size=group_of(size), steps=size.steps, batch_size=8), 1,
        ),
    }  # fmt: skip


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds, and the most that the device held meanwhile, in GB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9
    return time.perf_counter() - start, None


def warm_up(size: Size, pass_: Pass, device: torch.device) -> None:
    """Compile and load what a pass needs."""
    tokens = tokens_of(size)
    compress.apply(model_of(size, 1, device), [pass_], tokens[: max(8, len(tokens) // 16)], inplace=True)


def passes_in_memory(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """`compress.apply` with each pass, per block; the model is on the device already."""
    tokens = tokens_of(size)
    for name, (pass_, blocks) in passes(size).items():
        count = min(blocks, most)
        warm_up(size, pass_, device)
        model = model_of(size, count, device)
        held = sum(p.nbytes for p in model.parameters()) / 1e9
        seconds, memory = timed(device, lambda m=model, p=pass_: compress.apply(m, [p], tokens, inplace=True))  # type: ignore[misc]
        yield Row(
            f"{name}, per block", seconds / count, "s", memory, f"{count} blocks, whose model takes {held:.2f} GB"
        )
        del model


def within_a_limit(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """Gptq where passes may take LIMIT of the device beside the model: hidden states wait in the host's memory."""
    limits: dict[str, Any] = {"max_memory": {"device": LIMIT}} if device.type == "cuda" else {}
    pass_, _ = passes(size)["gptq"]
    warm_up(size, pass_, device)
    model = model_of(size, 1, device)
    held = sum(p.nbytes for p in model.parameters()) / 1e9
    work = partial(compress.apply, model, [pass_], tokens_of(size), inplace=True, **limits)
    seconds, memory = timed(device, work)
    yield Row("gptq, activations in the host's memory", seconds, "s", memory, f"1 block; the model takes {held:.2f} GB")


def the_same_twice(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """Whether passes make the same bits when they are repeated, on one block."""
    for name in ("gptq", "sparsegpt", "flexround"):
        pass_, _ = passes(size)[name]
        if name == "flexround":
            pass_ = replace(pass_, steps=min(10, size.steps))
        made = []
        for _ in range(2):
            model = model_of(size, 1, device)
            made.append(compress.apply(model, [pass_], tokens_of(size)[:8], inplace=True).weights)
            del model
        same = all(torch.equal(made[0][site].dequantize(), weight.dequantize()) for site, weight in made[1].items())
        yield Row(f"{name}: the same bits twice", float(same), "1 = yes")


def run_from_disk(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """`compress.run` of gptq, a block on the device at a time, within LIMIT of its memory."""
    limits = {"device": LIMIT} if device.type == "cuda" else {}
    warm_up(size, passes(size)["gptq"][0], device)
    with tempfile.TemporaryDirectory() as folder:
        model_of(size, most, device).to("cpu").save_pretrained(f"{folder}/model")
        steps = {
            "passes": [{"gptq": {"bits": 4, "group_size": group_of(size)}}],
            "device": device.type,
            "max_memory": limits,
        }
        work = partial(compress.run, steps, f"{folder}/model", f"{folder}/out", calibration=tokens_of(size))
        seconds, memory = timed(device, work)
        report = json.loads(Path(folder, "out", "report.json").read_text())
        yield Row("run: gptq from disk, all of it", seconds, "s", memory, f"{most} blocks, at most {LIMIT}")
        yield Row("run: gptq from disk, the pass, per block", report["rows"][-1]["seconds"] / most, "s")


def kernels(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """Packed layers as they are after loading: see gpu_kernels.py, which prints a table of its own."""
    smoke = ["--smoke"] if device.type == "cpu" else []
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if smoke else {})}
    command = [sys.executable, str(ROOT / "gpu_kernels.py"), *smoke, "--seconds", "90"]
    yield Row("kernels", float(subprocess.run(command, env=environment, check=False).returncode), "0 = ran")


PARTS: dict[str, Callable[[Size, int, torch.device], Iterator[Row]]] = {
    "passes": passes_in_memory,
    "limit": within_a_limit,
    "repeats": the_same_twice,
    "disk": run_from_disk,
    "kernels": kernels,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the processor")
    parser.add_argument("--only", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--blocks", type=int, default=4)
    given = parser.parse_args()
    device = torch.device("cpu" if given.smoke else "cuda")
    size = SMOKE if given.smoke else FULL
    rows: list[Row] = []
    for name in given.only:
        try:
            for row in PARTS[name](size, given.blocks, device):
                rows.append(row)
                memory = "" if row.memory is None else f"{row.memory:8.2f} GB"
                print(f"{row.what:48} {row.value:10.3f} {row.unit:8} {memory:12} {row.note}", flush=True)
        except Exception:  # the other parts are worth their time all the same
            traceback.print_exc()
    if not given.smoke:
        RESULTS.write_text(
            json.dumps({"device": device_name(device), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
