"""Learned rounding on a graphics processor beside auto-round's: time, memory, and error of a block of a Llama of 8 B.

    python benchmarks/gpu_peer.py [--smoke] [--steps 200]

auto-round must be importable. Both get one random block in bfloat16 and the same 128 x 2048 random tokens, learn
asymmetric 4 bits in groups of 128 for the same number of steps of 8 x 2048 tokens, and are measured on 16 sequences
that neither has seen: ||block(x) - quantized block(x)||^2 / ||block(x)||^2, in float32. Beside them rtn.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from gpu import FULL, SMOKE, Size, group_of, model_of, timed, tokens_of  # noqa: E402

import compress  # noqa: E402

LIMIT = "10.9GB"
RESULTS = ROOT / "results" / "gpu_peer.json"
DEMO = ROOT.parent / "compress" / "demo" / "model"  # any tokenizer: it asks for one, and is given tokens


@dataclass(frozen=True)
class Row:
    """Seconds, the most that the device held in GB (the model takes 0.96), and the relative squared error."""

    what: str
    seconds: float
    memory: float | None
    error: float


@torch.no_grad()
def hidden(model: LlamaForCausalLM, tokens: Tensor, device: torch.device) -> Tensor:
    """What the block makes of tokens, (samples, length, width) float32, on the host."""
    states = [model.model(row[None].to(device)).last_hidden_state.float().cpu() for row in tokens]
    return torch.cat(states)


def ours(size: Size, pass_: compress.passes.Pass, limit: str | None) -> Callable[[LlamaForCausalLM], LlamaForCausalLM]:
    def work(model: LlamaForCausalLM) -> LlamaForCausalLM:
        limits = {} if limit is None else {"max_memory": {"device": limit}}
        compress.apply(model, [pass_], tokens_of(size), inplace=True, **limits)
        return model

    return work


def auto_round(size: Size, steps: int, device: torch.device) -> Callable[[LlamaForCausalLM], LlamaForCausalLM]:
    def work(model: LlamaForCausalLM) -> LlamaForCausalLM:
        from auto_round import AutoRound

        tokens = tokens_of(size)
        tuner = AutoRound(
            model, AutoTokenizer.from_pretrained(DEMO), bits=4, group_size=group_of(size), sym=False, iters=steps,
            seqlen=size.length, nsamples=len(tokens), batch_size=8, device_map=device.type,
            dataset=[{"input_ids": row[None]} for row in tokens],
        )  # fmt: skip
        made, _ = tuner.quantize()
        return made.to(device)  # type: ignore[no-any-return]

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the processor")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    device, size = (torch.device("cpu"), SMOKE) if given.smoke else (torch.device("cuda"), FULL)
    steps = size.steps if given.smoke else given.steps
    flexround = compress.FlexRound(bits=4, group_size=group_of(size), steps=steps, batch_size=8)
    rtn = compress.Rtn(bits=4, group_size=group_of(size))
    ways = {
        "rtn": ours(size, rtn, None),
        "flexround": ours(size, flexround, None),
        f"flexround within {LIMIT}": ours(size, flexround, None if given.smoke else LIMIT),
        "auto-round": auto_round(size, steps, device),
    }
    unseen = torch.randint(size.vocabulary, (16, size.length), generator=torch.Generator().manual_seed(3))
    expected = hidden(model_of(size, 1, device), unseen, device)
    rows = []
    for what, work in ways.items():
        model, made = model_of(size, 1, device), []
        seconds, memory = timed(device, lambda w=work, m=model, made=made: made.append(w(m)))  # type: ignore[misc]
        found = hidden(made[0], unseen, device)
        rows.append(Row(what, seconds, memory, float((found - expected).square().sum() / expected.square().sum())))
        del model, made
        print(f"{what:24} {seconds:8.2f} s {memory or 0:7.2f} GB   error {rows[-1].error:.6f}", flush=True)
    if not given.smoke:
        RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
