"""What a run did: rows on screen, report.json, and the model card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from compress.calibration.metrics import perplexity_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Row:
    """The model after one stage.

    Attributes:
        change: relative increase of perplexity over the original; of a classifier, accuracy minus the original's.
        kl: mean KL(original || this) in nats a token, or a sample.
        bytes: of all weights as stored now.
        bits_per_weight: over the matrices inside the blocks, scales, zero points and masks counted.
        sparsity: share of zeros over the same matrices.
        seconds: of the stage, without measuring.
        peak_mb: largest resident memory of the process so far.
        accuracy: of a classifier: the share of samples it has right.
        negative_flips: share of all tokens (samples) that the original predicts right and this does not.
        sources: of data from several named sources, of each `perplexity` or `accuracy`, `change`, `kl` and
            `negative_flips`; the row's own are of all of them together.
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


@dataclass
class Report:
    """Everything a run measured."""

    model: str
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what perplexity was measured on
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # site -> pass -> notes
    fallbacks: list[str] = field(default_factory=list)
    trained: list[dict[str, Any]] = field(default_factory=list)  # pass, numbers it trained, parameters of the model
    dropped: list[dict[str, Any]] = field(default_factory=list)  # pass, blocks it took out, of how many, distances
    merged: list[dict[str, Any]] = field(default_factory=list)  # pass, models, tensors it merged, delta, changes
    verified: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """As in report.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def worst(self, count: int = 5) -> list[tuple[str, str, float]]:
        """(site, pass, relative weight error), the largest first."""
        found = [
            (site, name, float(notes["error"]))
            for site, passes in self.layers.items()
            for name, notes in passes.items()
        ]
        return sorted(found, key=lambda f: -f[2])[:count]

    def inputs(self) -> Counter[str]:
        """How the inputs of layers are rounded, in words -> of how many layers."""
        said = [[notes["inputs"] for notes in passes.values() if "inputs" in notes] for passes in self.layers.values()]
        return Counter(words[-1] for words in said if words)


def headings(report: Report) -> tuple[str, ...]:
    """Of the columns of the table; a column for each named source."""
    quality = "accuracy" if any(row.accuracy is not None for row in report.rows) else "perplexity"
    return ("after", quality, "change", "KL", *_sources(report), "size", "bits/weight", "sparsity", "seconds", "peak")


def _sources(report: Report) -> list[str]:
    return list(dict.fromkeys(name for row in report.rows for name in row.sources))


def cells(row: Row, sources: Sequence[str] = ()) -> tuple[str, ...]:
    """A row as text, in the order of `headings`."""
    return (
        row.name,
        *_quality(row.perplexity, row.accuracy, row.change),
        "" if row.kl is None else f"{row.kl:.4f}",
        *(" ".join(_of_source(row.sources[name])) if name in row.sources else "" for name in sources),
        size(row.bytes),
        f"{row.bits_per_weight:.3f}",
        f"{row.sparsity:.1%}",
        f"{row.seconds:.1f}",
        f"{row.peak_mb:.0f} MB",
    )


def _of_source(facts: dict[str, float | None]) -> list[str]:
    quality, change = _quality(facts["perplexity"], facts["accuracy"], facts["change"])
    return [quality, f"({change})"] if change else [quality]


def _quality(perplexity: float | None, accuracy: float | None, change: float | None) -> tuple[str, str]:
    """A figure and its change from the original's, in words."""
    if accuracy is not None:
        return f"{accuracy:.2%}", "" if change is None else f"{100 * change:+.2f} points"
    return "" if perplexity is None else f"{perplexity:.3f}", "" if change is None else f"{change:+.2%}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} B"


def table(report: Report, width: int) -> Group:
    """For a terminal of this width. Columns that do not fit beside the others go into another table below."""
    sources = _sources(report)
    columns = list(zip(headings(report), *(cells(row, sources) for row in report.rows), strict=True))
    names, rest = columns[0], columns[1:]
    parts: list[list[tuple[str, ...]]] = [[names]]
    for column in rest:
        if len(parts[-1]) > 1 and _drawn_width([*parts[-1], column]) > width:
            parts.append([names])
        parts[-1].append(column)
    tables = []
    for part in parts:
        drawn = Table()
        for i, (heading, *_) in enumerate(part):
            drawn.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for row in list(zip(*part, strict=True))[1:]:
            drawn.add_row(*row)
        tables.append(drawn)
    tables += [tried(merge) for merge in report.merged if "tried" in merge.get("notes", {})]
    return Group(Text(report.model, "table.title"), *tables, Text(caption(report), "table.caption"))


def tried(merge: dict[str, Any]) -> Table:
    """What a merge tried on the calibration data: options, quality on each source, and answers that turned wrong."""
    tries, chosen = merge["notes"]["tried"], merge["notes"]["chosen"]
    sources = list(tries[0]["found"])
    drawn = Table(title=f"tried by {merge['pass']}", title_justify="left")
    for heading in (*chosen, *(source or "quality" for source in sources), "negative flips"):
        drawn.add_column(heading, justify="right", overflow="fold")
    for each in tries:
        found = [each["found"][source] for source in sources]
        quality = (_quality(None if f["accuracy"] else perplexity_of(f["loss"]), f["accuracy"], None) for f in found)
        drawn.add_row(
            *(f"{each[option]:g}" for option in chosen),
            *(text for text, _ in quality),
            f"{sum(f['negative_flips'] for f in found) / len(found):.2%}",
            style="bold" if all(each[option] == value for option, value in chosen.items()) else "",
        )
    return drawn


def _drawn_width(columns: Sequence[tuple[str, ...]]) -> int:
    """With lines and room between columns."""
    return 1 + sum(3 + max(map(cell_len, column)) for column in columns)


def caption(report: Report) -> str:
    """What the numbers were measured on, which inputs were rounded, what was trained, and which blocks went."""
    rounded = [f"inputs of {count} layers in {words}" for words, count in sorted(report.inputs().items())]
    trained = [
        f"{t['pass']} trained {t['numbers']:,} numbers, {t['numbers'] / t['parameters']:.2%} of the model's"
        for t in report.trained
    ]
    gone = [f"{d['pass']} dropped {_blocks(d['blocks'])} of {d['of']}" for d in report.dropped]
    merged = [_merged(m) for m in report.merged]
    return "; ".join([_measured(report), *merged, *rounded, *trained, *gone])


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
    return f"a delta of {size(delta['bytes'])}: {bits:.3f} bits a parameter, {times:.1f} times smaller than the model"


def _blocks(places: Sequence[int]) -> str:
    if len(places) < 2:
        return f"block {places[0]}" if places else "no block"
    return f"blocks {', '.join(map(str, places[:-1]))} and {places[-1]}"


def _measured(report: Report) -> str:
    if not report.data:
        return "size only: the pipeline has no `evaluate:`"
    d = report.data
    kl = f"; KL on {d['kl_tokens']} of them" if d.get("kl_tokens") else ""
    source = d["source"] if isinstance(d["source"], str) else ", ".join(d["source"].values())
    if "samples" in d:
        return f"accuracy on {source}, {d['samples']} samples{kl}"
    return f"perplexity on {source}, {d['windows']} windows of {d['length']}, {d['tokens']} tokens{kl}"


def markdown(report: Report) -> str:
    """The table for a page, without the last two columns, which vary from run to run."""
    lines = ["| " + " | ".join(headings(report)[:-2]) + " |", "|" + "---|" + "---:|" * (len(headings(report)) - 3)]
    lines += ["| " + " | ".join(cells(row, _sources(report))[:-2]) + " |" for row in report.rows]
    return "\n".join(lines) + "\n"


def card(report: Report, pipeline: str, loader: str = "AutoModelForCausalLM") -> str:
    """The model card: README.md of the folder. `loader` is the class of transformers that loads it."""
    fallbacks = "".join(f"- {text}\n" for text in report.fallbacks) or "None.\n"
    return (
        "---\nlibrary_name: transformers\ntags: [compress]\n---\n\n"
        f"# {report.model}, compressed\n\n"
        f"```python\nimport compress\nfrom transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("this folder")  # stays packed in memory\n```\n\n'
        f"{markdown(report)}\n{caption(report)[0].upper()}{caption(report)[1:]}.\n\n"
        f"## Fallbacks\n\n{fallbacks}\n"
        f"## Pipeline\n\n```yaml\n{pipeline}```\n"
    )
