"""OUT/peft: low-rank corrections as a LoRA adapter of the PEFT library; OUT/peft/base: the model without them.

PEFT computes W x + B (A x), so its sums round elsewhere than those of a layer that multiplies with W + B A.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CompressError
from compress.export.base import FLOAT, Exporter
from compress.export.hf import Dense, Hf, verify_dense, write_dense
from compress.export.refusals import refuse_added, refuse_experts, refuse_rounded
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, write_tensors
from compress.lazy import nn, torch
from compress.models.convolutions import is_convolution

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import LowRankForm, Spec
    from compress.export.base import PackedFolder
    from compress.io.safetensors_file import Entry
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.progress import Bars

ADAPTER, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base"


@dataclass(frozen=True)
class PeftAdapter:
    """The corrections of an artifact, as PEFT names and shapes them."""

    artifact: Artifact

    def forms(self) -> dict[str, LowRankForm]:
        """Site -> its correction's form, in the model's order.

        Raises:
            CompressError: no layer has any.
        """
        done = self.artifact.committed
        found = {s.name: done[s.name].low_rank for s in self.artifact.graph.sites if s.name in done}
        forms = {name: correction.form for name, correction in found.items() if correction is not None}
        if not forms:
            raise CompressError(
                "no layer was worth a correction, so there is no adapter to write; raise the budget of eora, or leave "
                "peft out of `export:`. What is done is kept: run the same command again"
            )
        return forms

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """Every factor; values as they are stored, codes as the float32 they stand for."""
        found = []
        for name, form in self.forms().items():
            shapes = shapes_of(self.artifact.sites[name], form)
            dtypes = [torch.float32 if form.bits else getattr(torch, d) for d in (form.a_dtype, form.b_dtype)]
            found.append((name, list(zip(peft_names(name), shapes, dtypes, strict=True))))
        return found

    def read(self, name: str) -> dict[str, Tensor]:
        """Both factors of one site."""
        correction = self.artifact.committed[name].low_rank
        assert correction is not None
        shapes = shapes_of(self.artifact.sites[name], correction.form)
        dtypes = [f.dtype if isinstance(f, torch.Tensor) else torch.float32 for f in (correction.a, correction.b)]
        made = zip(peft_names(name), correction.factors(), shapes, dtypes, strict=True)
        return {key: factor.reshape(shape).to(dtype) for key, factor, shape, dtype in made}

    def config(self, base: Path) -> dict[str, Any]:
        """adapter_config.json. With alpha the rank, nothing is scaled."""
        ranks = {name: form.rank for name, form in self.forms().items()}
        return adapter_config(self.artifact.graph, ranks, str(base))


def adapter_config(graph: Graph, ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """adapter_config.json. With alpha the rank, nothing is scaled.

    Args:
        graph: of the base.
        ranks: layer -> the rank of its factors.
        base: where PEFT finds the base.
    """
    most = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {name: rank for name, rank in ranks.items() if rank != most}
    transposed = {site.name for site in graph.sites if site.ref.transposed}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if graph.is_language_model else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(name in transposed for name in ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def peft_names(site: str) -> tuple[str, str]:
    """What A and B are called in the file."""
    return f"base_model.model.{site}.lora_A.weight", f"base_model.model.{site}.lora_B.weight"


def shapes_of(site: Site, form: LowRankForm) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and of B; for a convolution, A is one of the same window and B one of a single place."""
    a, b = form.shapes(site.shape).values()
    return ((form.rank, *site.ref.stored[1:]), (*b, 1, 1)) if site.is_convolution else (a, b)


def expressible(module: nn.Module) -> bool:
    """Whether PEFT has corrections for a layer, if it is a convolution."""
    if not is_convolution(module):
        return True
    usual = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return usual and type(module) is nn.Conv2d


@dataclass(frozen=True, kw_only=True)
class Peft(Exporter):
    """Low-rank corrections as a LoRA adapter of the PEFT library, and the model without them."""

    key: ClassVar[str] = "peft"
    files: ClassVar[tuple[str, ...]] = (ADAPTER, CONFIG, *(f"{BASE}/{name}" for name in Hf.files))
    used: ClassVar[tuple[str, str]] = (
        "python",
        "from peft import PeftModel\n"
        "from transformers import LOADER\n"
        "\n"
        'model = PeftModel.from_pretrained(LOADER.from_pretrained("FOLDER/base"), "FOLDER")',
    )

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)
        corrected = [name for name, spec in specs.items() if spec.low_rank is not None]
        if not corrected:
            yield (
                "no pass makes a correction, so there is no adapter to write; put eora last among the passes, or "
                "export hf"
            )
        yield from refuse_experts(graph, corrected, "PEFT")
        modules = dict(graph.model.named_modules())
        strange = [name for name in corrected if name in modules and not expressible(modules[name])]
        if strange:
            yield (
                f"PEFT corrects a convolution only if it is a plain Conv2d without groups, dilation and padding other "
                f"than zeros, and {strange[0]} is not ({len(strange)} in all); `exclude` them in eora, or export hf"
            )

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        adapter = FLOAT * spec.low_rank.rank * sum(spec.shape) if spec.low_rank else 0
        return Hf().expected_bytes(spec, computed) + adapter

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        """Write the adapter. PEFT looks the base up by the path it will have in `final`."""
        adapter = PeftAdapter(made.artifact)
        layout = adapter.layout()
        write_dense(self._base(made), folder / BASE, made.folder, bars, "peft base")
        with writing(folder / ADAPTER):
            write_tensors(layout, adapter.read, folder / ADAPTER, bars, "peft adapter")
        write_json(adapter.config(final / BASE), folder / CONFIG)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        adapter = PeftAdapter(made.artifact)
        count = compare_tensors(adapter.layout(), adapter.read, folder / ADAPTER, bars, "peft adapter")
        return {"tensors_equal": count + verify_dense(self._base(made), folder / BASE, bars, "peft base")}

    def _base(self, made: PackedFolder) -> Dense:
        return Dense(made.artifact, made.dtype, corrected=False)
