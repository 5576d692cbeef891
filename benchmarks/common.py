"""What both sides of a comparison must do alike: read the inputs, judge the result, state it.

Imports nothing but numpy, torch and transformers, so that it runs in the peer's environment as well as in ours.
"""

import json
import math
import os
import resource
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

EVALUATION_BATCH = 8
ORDERS = {"act_order": True, "in_order": False}


@dataclass(frozen=True)
class What:
    """One experiment, from its short form: `base`, `rtn:4:64`, `gptq:3:64`, `wanda:0.5`, `sparsegpt:2:4`,
    `flexround:2:64` (in the peer: its own learned rounding).

    The tools differ in the order in which gptq takes the columns unless told; `gptq:3:64:act_order` (largest inputs
    first) and `gptq:3:64:in_order` tell both.
    """

    method: str
    bits: int = 16
    group_size: int = 0
    act_order: bool | None = None  # None: the tool's default
    sparsity: float | str = 0.0

    @classmethod
    def parse(cls, text: str) -> "What":
        method, _, rest = text.partition(":")
        if method == "base" and not rest:
            return cls(method)
        if method in ("rtn", "gptq", "flexround"):
            bits, group_size, *order = rest.split(":")
            act_order = ORDERS[order[0]] if order else None
            return cls(method, bits=int(bits), group_size=int(group_size), act_order=act_order)
        if method in ("wanda", "sparsegpt"):
            return cls(method, sparsity=rest if rest == "2:4" else float(rest))
        raise ValueError(f"unknown experiment {text!r}")


def arguments(description: str | None) -> Namespace:
    """MODEL TOKENS WHAT."""
    parser = ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="a Hugging Face folder, read as float32")
    parser.add_argument("tokens", type=Path, help="an .npz with `calib` and `eval`, integers of (windows, length)")
    parser.add_argument(
        "what",
        help="base | rtn:BITS:GROUP | gptq:BITS:GROUP[:act_order|in_order] | flexround:BITS:GROUP | wanda:0.5|2:4 | "
        "sparsegpt:0.5|2:4",
    )
    use_all_cores()
    return parser.parse_args()


def use_all_cores() -> None:
    """Fix the number of threads, which otherwise depends on what was imported before torch."""
    torch.set_num_threads(os.cpu_count() or 1)


def load_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokens(file: Path, key: str) -> torch.Tensor:
    with np.load(file) as arrays:
        return torch.from_numpy(arrays[key].astype(np.int64))


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window (windows, length)."""
    nll = 0.0
    for x in windows.split(EVALUATION_BATCH):
        logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        nll += cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nll / windows[:, 1:].numel())


def peak_mb() -> int:
    """Largest resident memory of this process so far, in MiB.

    Linux hands `ru_maxrss` of the process that started this one down to it, so the kernel's own mark comes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def report(**values: object) -> None:
    """The result as the last line of the output."""
    print(json.dumps(values), flush=True)
