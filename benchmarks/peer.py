"""One experiment with llm-compressor; prints one JSON line.

    python benchmarks/peer.py MODEL TOKENS.npz WHAT

Everything the experiment does not name is the tool's default. `seconds` is calibration and compression; reading the
model and evaluating it are left out. For `rtn` the tool itself only computes scales and rounds whenever the model runs
or is saved; one rounding of every weight is added, so that both sides end with rounded weights.
"""

import os
import time
from typing import Any

import common
import torch
from compressed_tensors.quantization import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

QUANTIZERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}
PRUNERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
# Windows at a time. 1 is the tool's default; on a CPU 8 are quicker and give the same statistics.
BATCH = int(os.environ.get("PEER_BATCH", "1"))


def recipe(what: common.What) -> Any:
    if what.method in QUANTIZERS:
        weights = {
            "num_bits": what.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": what.group_size,
        }
        groups = {"linear": {"targets": ["Linear"], "weights": weights}}
        order = {} if what.act_order is None else {"actorder": "static" if what.act_order else None}
        return QUANTIZERS[what.method](config_groups=groups, ignore=["lm_head"], **order)
    pattern = what.sparsity == "2:4"
    return PRUNERS[what.method](
        sparsity=0.5 if pattern else what.sparsity,
        mask_structure="2:4" if pattern else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )


def batches(tokens: torch.Tensor, size: int = BATCH) -> DataLoader[dict[str, torch.Tensor]]:
    """Ready token windows, in order; handed over like this the tool neither shuffles nor cuts them."""

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.stack(rows)
        return {"input_ids": x, "attention_mask": torch.ones_like(x)}

    return DataLoader(list(tokens), batch_size=size, collate_fn=collate)


@torch.no_grad()
def round_weights(model: torch.nn.Module) -> None:
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme.weights)
            module.weight.copy_(rounded)


def main() -> None:
    args = common.arguments(__doc__)
    what = common.What.parse(args.what)
    model = common.load_model(args.model)
    calibration = common.load_tokens(args.tokens, "calib")
    seconds = 0.0
    if what.method != "base":
        started = time.perf_counter()
        if what.method == "rtn":
            oneshot(model=model, recipe=[recipe(what)])
            round_weights(model)
        else:
            oneshot(model=model, recipe=[recipe(what)], dataset=batches(calibration))
        seconds = time.perf_counter() - started
    value = common.perplexity(model, common.load_tokens(args.tokens, "eval"))
    common.report(
        tool="llmcompressor",
        what=args.what,
        perplexity=round(value, 5),
        seconds=round(seconds, 3),
        peak_mb=common.peak_mb(),
    )


if __name__ == "__main__":
    main()
