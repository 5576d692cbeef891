"""Which quantizer to take, by what was measured on the bundled model: bits, time, what runs the result, and data."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.config.measured import original, rows
from compress.config.runtimes import RUNTIMES, refuse_scheme, runtime_named
from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.config.measured import Measured

CLOSE = 1.15  # times the least divergence: what loses no more than this is as good
BESIDE = 0.6  # bits per weight that scales and tables may take beside the codes
MOST_MEASURED = 4  # bits of codes; with more of them every method loses little
NOWHERE = "none"  # of `--data`


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        bits: of the codes.
        runtime: what is to run the result.
        data: a text to learn from; `none` where there is none.
        minutes: the most that the passes may take; None for any time.
    """

    bits: int
    runtime: str = "transformers"
    data: str = "demo"
    minutes: float | None = None


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        command: one line for a shell.
        reasons: sentences.
    """

    command: str
    reasons: tuple[str, ...]


def candidates(wish: Wish) -> list[Measured]:
    """What was measured at the nearest width that runs there and learns from no more than there is.

    Super-blocks are not among them: nobody knows here whether they fill the columns of a model.
    """
    runtime, bits = runtime_named(wish.runtime), min(wish.bits, MOST_MEASURED)
    return [
        row for row in rows()
        if row.group == "quantize" and row.bits == bits and row.kl is not None and not row.rounds_inputs
        and not row.super_blocks
        and (row.bits_per_weight or 0) <= bits + BESIDE
        and runtime.format in (None, *row.formats)
        and not (row.data and wish.data == NOWHERE)
    ]  # fmt: skip


def best(found: Sequence[Measured]) -> Measured:
    """The quickest of those that lose about as little as the best."""
    least = min(row.kl or 0.0 for row in found)
    close = [row for row in found if (row.kl or 0.0) <= CLOSE * least]
    return min(close, key=lambda row: (row.seconds or 0.0, row.kl))


def method_for(bits: int, runtime: str, data: str) -> str:
    """The quantizer that `compress quantize` takes unless one is named."""
    return best([row for row in candidates(Wish(bits, runtime, data)) if row.plain]).methods[0]


def advise(model: str, wish: Wish, weights: int | None) -> Advice:
    """A command for a model, and why this one.

    Args:
        model: what the user calls it.
        wish: what is asked for.
        weights: how many the model has; None where that is not known.

    Raises:
        UsageError: nothing that was measured meets the wish; says what would.
    """
    asked, reasons = wish, list[str]()
    wish = _worth(wish, reasons)
    refuse_scheme(wish.runtime, wish.bits, None)
    if wish.minutes is not None and weights is None:
        raise UsageError(
            f"--minutes: {model} is no local folder with safetensors, so nobody knows how large it is; download it "
            "first, or leave --minutes out"
        )
    found = candidates(wish)
    times = {row.label: _seconds(row, weights) for row in found}
    quick = [row for row in found if wish.minutes is None or times[row.label] <= 60 * wish.minutes]
    if not quick:
        first = min(found, key=lambda row: row.seconds or 0.0)
        raise UsageError(
            f"--minutes {wish.minutes:g}: nothing that was measured at {asked.bits} bits is as quick; the quickest, "
            f"{first.label}, takes about {_time(times[first.label])}"
        )
    chosen = best(quick)
    reasons += _why(chosen, wish.bits, quick, found)
    if weights is not None:
        reasons.append(_how_long(model, times[chosen.label], weights, chosen))
    reasons += _where(wish)
    reasons.append(_data(chosen, wish))
    return Advice(command_of(chosen, model, wish), tuple(reasons))


def command_of(row: Measured, model: str, wish: Wish) -> str:
    """The command that does what was measured, with the bits, the data and the container that were asked for."""
    own = [] if wish.data in ("demo", NOWHERE) or not row.data else [wish.data]
    format_, name = RUNTIMES[wish.runtime].format, shlex.quote(model)
    if not row.plain:
        changes = [f"calibration.source={data}" for data in own] + ([f"export={format_}"] if format_ else [])
        return " ".join([f"compress run {row.name} {name}", *(f"--set {shlex.quote(change)}" for change in changes)])
    words = [f"compress quantize {name} --bits {wish.bits} --method {row.methods[0]}"]
    if row.group_size is None and row.methods[0] in {other.methods[0] for other in rows() if other.group_size}:
        words.append("--group-size 0")
    words += [] if format_ is None else [f"--for {wish.runtime}"]
    return " ".join([*words, *(f"--data {shlex.quote(data)}" for data in own)])


def _worth(wish: Wish, reasons: list[str]) -> Wish:
    """The wish with more bits where those take no more room in what runs them."""
    stored = runtime_named(wish.runtime).stored
    free = max((bits for bits in stored if stored[bits] == stored.get(wish.bits)), default=wish.bits)
    if free == wish.bits:
        return wish
    reasons.append(
        f"{wish.runtime} keeps {wish.bits} bits in blocks of {stored[wish.bits]:g} bits per weight, as it keeps "
        f"{free}: {free} bits take the same room and lose less."
    )
    return Wish(free, wish.runtime, wish.data, wish.minutes)


def _why(chosen: Measured, bits: int, quick: Sequence[Measured], found: Sequence[Measured]) -> list[str]:
    before = original().perplexity
    change = (chosen.perplexity or 0.0) / before - 1
    said = [
        f"{chosen.label}: perplexity {chosen.perplexity:.2f} on the bundled model, which has {before:.2f} "
        f"({change:+.1%}), KL {chosen.kl:.4f}, {chosen.bits_per_weight:.2f} stored bits per weight."
    ]
    if chosen.bits != bits:
        said.append(f"{chosen.bits} bits are the most that was measured; {bits} lose less.")
    ranked = sorted(quick, key=lambda row: row.kl or 0.0)
    if ranked[0] is not chosen:
        longer = (ranked[0].seconds or 0) / max(chosen.seconds or 0, 0.1)
        said.append(
            f"{ranked[0].label} loses a little less, KL {ranked[0].kl:.4f}, and takes "
            f"{longer:.{0 if longer >= 10 else 1}f} times as long."
        )
    elif len(ranked) > 1:
        said.append(
            f"Of the {len(ranked)} that were measured, none loses less; {ranked[1].label} has KL {ranked[1].kl:.4f}."
        )
    better = [row for row in found if row not in quick and (row.kl or 0.0) < (chosen.kl or 0.0)]
    if better:
        first = min(better, key=lambda row: row.kl or 0.0)
        said.append(f"With more time, {first.label} has KL {first.kl:.4f}.")
    return said


def _how_long(model: str, seconds: float, weights: int, row: Measured) -> str:
    if (row.seconds or 0.0) < 0.1:
        return "It takes no longer than reading and writing the weights."
    return (
        f"About {_time(seconds)} for the {_count(weights)} weights of {model}, in proportion to the bundled model's "
        f"{row.seconds:.0f} s on two processor cores; a graphics processor needs much less."
    )


def _where(wish: Wish) -> list[str]:
    runtime = RUNTIMES[wish.runtime]
    if runtime.format is None:
        return ["transformers loads the folder itself after `import compress`, and keeps it packed."]
    said = [f"{wish.runtime} reads OUT/{runtime.format}, which is written from the same codes."]
    if runtime.format == "gguf":
        said.append("Where layers have multiples of 256 columns, --type q4_k_m in the place of --bits 4 loses less.")
    if wish.bits in runtime.symmetric:
        said.append("The numbers are of codes with zero points; those for it have none, and lose a little more.")
    return said


def _data(row: Measured, wish: Wish) -> str:
    if not row.data:
        return "It learns from no data."
    if wish.data == "demo":
        return "It learns from the bundled documentation of Python; --data FILE names texts like those it is used for."
    return f"It learns from {wish.data}."


def _seconds(row: Measured, weights: int | None) -> float:
    """About how long the passes take, in proportion to the weights."""
    return (row.seconds or 0.0) * (weights or original().weights) / original().weights


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"


__all__ = ["Advice", "Wish", "advise", "best", "candidates", "method_for"]
