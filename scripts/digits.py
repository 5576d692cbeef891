"""Merge and prune small networks trained apart on scikit-learn's digits, and put what is lost into the documentation.

    python scripts/digits.py [--only interpolate ...]

Replaces the tables between `<!-- digits -->` and `<!-- /digits -->` in docs/methods: in weight_matching.md the barrier,
how far the loss on held-out digits rises above the straight line between two networks' own, at the worst of eleven
points; in recalibrate_norms.md losses with the statistics of batch norms as they were, and counted again; in
interpolate.md what new versions of a network get wrong that the old one had right. Takes a minute; no number is typed
by hand.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import results
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import compress
from compress.passes import Pass

OLD = 4  # old versions that are replaced
LEARNED = 1400  # digits that are trained on; the other 397 are held out
PAGES = results.ROOT / "docs" / "methods"


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 64) from 0 to 1 in a fixed random order, and what they are."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = (torch.tensor(part)[order] for part in load_digits(return_X_y=True))
    return images.float() / 16, labels


IMAGES, LABELS = digits()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def normalized() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)),
    )


def trained(make: Callable[[], nn.Module], seed: int, epochs: int, rate: float, learned: int = LEARNED) -> nn.Module:
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(learned, generator=generator).split(100):
            optimizer.zero_grad()
            cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(cross_entropy(model(IMAGES[LEARNED:]), LABELS[LEARNED:]))


def saved(folder: Path, model: nn.Module) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def barrier(make: Callable[[], nn.Module], matched: type[compress.Average], folder: Path) -> float:
    first, second = (trained(make, seed, 30, 1e-3) for seed in (0, 1))
    other = saved(folder, second)
    shares = torch.linspace(0, 1, 11).tolist()
    passes = (matched(models=(other,), weights=(1 - share, share)) for share in shares)
    losses = torch.tensor([loss(compress.apply(first, [pass_]).model) for pass_ in passes])
    return float((losses - torch.linspace(float(losses[0]), float(losses[-1]), 11)).max())


def barriers(folder: Path) -> str:
    kinds = {"perceptron, 64-64-64-10": perceptron, "convolutions, 16 and 32 channels": convolutions}
    lines = ["| network | averaged | matched, then averaged |", "|---|---:|---:|"]
    for name, make in kinds.items():
        found = (barrier(make, matched, folder) for matched in (compress.Average, compress.WeightMatching))
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in found)} |")
    return "\n".join(lines)


def recalibrated(folder: Path) -> str:
    first, second = (trained(normalized, seed, 8, 3e-3) for seed in (0, 1))
    matching = compress.WeightMatching(models=(saved(folder, second),))
    each: dict[str, Pass] = {"[weight_matching](weight_matching.md) of both": matching}
    for share in (0.5, 0.6, 0.7):
        each[f"[magnitude](magnitude.md), {share:.0%} of the first"] = compress.Magnitude(sparsity=share)
    lines = ["| | as it is | recalibrated |", "|---|---:|---:|"]
    lines.append(f"| each network | {loss(first):.2f}, {loss(second):.2f} | |")
    for name, pass_ in each.items():
        plain = loss(compress.apply(first, [pass_]).model)
        again = compress.apply(first, [pass_, compress.RecalibrateNorms()], calibration=IMAGES[:LEARNED]).model
        lines.append(f"| {name} | {plain:.2f} | {loss(again):.2f} |")
    return "\n".join(lines)


@torch.no_grad()
def right(model: nn.Module) -> Tensor:
    return model(IMAGES[LEARNED:]).argmax(-1) == LABELS[LEARNED:]


def versions(folder: Path) -> str:
    """Old ones from a quarter of the images, new ones trained further with all: means over several."""
    found: dict[str, list[list[float]]] = {}
    for k in range(OLD):
        old = trained(perceptron, k, 30, 1e-3, LEARNED // 4)
        new = [trained(lambda old=old: copy.deepcopy(old), 100 + 3 * k + i, 15, 3e-3) for i in range(3)]  # type: ignore[misc]
        paths = tuple(saved(folder / f"{k}-{i}", each) for i, each in enumerate(new))
        made = {"the old version": old, "the new version": new[0]}
        for name, models in (("new version", paths[:1]), ("mean of three new versions", paths)):
            for importance in ("equal", "fisher"):
                for alpha in (0.75, 0.5):
                    pass_ = compress.Interpolate(models=models, alpha=alpha, importance=importance)
                    row = f"`alpha: {alpha:g}`, `importance: {importance}`, the {name}"
                    made[row] = compress.apply(old, [pass_], calibration=IMAGES[: LEARNED // 4]).model
        for row, model in made.items():
            flips = float((right(old) & ~right(model)).float().mean())
            found.setdefault(row, []).append([float(right(model).float().mean()), flips])
    lines = ["| | accuracy | negative flips |", "|---|---:|---:|"]
    for row, each in found.items():
        lines.append(f"| {row} | {' | '.join(f'{value:.2%}' for value in torch.tensor(each).mean(0).tolist())} |")
    return "\n".join(lines)


TABLES = {"weight_matching": barriers, "recalibrate_norms": recalibrated, "interpolate": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=TABLES, help="pages to measure again")
    pages = parser.parse_args().only
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for page in TABLES if pages is None else pages:
            made = TABLES[page]
            table = made(Path(folder) / page)
            print(table)
            results.replace(PAGES / f"{page}.md", "digits", table)


if __name__ == "__main__":
    main()
