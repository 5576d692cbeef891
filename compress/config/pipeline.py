"""A pipeline as typed objects: its sections, and the passes and exporters that it may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import Field

from compress.calibration.precision import Products  # noqa: TC001  (the type of an option)
from compress.calibration.statistics import MIN_EXPERT_TOKENS
from compress.calibration.tokens import Protocol  # noqa: TC001  (the type of an option)
from compress.export import EXPORTERS
from compress.passes import PASSES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.export import Exporter
    from compress.passes import Pass

METHODS: dict[str, type[Pass]] = {p.key: p for p in PASSES}
FORMATS: dict[str, type[Exporter]] = {e.key: e for e in EXPORTERS}
PRESETS = Path(__file__).parent / "presets"  # ready-made pipelines, by name
PACKED = "safetensors"  # OUT itself, which is always written
GATES = ("max_increase", "max_drop", "max_error")
OF_EXPERTS = ("min_expert_tokens", "calibrate_all_experts")  # of the section `calibration:`
GIVEN = "given from Python"  # the source of tensors that no file holds
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
SIZE = r"^\d+(\.\d+)? *([KMGT]i?)?B$"  # such as 12GB

DeviceName = Annotated[str, Field(pattern=DEVICE, examples=["auto", "cpu", "cuda", "cuda:1"])]
Size = Annotated[str, Field(pattern=SIZE, examples=["12GB"])]
MemoryOf = Literal["device", "host"]


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Data, and how it is read.

    Args:
        source: `demo`, a .txt / .jsonl / .json / .parquet file, or the id of a Hugging Face data set; for models of
            images or sounds a .jsonl / .json / .parquet file whose rows name them, which the model's own processor
            makes inputs of, or a .safetensors file; for calibration also `self`, text that the model writes itself.
            Several by name, such as {maths: a.jsonl, code: b.jsonl}: quality is reported of each.
        samples: windows of tokens, or images, or rows with them, of each source.
        length: tokens per window, not of rows with images or sounds; with `protocol: wikitext` 2048 unless it is given.
        field: the field or column that holds the text, or the messages of a chat; `a.b` is the field b inside of a.
        subset: the configuration name of a data set id.
        protocol: how windows are made of texts. `spread`: each text ends with the tokenizer's end token, and windows
            are spread evenly. `wikitext`, as published perplexities have it: texts are joined by blank lines, with the
            tokenizer's own start and end tokens.
    """

    source: str | Mapping[Annotated[str, MinLen(1)], str] = "demo"
    samples: Annotated[int, Ge(1)] = 128
    length: Annotated[int, Ge(2)] = 512
    field: str = "text"
    subset: str | None = None
    protocol: Protocol = "spread"

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> source; one without a name is called ""."""
        return {"": self.source} if isinstance(self.source, str) else self.source


@dataclass(frozen=True, kw_only=True)
class Calibration(DataSection):
    """The data that passes learn from.

    Args:
        min_expert_tokens: an expert of a mixture that fewer tokens are sent to is worked on as if nothing were known of
            its inputs: a quantizer then rounds, a pruner goes by magnitude. Fewer tokens tell more of themselves than
            of what the expert is sent otherwise.
        calibrate_all_experts: statistics of every expert are of all tokens, not of those alone that the router sends
            it; what comes out is still what the router chose.
    """

    min_expert_tokens: Annotated[int, Ge(1)] = MIN_EXPERT_TOKENS
    calibrate_all_experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluation(DataSection):
    """The data that quality is measured on, and the gate.

    Args:
        samples: windows of tokens, or images, or rows with them, of each source; 0 for all that there are, which is
            what `protocol: wikitext` measures unless a number is given.
        after: `each` pass, or only at the `end`.
        max_increase: the largest allowed increase of perplexity over the original, such as 10% or 0.1; the run fails
            with exit code 3 above it.
        max_drop: the same gate for classifiers: the largest allowed fall of accuracy under the original's, such as 1%
            or 0.01 for one point.
        max_error: the same gate for data without labels of models that predict no next token: the largest allowed mean
            relative error of outputs against the original's, such as 5% or 0.05.
    """

    samples: Annotated[int, Ge(0)] = 64
    after: Literal["each", "end"] = "each"
    max_increase: Annotated[float, Ge(0)] | None = None
    max_drop: Annotated[float, Ge(0)] | None = None
    max_error: Annotated[float, Ge(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for a whole pipeline.

    Args:
        seed: of every random choice.
        dtype: what calibration and evaluation compute in; `auto` is what the model's configuration says.
        products: how float32 matrices are multiplied while calibrating: `bfloat16` rounds the factors and sums in
            float32, several times quicker where the processor can; `float32` does not round. Evaluation never rounds.
        device: what computes: `auto` takes the graphics processor where there is one, or `cpu`, `cuda`, `cuda:1`.
        max_memory: the most that the run may take of the memory of the `device` that computes and of the `host`, such
            as {device: 12GB, host: 32GB}; what is not given is what is free. A run that needs more is refused before it
            begins.
        towers: the parts of a model with several that passes work on, such as [language, vision]; by default the
            language of a model that writes, and all of others.
        allow_dense: run also where passes can reach less than 90 % of the matrices that they are for.
        description: free text.
    """

    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    products: Products = "bfloat16"
    device: DeviceName = "auto"
    max_memory: Annotated[Mapping[MemoryOf, Size], Field(examples=["{device: 12GB, host: 32GB}"])] = field(
        default_factory=dict
    )
    towers: tuple[Annotated[str, MinLen(1)], ...] | None = None
    allow_dense: bool = False
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Pipeline(Settings):
    """A whole pipeline file.

    Args:
        passes: stages in order; a stage is one pass, or several fused with `blockwise:`.
        calibration: None when no pass needs data.
        evaluate: None to measure nothing but size.
        export: folders to write beside the packed one, which is always written.
        lines: path -> line of the file, for messages.
    """

    passes: tuple[tuple[Pass, ...], ...]
    calibration: Calibration | None = None
    evaluate: Evaluation | None = None
    export: tuple[Exporter, ...] = ()
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)


def walk(pipeline: Pipeline) -> Iterator[tuple[str, int, Pass]]:
    """(path in the file, stage number, pass) of every pass, in order."""
    for i, stage in enumerate(pipeline.passes):
        for j, pass_ in enumerate(stage):
            fused = f".blockwise[{j}]" if len(stage) > 1 or f"passes[{i}].blockwise" in pipeline.lines else ""
            yield f"passes[{i}]{fused}.{pass_.key}", i, pass_
