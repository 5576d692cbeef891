"""Merge three specialists on transformed digits: what each merge reaches on all three tasks together.

    python benchmarks/digits.py [--only NAME ...]

scikit-learn's 8 x 8 digits: rotated by 90 degrees in the first of three channels, inverted in the second, or with
noise in the third. A small vision transformer learns a little of all from few images; each specialist is it, trained
further on one task, some more strongly than others. Merges learn from, or are chosen by, images neither trained on nor
measured on; adamerging does not see their labels. Scales are the best of a grid by the figures that are shown, which
favours the merges that have one. Prints a table of accuracies and writes results/digits.json.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runner
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

import compress

FILE = "digits.json"
FEW, TRAINED, TRIED = 200, 1000, 256  # images: the base learns from, specialists learn from, merges learn from
Images = tuple[Tensor, Tensor]


def noisy(images: Tensor) -> Tensor:
    return images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(len(images)))


def within(channel: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Changed images in one of three channels, nothing in the others."""

    def made(images: Tensor) -> Tensor:
        found = torch.zeros(len(images), 3, *images.shape[2:])
        found[:, channel] = change(images)[:, 0]
        return found

    return made


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": within(0, lambda images: torch.rot90(images, 1, (2, 3))),
    "inverted": within(1, lambda images: 1 - images),
    "noisy": within(2, noisy),
}
RATES = {"rotated": 2e-4, "inverted": 1e-3, "noisy": 4e-4}  # of the specialists' training


def digits() -> Images:
    """(1797, 1, 8, 8) from 0 to 1 in a fixed random order, and what they are."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None][order], torch.tensor(found.target)[order]


def transformer() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=3, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=256, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def trained(model: ViTForImageClassification, data: Images, steps: int, rate: float, seed: int) -> Any:
    """The same model, trained further."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(images), (64,), generator=generator)
        cross_entropy(model(images[chosen]).logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def prepare(folder: Path) -> None:
    """The base, the specialists, and for every task images to learn from and to measure on."""
    images, labels = digits()
    few = [task(images[:FEW]) for task in TASKS.values()]
    base = trained(transformer(), (torch.cat(few), labels[:FEW].repeat(len(few))), 150, 1e-3, 1)
    base.save_pretrained(folder / "base")
    for seed, (name, task) in enumerate(TASKS.items()):
        learned = trained(copy.deepcopy(base), (task(images[:TRAINED]), labels[:TRAINED]), 300, RATES[name], 10 + seed)
        learned.save_pretrained(folder / name)
        stop = TRAINED + TRIED
        for part, rows in (("tried", slice(TRAINED, stop)), ("measured", slice(stop, None))):
            file = folder / f"{name}-{part}.safetensors"
            save_file({"images": task(images[rows]).contiguous(), "labels": labels[rows].contiguous()}, file)


SCALES = [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3]
LEARNED = {"steps": 150, "batch_size": 48, "learning_rate": 1e-2, "diversity": 2.0}
LEVELS = ("task", "layer")
LOSSES = {"the entropy alone, the paper's": 0.0, "`diversity: 1`": 1.0}  # beside the rows above them, which have 2
MERGES: dict[str, list[dict[str, Any]]] = {  # what is called so -> the variants that the best is taken of
    "average": [{"average": {"weights": [0.0, 1.0, 1.0, 1.0]}}],
    "greedy soup": [{"greedy_soup": {}}],
    "task arithmetic, its best scale": [{"task_arithmetic": {"scale": s}} for s in SCALES],
    "ties, its best scale": [
        {"ties": {"scale": s, "scope": "model", "density": d}} for s in SCALES for d in (0.1, 0.2)
    ],
    "pcb, its best scale": [{"pcb": {"scale": s, "density": d}} for s in SCALES for d in (0.1, 0.2)],
    "adamerging, by task": [{"adamerging": {"level": "task", **LEARNED}}],
    "adamerging, by layer": [{"adamerging": {"level": "layer", **LEARNED}}],
    "adamerging++, by task": [{"adamerging": {"level": "task", "trim": 0.2, **LEARNED}}],
    "adamerging++, by layer": [{"adamerging": {"level": "layer", "trim": 0.2, **LEARNED}}],
    **{
        f"adamerging, by {level}, {loss}": [{"adamerging": {"level": level, **LEARNED, "diversity": diversity}}]
        for loss, diversity in LOSSES.items()
        for level in LEVELS
    },
}


def measured(folder: Path, entry: dict[str, Any]) -> list[Any]:
    """The rows of one merge: base, specialists, result."""
    ((key, options),) = entry.items()
    files = {
        part: {name: str(folder / f"{name}-{part}.safetensors") for name in TASKS} for part in ("tried", "measured")
    }
    pipeline = {
        "calibration": {"source": files["tried"], "samples": TRIED},
        "evaluate": {"source": files["measured"], "samples": len(digits()[0]) - TRAINED - TRIED},
        "passes": [{key: {"models": [str(folder / name) for name in TASKS], **options}}],
    }
    return compress.run(pipeline, folder / "base", folder / "out", overwrite=True).rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MERGES, help="merges to measure again; the others' rows are kept")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    file = runner.RESULTS / FILE
    before: dict[str, dict[str, Any]] = {} if only is None else json.loads(file.read_text())["rows"]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        for name in MERGES if only is None else only:
            tries = [(entry, measured(folder, entry)) for entry in MERGES[name]]
            entry, rows = max(tries, key=lambda each: each[1][-1].accuracy)
            if not found:
                labels = ["the base", *(f"the one for {task}" for task in TASKS)]
                found |= {label: facts(row) for label, row in zip(labels, rows, strict=False)}
                each = [found[f"the one for {task}"][task] for task in TASKS]
                found["each by its own"] = dict(zip(TASKS, each, strict=True)) | {"mean": sum(each) / len(each)}
            found[name] = facts(rows[-1]) | {"options": entry, "seconds": rows[-1].seconds}
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    found = before | found
    print(show(found))
    runner.write(FILE, {"machine": runner.machine(), "rows": found})


def facts(row: Any) -> dict[str, float]:
    return {task: row.sources[task]["accuracy"] for task in TASKS} | {"mean": row.accuracy}


def show(found: dict[str, dict[str, Any]]) -> str:
    head = ("", *TASKS, "mean")
    return runner.table(head, [(name, *(f"{row[k]:.1%}" for k in head[1:])) for name, row in found.items()])


def show_losses(found: dict[str, dict[str, Any]]) -> str:
    """What each loss of adamerging gives, by task and by layer."""
    rows = {loss: f", {loss}" for loss in LOSSES} | {"`diversity: 2`": ""}
    head = ("loss", *(f"a coefficient for each {level}" for level in LEVELS))
    named = {loss: [f"adamerging, by {level}{tail}" for level in LEVELS] for loss, tail in rows.items()}
    return runner.table(
        head, [(loss, *(f"{found[name]['mean']:.1%}" for name in names)) for loss, names in named.items()]
    )


if __name__ == "__main__":
    main()
