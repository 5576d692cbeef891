"""Processor time of one decoded token of layers that skip inputs, against the same layers without.

    python benchmarks/activation_sparsity.py [--rounds 15] [--threads 1] [--blocks 1] [--width 2048] [--inner 5504]

A random Llama of that many blocks, batch 1, a cache of 16 tokens. Every model runs by turns; the figure is the
processor time of the best round, so that other work on the machine disturbs it less. Thresholds are set for random
inputs of each layer, and "skipped" is what is really zero.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import runner
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.encodings import InputForm, Weight, pack
from compress.encodings.inputs import Threshold
from compress.passes.base import Target
from compress.runtime.linear import PackedLinear

RESULTS = runner.RESULTS / "activation_sparsity.json"
SHARES = (0.25, 0.4, 0.5, 0.7)
PROMPT = 16


def seen(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """(T, columns) inputs of every linear layer inside the blocks."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, x, name=name: found.update({name: x[0][0].float()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def packed(model: nn.Module, inputs: dict[str, Tensor], skip: float, bits: int | None) -> nn.Module:
    """The model with packed layers that skip a share of their inputs; values, or codes in groups of 128."""
    made = copy.deepcopy(model)
    form = InputForm(grid="threshold", scale="tensor", criterion="wina", skip=skip or None)
    for name, x in inputs.items():
        old = made.get_submodule(name)
        weight = Weight(old.weight.detach())
        if bits:
            target = Target(old.weight.detach().float())
            weight = Weight(encoding=compress.Rtn(bits=bits, group_size=128).run(target).encoding)
        if skip:
            weight = replace(weight, inputs=Threshold.of(form, x, old.weight.detach().float().norm(dim=0)))
        spec, tensors = pack(weight)
        layer = PackedLinear(spec, bias=False, transposed=False, dtype=old.weight.dtype)
        layer.load_state_dict(tensors)
        made.set_submodule(name, layer)
    return made


def step(model: nn.Module, prompt: Tensor) -> Callable[[], None]:
    """One more token behind the prompt, again and again from the same cache."""
    cache = model(prompt, use_cache=True).past_key_values

    def run() -> None:
        model(prompt[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def skipped(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    layers = [(model.get_submodule(name), x) for name, x in inputs.items()]
    zeros = [float(layer.rounded(x).eq(0).float().mean()) for layer, x in layers]
    return sum(zeros) / len(zeros)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("rounds", 15), ("threads", 1), ("blocks", 1), ("width", 2048), ("inner", 5504)):
        parser.add_argument(f"--{option}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=arguments.width, intermediate_size=arguments.inner,
        num_hidden_layers=arguments.blocks, num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    rows = []
    prompt = torch.randint(512, (1, PROMPT))
    with torch.inference_mode():
        for weights, dtype, bits in (("float32", torch.float32, None), ("bfloat16", torch.bfloat16, None),
                                     ("4 bits, exact", torch.float32, 4)):  # fmt: skip
            model = LlamaForCausalLM(config).to(dtype).eval()
            inputs = seen(model, torch.randint(512, (1, 128)))
            models = {"dense": model if bits is None else packed(model, inputs, 0, bits)}
            models |= {f"{share:.0%}": packed(model, inputs, share, bits) for share in SHARES}
            models["50%, as loaded"] = packed(model, inputs, 0.5, bits)
            zeros = {way: skipped(made, inputs) if way != "dense" else 0.0 for way, made in models.items()}
            kernels = {}
            for way, made in models.items():
                packs = any(isinstance(m, PackedLinear) for m in made.modules())
                kernels[way] = compress.speed_up(made).kernels if packs and "loaded" not in way else {}
            steps = {way: step(made, prompt) for way, made in models.items()}
            best = dict.fromkeys(steps, float("inf"))
            for _ in range(arguments.rounds):
                for way, run in steps.items():
                    started = time.process_time()
                    run()
                    best[way] = min(best[way], time.process_time() - started)
            for way, seconds in best.items():
                rows.append({
                    "weights": weights, "way": way, "kernels": ", ".join(kernels[way]), "skipped": round(zeros[way], 3),
                    "ms": round(1000 * seconds, 1), "tokens_per_second": round(1 / seconds, 1),
                    "ratio": round(best["dense"] / seconds, 2),
                })  # fmt: skip
                print(rows[-1], flush=True)
    ours = {package: version(package) for package in ("torch", "transformers")}
    about = {"machine": runner.machine(), **vars(arguments), "ours": ours}
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(runner.table(tuple(rows[0]), [tuple(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
