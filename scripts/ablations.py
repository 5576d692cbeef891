"""Measure what parts of a method are worth on the bundled model, and put it into the pages of the methods.

    python scripts/ablations.py [--only bip jlcm ...]

Writes docs/ablations.json, and replaces what stands between `<!-- ablation -->` and `<!-- /ablation -->` in
docs/methods/*.md. No number is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import results
import torch
from torch import Tensor

import compress
from compress.demo import data, load
from compress.passes.base import Pass

RECORD = results.ROOT / "docs" / "ablations.json"
SECOND = "model.layers.1"  # the block whose error is shown where a whole model would take too long
PERCENT = "{:.1%}"


@dataclass(frozen=True)
class Cell:
    """Some numbers of a table: one fact of a run, for each seed."""

    passes: tuple[Pass, ...]
    fact: str
    shown: str = "{:.4f}"
    samples: int = 48
    seeds: tuple[int, ...] = (0,)
    times: float = 1

    def measured(self) -> list[float]:
        return [facts(self.passes, self.samples, seed)[self.fact] for seed in self.seeds]

    def text(self, values: list[float]) -> str:
        return ", ".join(self.shown.format(value * self.times) for value in values)


Table = Mapping[str, Mapping[str, Cell]]  # row -> column -> its numbers


@cache
def windows(split: data.Split, samples: int, length: int) -> Tensor:
    """(samples, length) tokens of the bundled text, one window behind the other."""
    _, tokenizer = load()
    found: list[int] = []
    for text in data.texts(split):
        found += tokenizer(text, verbose=False)["input_ids"]
        if len(found) >= samples * length:
            break
    return torch.tensor(found[: samples * length]).view(samples, length)


@cache
def facts(passes: tuple[Pass, ...], samples: int, seed: int) -> dict[str, float]:
    """What is measured of a run: of the second block alone where the passes name it, else of the whole model."""
    model, _ = load()
    alone = any(SECOND in pattern for pattern in passes[-1].include)
    made = compress.apply(
        model, passes, windows("calibration", samples, 128),
        evaluation=None if alone else windows("evaluation", 16, 256), seed=seed,
    )  # fmt: skip
    print(" ".join(f"{pass_.key} {pass_.options()}" for pass_ in passes), f"seed {seed}", flush=True)
    if not alone:
        return {"kl": made.report.rows[-1].kl or 0.0}
    notes = next(found[passes[-1].key] for name, found in made.report.layers.items() if name.startswith(SECOND))
    before = {name: model.get_submodule(name).weight.detach() for name in made.weights}
    after = {name: weight.dequantize() for name, weight in made.weights.items()}
    crossed = sum(int((after[n] * before[n] < 0).sum()) for n in before) / sum(w.numel() for w in before.values())
    return {"start": notes["block_error_start"], "error": notes["block_error"], "crossed": crossed} | (
        _travelled(passes[-1], model, made) if isinstance(passes[-1], compress.FlexRound) else {}
    )


def _travelled(pass_: compress.FlexRound, model: Any, made: Any) -> dict[str, float]:
    """The shares of weights that end on another grid point than the nearest, and how far."""
    nearest = compress.apply(model, [replace(pass_.stand_in(), include=pass_.include)]).weights
    steps, large = [], []
    for name, weight in made.weights.items():
        steps.append((weight.encoding.codes.int() - nearest[name].encoding.codes.int()).abs().flatten())
        magnitudes = model.get_submodule(name).weight.detach().abs().flatten()
        large.append(magnitudes >= magnitudes.kthvalue(int(0.9 * len(magnitudes))).values)
    moved, tenth = torch.cat(steps), torch.cat(large)
    return {
        "moved": float((moved > 0).float().mean()),
        "far": float((moved > 1).float().mean()),
        "far_of_large": float((moved[tenth] > 1).float().mean()),
    }


def second(made: type[Pass], **options: Any) -> tuple[Pass, ...]:
    """A pass over the second block alone."""
    return (made(**{"steps": 60, **options}, include=(f"{SECOND}.*",)),)


def error(made: type[Pass], seeds: tuple[int, ...] = (0,), fact: str = "error", **options: Any) -> Cell:
    """The second block's error, in thousandths of its outputs."""
    return Cell(second(made, **options), fact, "{:.2f}", seeds=seeds, times=1000)


def of_bip(**options: Any) -> Cell:
    return Cell((compress.Bip(steps=20, batch_size=2, **options),), "kl")


def bip() -> list[Table]:
    gammas = {f"`gamma: {gamma:g}`": {"KL": of_bip(gamma=gamma)} for gamma in (10.0, 0.1, 0.01)}
    return [{"`correction: false`": {"KL": of_bip(correction=False)}, **gammas}]


def gptq() -> list[Table]:
    def one(bits: int, **options: Any) -> Cell:
        return Cell((compress.Gptq(bits=bits, group_size=64, **options),), "kl", samples=64)

    rows: dict[str, dict[str, Any]] = {
        "as it is": {},
        "`scale_search: weighted`": {"scale_search": "weighted"},
        "`rounds: 4`": {"rounds": 4},
        "`propagation: 0.5`": {"propagation": 0.5},
        "the first two, `rounds: 1`": {"scale_search": "weighted", "rounds": 1},
        "the first two, `rounds: 4`": {"scale_search": "weighted", "rounds": 4},
        "all three": {"scale_search": "weighted", "rounds": 4, "propagation": 0.5},
    }
    return [{row: {f"{bits} bits": one(bits, **o) for bits in (3, 2)} for row, o in rows.items()}]


def jlcm() -> list[Table]:
    rows = {
        "k-means, the start": {"fact": "start"},
        "`proximal`": {},
        "`equal`": {"mapping_gradient": "equal"},
        "`distance`": {"mapping_gradient": "distance"},
        "tables alone (`learn_mapping: false`)": {"learn_mapping": False},
    }
    return [{row: {f"{bits} bits": error(compress.Jlcm, bits=bits, **o) for bits in (3, 2)} for row, o in rows.items()}]


def kv_cache() -> list[Table]:
    forms: dict[str, dict[str, Any]] = {
        "`fp8`": {},
        "`grid: int`": {"grid": "int"},
        "`grid: int`, `bits: 4`": {"grid": "int", "bits": 4},
    }
    return [
        {
            row: {
                f"`per: {per}`": Cell((compress.KvCache(**o, per=per),), "kl", "{:.5f}") for per in ("tensor", "head")
            }
            for row, o in forms.items()
        }
    ]


def nupes() -> list[Table]:
    grid, kept = {"moves": "grid"}, {"learn_exponent": False}
    rows: dict[str, dict[str, Any]] = {
        "powerquant, the start": {"fact": "start"},
        "`moves: division`": {},
        "`moves: division`, exponent kept": kept,
        "`moves: grid`, learning rate 0.05": {**grid, "learning_rate": 0.05},
    }
    found: Table = {
        row: {f"{bits} bits": error(compress.Nupes, bits=bits, **o) for bits in (3, 2)} for row, o in rows.items()
    }
    crossed = {"fact": "crossed", "shown": PERCENT}
    over = {
        row: {f"{bits} bits": Cell(second(compress.Nupes, bits=bits, **rows[row]), **crossed) for bits in (3, 2)}
        for row in rows
        if "grid" in row
    }
    return [found, over]


def flexround() -> list[Table]:
    rows: dict[str, dict[str, Any]] = {
        "as it is": {},
        "scales learned as fast as divisors (`scale_rate` is `learning_rate`)": {"scale_rate": True},
        "scales frozen (`learn_scale: false`)": {"learn_scale": False},
        "no common divisor of a row (`row_factor: false`)": {"row_factor": False},
    }

    def one(rate: float, options: dict[str, Any], **more: Any) -> Cell:
        own = {"scale_rate": rate} if options.get("scale_rate") else options
        shared: dict[str, Any] = {"bits": 3, "granularity": "tensor", "learning_rate": rate, "seeds": (0, 1)}
        return error(compress.FlexRound, **{**shared, **own, **more})

    start = {"rounding to nearest, the start": {"learning rate 0.01": one(0.01, {}, fact="start", seeds=(0,))}}
    every = {row: {f"learning rate {rate}": one(rate, o) for rate in (0.01, 0.02)} for row, o in rows.items()}
    runs = {
        "3 bits, 60 steps, learning rate 0.01": second(compress.FlexRound, bits=3),
        "4 bits, 200 steps, learning rate 0.02": second(compress.FlexRound, bits=4, steps=200, learning_rate=0.02),
    }
    facts_of = {"moved": "moved", "two or more points": "far", "of the largest tenth": "far_of_large"}
    moved = {row: {column: Cell(run, fact, "{:.2%}") for column, fact in facts_of.items()} for row, run in runs.items()}
    return [start | every, moved]


def perp() -> list[Table]:
    def one(*train: str, **options: Any) -> Cell:
        pruned = compress.GlobalMagnitude(sparsity=0.5)
        options = {"steps": 30, "batch_size": 2, "rank": 3, "learning_rate": 5e-3, **options}
        return Cell((pruned, compress.Perp(train=("norm", *train), **options)), "kl", samples=64)

    some = {"rank": 16, "share": 0.02}
    rows = {
        "norms alone": one(),
        "`mask_lora`, rank 3": one("mask_lora"),
        "`principal`, 2 % of the weights": one("principal", **some, learning_rate=2e-3),
        "`sensitive`, 2 % of the weights": one("sensitive", **some, learning_rate=2e-3),
        "`full`, all of them": one("full", learning_rate=2e-3),
    }
    return [{row: {"KL": cell} for row, cell in rows.items()}]


def oats() -> list[Table]:
    size: dict[str, Any] = {"sparsity": 0.65, "ratio": 0.15}
    rows: dict[str, tuple[Pass, ...]] = {
        "wanda, half of the weights": (compress.Wanda(sparsity=0.5),),
        "wanda to 65 % zeros, then eora of rank 19": (compress.Wanda(sparsity=0.65), compress.Eora(rank=19)),
        "oats, `iterations: 1`": (compress.Oats(**size, iterations=1),),
        "oats, `iterations: 20`": (compress.Oats(**size),),
        "oats, `iterations: 20`, `scaling: none`": (compress.Oats(**size, scaling="none"),),
    }
    return [{row: {"KL": Cell(passes, "kl", samples=16)} for row, passes in rows.items()}]


def qat() -> list[Table]:
    def one(made: type[Pass], **options: Any) -> dict[str, Cell]:
        return {"KL": Cell((made(**{"group_size": 64, **options}),), "kl")}

    short: dict[str, Any] = {"steps": 20, "learning_rate": 1e-3}
    even: dict[str, Any] = {"bits": 2, **short}
    ternary: dict[str, Any] = {"levels": "ternary", **short}
    return [
        {
            "rtn, the start": one(compress.Rtn, bits=2, scale_search="mse"),
            "gptq": one(compress.Gptq, bits=2),
            "`scale: lsq`": one(compress.Qat, **even),
            "`scale: fixed`": one(compress.Qat, **even, scale="fixed"),
            "`scale: stats`, `symmetric: true`": one(compress.Qat, **even, scale="stats", symmetric=True),
        },
        {
            f"ternary, `scale: {scale}`": one(compress.Qat, **ternary, scale=scale)
            for scale in ("lsq", "mean", "median")
        },
    ]


def rtn() -> list[Table]:
    grids: dict[str, dict[str, Any]] = {
        "nvfp4": {"grid": "nvfp4", "group_size": 16},
        "mxfp4": {"grid": "mxfp4", "group_size": 32},
        "even steps, symmetric, of 32": {"group_size": 32, "symmetric": True},
    }

    def one(made: type[Pass], search: str) -> dict[str, Cell]:
        return {name: Cell((made(scale_search=search, **o),), "kl") for name, o in grids.items()}  # type: ignore[call-arg]

    rows = {
        "`rtn`": (compress.Rtn, "minmax"),
        "`rtn`, `scale_search: mse`": (compress.Rtn, "mse"),
        "`gptq`": (compress.Gptq, "minmax"),
        "`gptq`, `scale_search: weighted`": (compress.Gptq, "weighted"),
    }
    return [{row: one(*chosen) for row, chosen in rows.items()}]


def scale() -> list[Table]:
    grid: dict[str, Any] = {"bits": 3, "group_size": 64}
    before: dict[str, tuple[Pass, ...]] = {
        "alone": (),
        "behind `scale`": (compress.Scale(**grid),),
        "behind `scale: {clip: true}`": (compress.Scale(**grid, clip=True),),
    }
    quantizers: dict[str, Pass] = {"rtn": compress.Rtn(**grid), "gptq": compress.Gptq(**grid)}
    return [
        {row: {name: Cell((*p, q), "kl", samples=32) for name, q in quantizers.items()} for row, p in before.items()}
    ]


def smooth() -> list[Table]:
    quantizers: dict[str, Pass] = {
        "inputs 8 bits, one scale": compress.Rtn(bits=8, activation_bits=8, activation_scale="tensor"),
        "inputs 4 bits, a scale per token": compress.Rtn(bits=8, activation_bits=4),
    }
    rows: dict[str, tuple[Pass, ...]] = {"as they are": ()}
    rows |= {f"`strength: {a}`": (compress.Smooth(strength=a),) for a in (0.25, 0.5, 0.8)}
    return [{row: {name: Cell((*p, q), "kl", samples=32) for name, q in quantizers.items()} for row, p in rows.items()}]


def rotate() -> list[Table]:
    quantizer = compress.Gptq(bits=4, group_size=64, activation_bits=4)
    between = compress.Smooth(strength=0.8, include=("*.o_proj", "*.down_proj"))
    rows: dict[str, tuple[Pass, ...]] = {
        "as it is": (),
        "`rotate`": (compress.Rotate(),),
        "`rotate: {matrix: orthogonal}`": (compress.Rotate(matrix="orthogonal"),),
        "`rotate: {values: false}`": (compress.Rotate(values=False),),
        "`rotate`, then `smooth` before o and down": (compress.Rotate(), between),
        "`rotate: {online: true}`": (compress.Rotate(online=True),),
    }
    return [{row: {"KL": Cell((*p, quantizer), "kl", samples=32)} for row, p in rows.items()}]


PAGES = {
    "bip": bip,
    "flexround": flexround,
    "gptq": gptq,
    "jlcm": jlcm,
    "kv_cache": kv_cache,
    "nupes": nupes,
    "oats": oats,
    "perp": perp,
    "qat": qat,
    "rotate": rotate,
    "rtn": rtn,
    "scale": scale,
    "smooth": smooth,
}


def measure(tables: list[Table]) -> list[dict[str, dict[str, list[float]]]]:
    return [{row: {c: cell.measured() for c, cell in cells.items()} for row, cells in t.items()} for t in tables]


def text(tables: list[Table], found: list[dict[str, dict[str, list[float]]]]) -> str:
    shown = []
    for table, numbers in zip(tables, found, strict=True):
        columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
        lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
        for row, cells in table.items():
            each = (cells[c].text(numbers[row][c]) if c in cells else "" for c in columns)
            lines.append(f"| {row} | {' | '.join(each)} |")
        shown.append("\n".join(lines))
    return "\n\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PAGES, help="pages to measure again; none: write what is recorded")
    args = parser.parse_args()
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for page in PAGES if args.only is None else args.only:
        found[page] = measure(PAGES[page]())
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    for page in sorted(found):
        results.replace(results.ROOT / "docs" / "methods" / f"{page}.md", "ablation", text(PAGES[page](), found[page]))


if __name__ == "__main__":
    main()
