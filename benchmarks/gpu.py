"""Passes and kernels on a graphics processor: a random model of the shape of a Llama of 8 B, a few blocks of it.

    python benchmarks/gpu.py [--smoke] [--only PART ...] [--blocks 4]

Needs no network, and of this repository only `compress` and this folder. `--smoke` runs everything on the processor,
with a tiny model, to see that it runs. Prints one table, and keeps it in results/gpu.json where it ran on a device.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

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


def passes(size: Size) -> dict[str, tuple[Pass, int]]:
    """Name -> a pass, and on how many blocks it is measured at most."""
    return {
        "rtn": (compress.Rtn(bits=4, group_size=32 if size is SMOKE else 128), 4),
        "wanda": (compress.Wanda(sparsity=0.5), 4),
        "gptq": (compress.Gptq(bits=4, group_size=32 if size is SMOKE else 128), 4),
        "sparsegpt": (compress.SparseGpt(sparsity="2:4"), 4),
        "flexround": (
            compress.FlexRound(bits=4, group_size=32 if size is SMOKE else 128, steps=size.steps, batch_size=8), 1,
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


def passes_in_memory(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """`compress.apply` with each pass, per block; the model is on the device already."""
    tokens = tokens_of(size)
    for name, (pass_, blocks) in passes(size).items():
        count = min(blocks, most)
        first = model_of(size, 1, device)
        few = tokens[: max(8, len(tokens) // 16)]
        compress.apply(first, [pass_], few, inplace=True)  # compiles and loads what is needed
        del first
        model = model_of(size, count, device)
        held = sum(p.nbytes for p in model.parameters()) / 1e9
        seconds, memory = timed(device, lambda m=model, p=pass_: compress.apply(m, [p], tokens, inplace=True))  # type: ignore[misc]
        yield Row(
            f"{name}, per block", seconds / count, "s", memory, f"{count} blocks, whose model takes {held:.2f} GB"
        )
        del model


def run_from_disk(size: Size, most: int, device: torch.device) -> Iterator[Row]:
    """`compress.run` of gptq, a block on the device at a time, within LIMIT of its memory; twice, to the same bits."""
    limits = {"device": LIMIT} if device.type == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        model_of(size, most, torch.device("cpu") if size is SMOKE else device).to("cpu").save_pretrained(
            f"{folder}/model"
        )
        group = 32 if size is SMOKE else 128
        steps = {"passes": [{"gptq": {"bits": 4, "group_size": group}}], "device": device.type, "max_memory": limits}
        for attempt in ("first", "second"):
            out = Path(folder, attempt)
            work = partial(compress.run, steps, f"{folder}/model", out, calibration=tokens_of(size))
            seconds, memory = timed(device, work)
            yield Row(f"run: gptq from disk, {attempt} time, per block", seconds / most, "s", memory, f"{most} blocks")
        files = [*Path(folder, "first").glob("*.safetensors")]
        same = all(file.read_bytes() == Path(folder, "second", file.name).read_bytes() for file in files)
        yield Row("run: the same bits twice", float(same), "1 = yes")


PARTS: dict[str, Callable[[Size, int, torch.device], Iterator[Row]]] = {
    "passes": passes_in_memory,
    "disk": run_from_disk,
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
