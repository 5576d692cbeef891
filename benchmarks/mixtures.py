"""Peak memory of rtn on a random mixture of experts, from folder to folder, in a process of its own.

    python benchmarks/mixtures.py FOLDER

Writes a Qwen3-MoE of 4 blocks into FOLDER where it is missing: 64 experts of 768 x 2048 in each, 1.25 billion
parameters in bfloat16 under the names of the hub (2.5 GB). Keeps the result in results/mixtures.json, and fails above
MOST_MB.
"""

import json
import math
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import checkpoint
import runner
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

HIDDEN, EXPERT, EXPERTS, LAYERS, VOCABULARY = 2048, 768, 64, 4, 1024
MOST_MB = 900
FILE = "mixtures.json"


def shapes() -> list[dict[str, tuple[int, ...]]]:
    """Names on the hub and shapes, one shard for each block and one for the rest."""
    config = _config()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(LAYERS + 1)]
    for name, value in model.named_parameters():
        number = int(name.split(".")[2]) if name.startswith("model.layers.") else LAYERS
        prefix = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            both = (
                (f"{prefix}.{e}.{part}_proj.weight", (EXPERT, HIDDEN))
                for e in range(EXPERTS)
                for part in ("gate", "up")
            )
            shards[number].update(both)
        elif name.endswith("experts.down_proj"):
            shards[number].update((f"{prefix}.{e}.down_proj.weight", (HIDDEN, EXPERT)) for e in range(EXPERTS))
        else:
            shards[number][name] = tuple(value.shape)
    return shards


def _config() -> Qwen3MoeConfig:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, moe_intermediate_size=EXPERT, num_experts=EXPERTS,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=4, head_dim=128, vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    return config


def write(folder: Path) -> int:
    """The checkpoint, where it is missing; returns how many parameters it has."""
    shards = shapes()
    if not (folder / checkpoint.DONE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        listed = {}
        for number, shard in enumerate(shards):
            file = f"model-{number}.safetensors"
            values = {name: checkpoint.value(name, shape) for name, shape in shard.items()}
            save_file(values, folder / file, {"format": "pt"})
            listed |= dict.fromkeys(shard, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        _config().save_pretrained(folder)
    return sum(math.prod(shape) for shard in shards for shape in shard.values())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    count = write(folder / "mixture")
    out = folder / "mixture-out"
    shutil.rmtree(out, ignore_errors=True)
    found = runner.run(sys.executable, "memory_ours.py", "rtn", folder / "mixture", folder / "none.npz", out)
    found |= {"parameters": count, "most_mb": MOST_MB}
    shutil.rmtree(out)
    (runner.RESULTS / FILE).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if found["peak_mb"] > MOST_MB:
        raise SystemExit(f"peak memory is {found['peak_mb']} MB, and at most {MOST_MB} were promised")


if __name__ == "__main__":
    main()
