"""Three specialists of the bundled model, each trained a little on one kind of docstrings, and texts of every kind.

    python benchmarks/specialists.py FOLDER

Writes FOLDER/module, FOLDER/class and FOLDER/def: checkpoints of the bundled model after a short training on docstrings
of modules, classes, or functions. For each kind also KIND-calibration.jsonl and KIND-evaluation.jsonl, from those
modules of the standard library that the bundled model has, or has not, been trained on.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import compress
from compress.demo import data

KINDS = ("module", "class", "def")
STEPS, BATCH, LENGTH, RATE = 60, 8, 256, 3e-4


def kinds(split: data.Split) -> dict[str, list[str]]:
    """The docstrings of a split, by the word that their declaration begins with."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for text in data.texts(split):
        found[text.split(maxsplit=1)[0]].append(text)
    return found


def write(folder: Path) -> None:
    """The texts."""
    for split in ("calibration", "evaluation"):
        for kind, texts in kinds(split).items():
            lines = (json.dumps({"text": text}) for text in texts)
            (folder / f"{kind}-{split}.jsonl").write_text("\n".join(lines) + "\n")


def train(folder: Path, kind: str, seed: int) -> None:
    """One specialist."""
    model, tokenizer = compress.demo.load()
    model.float().train()
    ids = [i for text in kinds("calibration")[kind] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    windows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10) * (1 - step / STEPS)
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        logits = model(input_ids=batch).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)


def make(folder: Path) -> None:
    """Texts and specialists."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write(folder)
    for seed, kind in enumerate(KINDS):
        train(folder, kind, seed)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
