"""Fewer experts in a small mixture that was trained here: pruned and merged, and what the perplexity is then.

    python benchmarks/experts.py FOLDER

Trains a Mixtral of bytes on the calibration texts of the demo where FOLDER/model is missing (two blocks, 16 experts of
which a token gets 4; minutes on one core), and measures on its evaluation texts. Keeps the result in
results/experts.json.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import compress
from compress.demo.data import texts

FILE = "experts.json"
STEPS, BATCH, LENGTH, RATE = 1500, 16, 96, 3e-3
SAMPLES = 64
RUNS = {
    "expert_prune": [{}, {"by": "frequency"}],
    "expert_merge": [
        {},
        {"router": "dominant"},
        {"weigh": "router_weight"},
        {"weigh": "equal"},
        {"align": False},
    ],
}


def numbers(split: str) -> Tensor:
    """Every byte of the demo's texts."""
    return torch.tensor(list("\n\n".join(texts(split)).encode()), dtype=torch.int64)


def windows(stream: Tensor, count: int, seed: int) -> Tensor:
    """(count, LENGTH) from random places."""
    places = torch.randint(len(stream) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return stream[places + torch.arange(LENGTH)]


def trained(folder: Path) -> MixtralForCausalLM:
    """The mixture, trained or as it was left by an earlier call."""
    if (folder / "config.json").exists():
        return MixtralForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=16, num_experts_per_tok=4, max_position_embeddings=LENGTH,
        router_aux_loss_coef=0.01, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    stream = numbers("calibration")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        batch = windows(stream, BATCH, step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: {float(loss):.3f}", file=sys.stderr)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    return model.eval()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is kept")
    model = trained(parser.parse_args().folder / "model")
    shown, judged = windows(numbers("calibration"), SAMPLES, -1 % 2**31), windows(numbers("evaluation"), SAMPLES, 7)
    rows = []
    for keep in (12, 8):
        for name, variants in RUNS.items():
            for options in variants:
                made = getattr(compress, "".join(part.title() for part in name.split("_")))(keep=keep, **options)
                report = compress.apply(model, [made], shown, evaluation=judged).report
                rows.append(
                    {"pass": name, "keep": keep, **options, "perplexity": report.rows[-1].perplexity,
                     "original": report.rows[0].perplexity, "kl": report.rows[-1].kl}
                )  # fmt: skip
                print(json.dumps(rows[-1]))
    results = Path(__file__).with_name("results")
    (results / FILE).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
