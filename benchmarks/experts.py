"""Fewer experts: of a random mixture in which each is there twice, and of a small one that was trained here.

    python benchmarks/experts.py FOLDER [--only copies trained]

`copies`: the relative change of the logits when half of the experts are left. `trained`: a Mixtral of bytes is trained
on the calibration texts of the demo where FOLDER/model is missing (two blocks, 16 experts of which a token gets 4;
minutes on one core), and its perplexity measured on the evaluation texts. Prints tables, and keeps them in
results/experts_copies.json and results/experts.json.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import runner
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import compress
from compress.demo.data import texts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from expert_models import TOKENS, logits, redundant

FILE, COPIES_FILE = "experts.json", "experts_copies.json"
NOISES = {"copies": 0.0, "copies with 2 % noise": 0.02}
STEPS, BATCH, LENGTH, RATE = 1500, 16, 96, 3e-3
SAMPLES = 64
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("expert_prune", {}),
    ("expert_prune", {"by": "frequency"}),
    ("expert_merge", {}),
    ("expert_merge", {"router": "dominant"}),
    ("expert_merge", {"weigh": "router_weight"}),
    ("expert_merge", {"weigh": "equal"}),
    ("expert_merge", {"align": False}),
]
OF_COPIES = (2, 3, 0, 1)  # of those, which the table of copies has
KEPT = (12, 8)


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


def fewer(
    model: nn.Module, name: str, keep: int, options: dict[str, Any], *data: Tensor, **how: Any
) -> compress.Result:
    """A model with so many experts left in each layer, seen and judged on `data`."""
    made = getattr(compress, "".join(part.title() for part in name.split("_")))(keep=keep, **options)
    return compress.apply(model, [made], data[0], evaluation=data[1], **how)


def copies() -> list[dict[str, Any]]:
    """How far logits are from the model's own, of their length."""
    rows = []
    for number in OF_COPIES:
        name, options = RUNS[number]
        row: dict[str, Any] = {"pass": name, **options}
        for column, noise in NOISES.items():
            model = redundant(noise=noise)
            expected = logits(model)
            found = logits(fewer(model, name, 4, options, TOKENS, TOKENS, products="float32").model)
            row[column] = float((found - expected).norm() / expected.norm())
        rows.append(row)
    return rows


def of_trained(folder: Path) -> list[dict[str, Any]]:
    """Perplexities of the mixture of bytes."""
    model = trained(folder)
    shown, judged = windows(numbers("calibration"), SAMPLES, -1 % 2**31), windows(numbers("evaluation"), SAMPLES, 7)
    rows = []
    for keep in KEPT:
        for name, options in RUNS:
            report = fewer(model, name, keep, options, shown, judged).report
            rows.append(
                {"pass": name, "keep": keep, **options, "perplexity": report.rows[-1].perplexity,
                 "original": report.rows[0].perplexity, "kl": report.rows[-1].kl}
            )  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def said(row: dict[str, Any]) -> str:
    """The pass of a row, with its options."""
    options = (f"`{name}: {str(row[name]).lower()}`" for name in ("by", "router", "weigh", "align") if name in row)
    return ", ".join([row["pass"], *options])


def show(rows: list[dict[str, Any]]) -> str:
    table: dict[str, list[str]] = {}
    for row in rows:
        table.setdefault(said(row), []).append(f"{row['perplexity']:.2f}")
    head = ("perplexity with so many left", "16", *map(str, KEPT))
    return runner.table(head, [(name, f"{rows[0]['original']:.2f}", *cells) for name, cells in table.items()])


def show_copies(rows: list[dict[str, Any]]) -> str:
    return runner.table(("", *NOISES), [(said(row), *(f"{row[column]:.2g}" for column in NOISES)) for row in rows])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the trained model is kept")
    parser.add_argument("--only", nargs="*", choices=("copies", "trained"), default=("copies", "trained"))
    args = parser.parse_args()
    for name in args.only:
        rows = copies() if name == "copies" else of_trained(args.folder / "model")
        print(show_copies(rows) if name == "copies" else show(rows))
        runner.write(COPIES_FILE if name == "copies" else FILE, {"machine": runner.machine(), "rows": rows})


if __name__ == "__main__":
    main()
