"""`generate` with a static cache on a graphics processor: a Llama of the shape of one of 8 B, in bfloat16 and packed.

    python benchmarks/gpu_generate.py [--smoke] [--blocks 4] [--tokens 256]

A random model of some blocks is written to disk, compressed to 4 bits with `compress run` (its linear layers; then
the embedding and the head to 8 bits too) and loaded by plain `from_pretrained`. Each generates greedily after a prompt
of 128 tokens; transformers compiles the decoding step by itself where the cache is static. Time of a token is that of
`tokens` more tokens, divided by their number, each the least of five. `--smoke` runs all of it on the processor with a
tiny model.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from gpu import FULL, SMOKE, Size, group_of, model_of  # noqa: E402

import compress  # noqa: E402

RESULTS = ROOT / "results" / "gpu_generate.json"
PROMPT, FEW = 128, 32


@dataclass(frozen=True)
class Row:
    """A model, its bytes on the device in GB, and milliseconds of a generated token."""

    what: str
    weights: float
    milliseconds: float
    compiled: bool
    same_tokens: bool  # as the same weights without kernels and without compiling


def pipelines(size: Size) -> dict[str, dict[str, Any]]:
    linear = {"rtn": {"bits": 4, "group_size": group_of(size), "exclude": ["lm_head"]}}
    every = {"rtn": {"bits": 4, "group_size": group_of(size), "embeddings": "w8"}}
    return {"linear layers in 4 bits": linear, "the same, embedding and head in 8": every}


def milliseconds(model: PreTrainedModel, tokens: int, prompt: torch.Tensor) -> float:
    """Of a token: the difference between few and many takes away what the prompt and the start cost."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generated(model, count, prompt)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):  # compiles
        seconds(tokens + FEW)
    many, few = (min(seconds(count) for _ in range(5)) for count in (tokens + FEW, FEW))
    return (many - few) / tokens * 1000


def generated(model: PreTrainedModel, count: int, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    length = {"max_new_tokens": count, "min_new_tokens": count, "max_cache_len": PROMPT + 1024}
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, cache_implementation="static",
        pad_token_id=0, **length, **options,
    )  # fmt: skip
    assert isinstance(found, torch.Tensor)
    return found[0, prompt.shape[1] :]


def measured(what: str, folder: str, tokens: int, size: Size, device: torch.device) -> Row:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device.type, dtype=torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e9
    prompt = torch.randint(size.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(2)).to(device)
    time_of = milliseconds(model, tokens, prompt)
    quantizer = getattr(model, "hf_quantizer", None)
    compiled = device.type == "cuda" and (quantizer is None or quantizer.is_compileable)
    plain = generated(model, FEW, prompt, disable_compile=True)
    same = torch.equal(plain, generated(model, FEW, prompt))
    return Row(what, held, time_of, compiled, same)


def rows(size: Size, blocks: int, tokens: int, device: torch.device) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        model_of(size, blocks, device).to("cpu").save_pretrained(f"{folder}/model")
        yield measured("bfloat16", f"{folder}/model", tokens, size, device)
        for number, (what, step) in enumerate(pipelines(size).items()):
            out = f"{folder}/out{number}"
            compress.run({"passes": [step], "device": device.type}, f"{folder}/model", out)
            torch.compiler.reset()
            yield measured(what, out, tokens, size, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the processor")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="that are timed, beyond the first 32")
    given = parser.parse_args()
    device, size = (torch.device("cpu"), SMOKE) if given.smoke else (torch.device("cuda"), FULL)
    found = []
    for row in rows(size, given.blocks, given.tokens, device):
        found.append(row)
        ratio = found[0].milliseconds / row.milliseconds
        print(
            f"{row.what:40} {row.weights:7.3f} GB {row.milliseconds:8.3f} ms a token, {ratio:.2f} times "
            f"{'compiled' if row.compiled else ''}{'' if row.same_tokens else ', OTHER TOKENS'}", flush=True,
        )  # fmt: skip
    if not given.smoke:
        RESULTS.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
