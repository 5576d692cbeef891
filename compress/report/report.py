"""What a run did: rows in words, report.json, and the model card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.models.narrow import IN_WORDS
from compress.planning.dense import VECTORS
from compress.report import markup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


SAID = {
    "classes": "accuracy",
    "masked": "perplexity of masked tokens",
    "predictions": "error against the original's predictions",
    "outputs": "error against the original's outputs",
}


@dataclass(frozen=True)
class Row:
    """The model after one stage.

    Attributes:
        change: relative increase of perplexity over the original; of a classifier, accuracy minus the original's; None
            of other models.
        kl: mean KL(original || this) in nats per token, or per sample.
        bytes: of all weights as stored now.
        bits_per_weight: over the matrices inside the blocks, scales, zero points and masks counted.
        sparsity: share of zeros over the same matrices.
        bits_per_parameter: all that is stored, over all parameters, embeddings and norms too.
        seconds: of the stage, without measuring.
        peak_mb: largest resident memory of the process so far.
        accuracy: of a classifier: the share of samples it has right.
        negative_flips: share of all tokens (samples) that the original predicts right and this does not.
        sources: of data from several named sources, of each `perplexity` or `accuracy`, `change`, `kl` and
            `negative_flips`; the row's own are of all of them together.
        relative_error: of a model without a next token to predict and without labels: mean of |outputs - original's|
            / |original's|.
        cosine: of the same model, the mean cosine between both.
    """

    name: str
    perplexity: float | None
    change: float | None
    kl: float | None
    bytes: int
    bits_per_weight: float
    sparsity: float
    seconds: float
    peak_mb: float
    accuracy: float | None = None
    negative_flips: float | None = None
    sources: dict[str, dict[str, float | None]] = field(default_factory=dict)
    relative_error: float | None = None
    cosine: float | None = None
    bits_per_parameter: float | None = None


@dataclass
class Report:
    """Everything a run measured."""

    model: str
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what perplexity was measured on
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # site -> pass -> notes
    fallbacks: list[str] = field(default_factory=list)
    dense: dict[str, int] = field(default_factory=dict)  # what no pass made smaller -> bytes
    notes: list[str] = field(default_factory=list)  # what of the source was left out, or taken for something else
    trained: list[dict[str, Any]] = field(default_factory=list)  # pass, numbers it trained, parameters of the model
    dropped: list[dict[str, Any]] = field(default_factory=list)  # pass, blocks it took out, of how many, distances
    experts: list[dict[str, Any]] = field(default_factory=list)  # pass, how many it kept, of how many, and which went
    width: list[dict[str, Any]] = field(
        default_factory=list
    )  # pass, of each part how many it kept, and which, by layer
    norms: list[dict[str, Any]] = field(default_factory=list)  # pass, what became of each norm's statistics
    caches: list[dict[str, Any]] = field(default_factory=list)  # pass, form, bytes of a token, and scales by layer
    merged: list[dict[str, Any]] = field(default_factory=list)  # pass, models, tensors it merged, delta, changes
    verified: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of report.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_pandas(self) -> Any:
        """The rows as a DataFrame of pandas, numbers in full; each figure of a named source has a column of its own.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError(
                "the Python package pandas is not installed; pip install 'compress-pipeline[pandas]'"
            ) from error
        rows = []
        for row in self.rows:
            found = {name: value for name, value in asdict(row).items() if name != "sources"}
            found |= {f"{n} of {source}": value for source, each in row.sources.items() for n, value in each.items()}
            rows.append(found)
        return pandas.DataFrame(rows).set_index("name")

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        names = source_names(self)
        return markup.table(headings(self), [cells(row, names) for row in self.rows]) + markup.paragraph(caption(self))

    def inputs(self) -> Counter[str]:
        """How the inputs of layers are rounded, in words -> of how many layers."""
        said = [[notes["inputs"] for notes in passes.values() if "inputs" in notes] for passes in self.layers.values()]
        return Counter(words[-1] for words in said if words)


def headings(report: Report) -> tuple[str, ...]:
    """The headings of the table; a column for each named source."""
    return (
        "after",
        *quality_headings(report),
        "KL",
        *source_names(report),
        "size",
        "bits/weight",
        "sparsity",
        "seconds",
        "peak",
    )


def quality_headings(report: Report) -> tuple[str, str]:
    """What the model is judged by: a figure and its change, or two that are of a change already."""
    if any(row.relative_error is not None for row in report.rows):
        return "error", "cosine"
    return "accuracy" if any(row.accuracy is not None for row in report.rows) else "perplexity", "change"


def source_names(report: Report) -> list[str]:
    """The named sources of the evaluation data, each with a column of its own."""
    return list(dict.fromkeys(name for row in report.rows for name in row.sources))


def cells(row: Row, sources: Sequence[str] = ()) -> tuple[str, ...]:
    """A row as text, in the order of `headings`."""
    return (
        row.name,
        *_quality(asdict(row)),
        "" if row.kl is None else f"{row.kl:.4f}",
        *(" ".join(_of_source(row.sources[name])) if name in row.sources else "" for name in sources),
        size_text(row.bytes),
        f"{row.bits_per_weight:.3f}",
        f"{row.sparsity:.1%}",
        f"{row.seconds:.1f}",
        f"{row.peak_mb:.0f} MB",
    )


def in_words(report: Report, row: Row) -> str:
    """A row on one line of a log."""
    named = zip(headings(report), cells(row, source_names(report)), strict=True)
    return ", ".join(f"{heading} {cell}" for heading, cell in named if cell)


def _of_source(facts: dict[str, float | None]) -> list[str]:
    quality, change = _quality(facts)
    return [quality, f"({change})"] if change else [quality]


def _quality(facts: Mapping[str, Any]) -> tuple[str, str]:
    error, cosine = facts.get("relative_error"), facts.get("cosine")
    if error is not None and cosine is not None:
        return f"{error:.2%}", f"{cosine:.5f}"
    return figures(facts["perplexity"], facts["accuracy"], facts["change"])


def figures(perplexity: float | None, accuracy: float | None, change: float | None) -> tuple[str, str]:
    """A figure and its change from the original's, in words."""
    if accuracy is not None:
        return f"{accuracy:.2%}", "" if change is None else f"{100 * change:+.2f} points"
    return "" if perplexity is None else f"{perplexity:.3f}", "" if change is None else f"{change:+.2%}"


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} B"


def caption(report: Report) -> str:
    """What the numbers were measured on, which inputs were rounded, what was trained, and what went."""
    rounded = [f"inputs of {count} layers in {words}" for words, count in sorted(report.inputs().items())]
    trained = [
        f"{t['pass']} trained {t['numbers']:,} numbers, {t['numbers'] / t['parameters']:.2%} of the model's"
        for t in report.trained
    ]
    gone = [f"{d['pass']} dropped {_block_list(d['blocks'])} of {d['of']}" for d in report.dropped]
    gone += [_experts(facts) for facts in report.experts]
    gone += [_units(facts) for facts in report.width]
    gone += [f"{n['pass']} counted the statistics of {len(n['layers'])} batch norms again" for n in report.norms]
    rounded += [_cache(facts) for facts in report.caches]
    merged = [_merged(m) for m in report.merged]
    return "; ".join([_measured_on(report), *merged, *rounded, *trained, *gone, *_dense(report)])


def _dense(report: Report) -> list[str]:
    """What no pass made smaller, and what that makes of the bits of all parameters."""
    if not report.dense.keys() - {VECTORS}:  # what everybody expects
        return []
    parts = ", ".join(f"{what} {size_text(size)}" for what, size in report.dense.items())
    bits = report.rows[-1].bits_per_parameter if report.rows else None
    over = "" if bits is None else f"{bits:.3f} bits over all parameters; "
    return [f"{over}left dense: {size_text(sum(report.dense.values()))} ({parts})"]


def _merged(merge: dict[str, Any]) -> str:
    """What was merged, and what was decided."""
    text, notes = f"{merge['pass']} merged it with {', '.join(merge['models'])}", merge.get("notes", {})
    if "chosen" in notes:
        values = ", ".join(f"{name} {value:g}" for name, value in notes["chosen"].items())
        text += f" ({values}, chosen of {len(notes['tried'])})"
    if "soup" in notes:
        kept = [merge["models"][k - 1] if k else "the model itself" for k in notes["soup"]]
        text += f" (the mean of {', '.join(kept)})"
    return f"{text}, {said(merge['delta'])}" if "delta" in merge else text


def said(delta: Mapping[str, Any]) -> str:
    """The size of a compressed delta."""
    bits, times = delta["bits_per_parameter"], delta["times_smaller"]
    size = size_text(delta["bytes"])
    return f"a delta of {size}: {bits:.3f} bits per parameter, {times:.1f} times smaller than the model"


def _experts(facts: Mapping[str, Any]) -> str:
    """How many experts stay, and how many of those that went the calibration data never reached."""
    layers = facts["layers"].values()
    unseen = sum(not layer["tokens"][number] for layer in layers for number in layer["gone"])
    never = f" ({unseen} of those that went were sent no token)" if unseen else ""
    merged = any("merged" in layer for layer in layers)
    made = (
        f"made {facts['kept']} experts of {facts['of']}" if merged else f"kept {facts['kept']} of {facts['of']} experts"
    )
    return f"{facts['pass']} {made} in each of {len(layers)} layers{never}"


def _cache(facts: Mapping[str, Any]) -> str:
    """How keys and values are rounded, and what a token takes."""
    before, now = facts["token_bytes"]
    return (
        f"keys and values of {len(facts['layers'])} layers in {facts['form']}: {now:,} bytes of cache for a token "
        f"instead of {before:,} at 16 bits"
    )


def _units(facts: Mapping[str, Any]) -> str:
    """How many neurons and heads of a block stay."""
    said = [f"{part['kept']} of {part['of']} {IN_WORDS[name]}" for name, part in facts["parts"].items()]
    return f"{facts['pass']} kept {' and '.join(said)} in every block"


def _block_list(places: Sequence[int]) -> str:
    if len(places) < 2:
        return f"block {places[0]}" if places else "no block"
    return f"blocks {', '.join(map(str, places[:-1]))} and {places[-1]}"


def _measured_on(report: Report) -> str:
    if not report.data:
        return "size only: the pipeline has no `evaluate:`"
    d = report.data
    kl = f"; KL on {d['kl_tokens']} of them" if d.get("kl_tokens") else ""
    if d.get("judged_by") in ("predictions", "outputs"):
        kl = f", {d['kl_tokens']} rows of outputs"
    source = d["source"] if isinstance(d["source"], str) else ", ".join(d["source"].values())
    if "samples" in d:
        return f"{SAID[d.get('judged_by', 'classes')]} on {source}, {d['samples']} samples{kl}"
    protocol = f", protocol {d['protocol']}" if "protocol" in d else ""
    return f"perplexity on {source}, {d['windows']} windows of {d['length']}, {d['tokens']} tokens{protocol}{kl}"


def markdown(report: Report) -> str:
    """The table for a page, without the last two columns, which vary from run to run."""
    lines = ["| " + " | ".join(headings(report)[:-2]) + " |", "|" + "---|" + "---:|" * (len(headings(report)) - 3)]
    lines += ["| " + " | ".join(cells(row, source_names(report))[:-2]) + " |" for row in report.rows]
    return "\n".join(lines) + "\n"
