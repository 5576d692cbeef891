"""Quantize a checkpoint with llm-compressor, from folder to folder; prints one JSON line.

    python benchmarks/memory_peer.py METHOD MODEL TOKENS.npz OUT

rtn             the model in memory (bfloat16), quantized without data, saved packed
rtn_model_free  the tool's own way around memory: shard by shard, never building the model
gptq            the model in memory (bfloat16), one block after the other, saved packed
gptq_offloaded  the same with the weights offloaded to a folder on disk
"""

import sys
import tempfile
import time
from pathlib import Path

import common
import peer
import torch
from compressed_tensors.offload import load_offloaded_model
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import model_free_ptq, oneshot
from transformers import AutoModelForCausalLM

WHAT = {"rtn": "rtn:4:128", "gptq": "gptq:4:128"}
OFFLOADED_MEMORY = "300MB"  # of weights that may stay in memory: a table, or a few blocks


def compress_folder(method: str, model_folder: Path, tokens: Path, out: Path, scratch: Path) -> None:
    if method == "rtn_model_free":
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        model_free_ptq(model_folder, out, scheme=scheme, ignore=["lm_head", "model.embed_tokens"], device="cpu")
        return
    if method == "gptq_offloaded":
        with load_offloaded_model():
            model = AutoModelForCausalLM.from_pretrained(
                model_folder,
                dtype=torch.bfloat16,
                device_map="auto_offload",
                max_memory={"cpu": OFFLOADED_MEMORY},
                offload_folder=scratch,
            )
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    base = method.partition("_")[0]
    recipe = peer.recipe(common.What.parse(WHAT[base]))
    data = {} if base == "rtn" else {"dataset": peer.batches(common.load_tokens(tokens, "calib"), 8)}
    oneshot(model=model, recipe=[recipe], **data)
    model.save_pretrained(out, save_compressed=True)


def main() -> None:
    method, model_folder, tokens, out = sys.argv[1], *map(Path, sys.argv[2:5])
    common.use_all_cores()
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        started = time.perf_counter()
        compress_folder(method, model_folder, tokens, out, Path(scratch))
        seconds = time.perf_counter() - started
    common.report(tool="llmcompressor", method=method, seconds=round(seconds, 3), peak_mb=common.peak_mb())


if __name__ == "__main__":
    main()
