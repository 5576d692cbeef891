"""What a run did: rows on screen, report.json, and the model card."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """The model after one stage.

    Attributes:
        change: relative increase of perplexity over the original.
        kl: mean KL(original || this) in nats a token.
        bytes: of all weights as stored now.
        bits_per_weight: over the matrices inside the blocks, scales, zero points and masks counted.
        sparsity: share of zeros over the same matrices.
        seconds: of the stage, without measuring.
        peak_mb: largest resident memory of the process so far.
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


@dataclass
class Report:
    """Everything a run measured."""

    model: str
    rows: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # what perplexity was measured on
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # site -> pass -> notes
    fallbacks: list[str] = field(default_factory=list)
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


HEADINGS = ("after", "perplexity", "change", "KL", "size", "bits/weight", "sparsity", "seconds", "peak")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADINGS."""
    return (
        row.name,
        "" if row.perplexity is None else f"{row.perplexity:.3f}",
        "" if row.change is None else f"{row.change:+.2%}",
        "" if row.kl is None else f"{row.kl:.4f}",
        size(row.bytes),
        f"{row.bits_per_weight:.3f}",
        f"{row.sparsity:.1%}",
        f"{row.seconds:.1f}",
        f"{row.peak_mb:.0f} MB",
    )


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} B"


def table(report: Report) -> Table:
    """For the terminal."""
    drawn = Table(title=f"{report.model}", title_justify="left", caption=caption(report), caption_justify="left")
    for i, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in report.rows:
        drawn.add_row(*cells(row))
    return drawn


def caption(report: Report) -> str:
    """What the numbers were measured on."""
    if not report.data:
        return "size only: the pipeline has no `evaluate:`"
    d = report.data
    kl = f"; KL on {d['kl_tokens']} of them" if d.get("kl_tokens") else ""
    return f"perplexity on {d['source']}, {d['windows']} windows of {d['length']}, {d['tokens']} tokens{kl}"


def markdown(report: Report, columns: int = 7) -> str:
    """The table for a page; the first seven columns do not vary from run to run."""
    lines = ["| " + " | ".join(HEADINGS[:columns]) + " |", "|" + "---|" + "---:|" * (columns - 1)]
    lines += ["| " + " | ".join(cells(row)[:columns]) + " |" for row in report.rows]
    return "\n".join(lines) + "\n"


def card(report: Report, pipeline: str) -> str:
    """The model card: README.md of the folder."""
    fallbacks = "".join(f"- {text}\n" for text in report.fallbacks) or "None.\n"
    return (
        "---\nlibrary_name: transformers\ntags: [compress]\n---\n\n"
        f"# {report.model}, compressed\n\n"
        "```python\nimport compress\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")  # stays packed in memory\n```\n\n'
        f"{markdown(report)}\n{caption(report)[0].upper()}{caption(report)[1:]}.\n\n"
        f"## Fallbacks\n\n{fallbacks}\n"
        f"## Pipeline\n\n```yaml\n{pipeline}```\n"
    )
