"""What another program makes of a folder, in a Python that has it and not this package.

    python layouts_in_others.py PROGRAM FOLDER TOKENS.safetensors FOUND.safetensors

PROGRAM is transformers (with optimum and gptqmodel), gptqmodel, mlx or vllm. FOUND is given `logits` where the program
shows them, else `chosen`, the likeliest token after each prompt; and the weights, unpacked by the program, where it has
a function for that.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def in_transformers(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return {"logits": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits}


def in_gptqmodel(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    weights = {n: m.dequantize_weight().T for n, m in model.named_modules() if hasattr(m, "dequantize_weight")}
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def in_mlx(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    from pathlib import Path

    import mlx.core as mx
    import mlx.nn
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    found = {"logits": model(mx.array(tokens.numpy()))}
    for name, layer in model.named_modules():
        if isinstance(layer, mlx.nn.QuantizedLinear | mlx.nn.QuantizedEmbedding):
            scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
            found[name] = mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
    return {name: torch.from_numpy(np.array(value.astype(mx.float32))) for name, value in found.items()}


def in_vllm(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="bfloat16", max_model_len=128, enforce_eager=True)
    asked = SamplingParams(temperature=0, max_tokens=1)
    made = model.generate([{"prompt_token_ids": row} for row in tokens.tolist()], asked)
    return {"chosen": torch.tensor([each.outputs[0].token_ids[0] for each in made])}


if __name__ == "__main__":
    program, folder, tokens, found = sys.argv[1:]
    torch.set_num_threads(1)
    with torch.no_grad():
        made = globals()[f"in_{program}"](folder, load_file(tokens)["tokens"])
    save_file(made, found)
