"""OUT/genai: the folder that onnxruntime-genai loads and generates with."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import CompressError
from compress.export.onnx.exporter import TIGHT, Onnx
from compress.export.onnx.names import DATA, MODEL
from compress.export.refusals import refuse_missing
from compress.io.atomic import copy, write_json
from compress.lazy import torch
from compress.models import loading

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import PackedFolder
    from compress.models.graph import Graph
    from compress.progress import Bars

CONFIG = "genai_config.json"
PROMPT, NEW = 8, 24  # tokens of the check


@dataclass(frozen=True, kw_only=True)
class Genai(Onnx):
    """The ONNX file of a causal language model with the configuration and tokenizer that onnxruntime-genai wants."""

    key: ClassVar[str] = "genai"
    files: ClassVar[tuple[str, ...]] = (*Onnx.files, CONFIG)
    used: ClassVar[tuple[str, str]] = (
        "python",
        'import onnxruntime_genai\n\nmodel = onnxruntime_genai.Model("FOLDER")',
    )

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from super().refusals(graph, specs, added)
        yield from refuse_missing("onnxruntime_genai", "genai")
        if not graph.is_language_model:
            yield f"it holds language models, and {type(graph.model).__name__} is not one; export onnx"

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        super().write(made, folder, final, bars)
        write_json(configuration(made, folder / MODEL), folder / CONFIG)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        found = super().verify(made, folder, bars)
        for _ in bars.over(range(1), 1, "generate: genai"):
            found["tokens_equal"] = same_tokens(made, folder, self.style == "kernels")
        return found


def configuration(made: PackedFolder, file: Path) -> dict[str, Any]:
    """genai_config.json of a written graph.

    Raises:
        CompressError: it keeps no cache, so it cannot generate; or one of several shapes.
    """
    import onnx_ir as ir

    graph = ir.load(file).graph
    inputs = {value.name: value.shape for value in graph.inputs}
    layers = sum(name.endswith(".key") for name in inputs if name)
    if not layers:
        model = type(made.artifact.graph.model).__name__
        raise CompressError(f"{model} keeps no cache of what it read, so onnxruntime-genai cannot use it; export onnx")
    config: Any = made.artifact.graph.model.config
    kept = {
        (str(s[1]), str(s[3])) for n, s in inputs.items() if n and n.startswith("past_key_values") and s is not None
    }
    if len(kept) > 1:
        raise CompressError(
            f"the layers of {type(made.artifact.graph.model).__name__} keep keys and values of several shapes, for "
            "which genai_config.json has no place; export onnx"
        )
    ((heads, width),) = ((int(heads), int(width)) for heads, width in kept)
    eos = config.eos_token_id if config.eos_token_id is not None else 0
    longest = getattr(config, "max_position_embeddings", None) or 2048
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    past = {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    present = {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}
    return {
        "model": {
            "type": "llama",  # how inputs and outputs are laid out, of whatever family
            "bos_token_id": config.bos_token_id or 0,
            "eos_token_id": eos,
            "pad_token_id": config.pad_token_id or (eos[0] if isinstance(eos, list) else eos),
            "context_length": longest,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                "inputs": names | past,
                "outputs": {"logits": "logits"} | present,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": longest,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0,
            "early_stopping": True,
        },
    }


def same_tokens(made: PackedFolder, folder: Path, kernels: bool) -> int:
    """Generate greedily with onnxruntime-genai and with transformers; returns how many new tokens were the same.

    Raises:
        CompressError: they are not.
    """
    config: Any = made.artifact.graph.model.config
    longest = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    prompt = (torch.arange(min(PROMPT, longest // 2)) * 7919 + 13) % config.vocab_size
    count = min(NEW, longest - len(prompt))
    exact = folder / "exact"
    try:
        there = generated(exactly(folder, exact) if kernels else folder, prompt, count)
    finally:
        shutil.rmtree(exact, ignore_errors=True)
    here = expected(made, prompt, count)
    pairs = list(zip(here, there, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is not None and not equally_likely(made, torch.cat([prompt, torch.tensor(here[:first])]), *pairs[first]):
        raise CompressError(
            f"{folder}: onnxruntime-genai goes on with {there[:8]} where transformers goes on with {here[:8]}; nothing "
            "was given its final name"
        )
    return len(pairs) if first is None else first


def equally_likely(made: PackedFolder, tokens: Tensor, one: int, other: int) -> bool:
    """Whether two tokens are so equally likely that rounding decides."""
    with torch.no_grad():
        logits = loading.load_model(made.folder, torch.float32)(tokens.long()[None]).logits[0, -1]
    return bool((logits[one] - logits[other]).abs() <= TIGHT * max(1.0, float(logits.abs().max())))


def exactly(folder: Path, to: Path) -> Path:
    """The same folder with a graph whose products are exact."""
    from compress.export.onnx.session import at_level

    to.mkdir()
    at_level(folder / MODEL, 1, to / MODEL)
    os.link(folder / DATA, to / DATA)
    for other in folder.glob("*.json"):
        copy(other, to / other.name)
    return to


def generated(folder: Path, prompt: Tensor, count: int) -> list[int]:
    """Tokens that onnxruntime-genai goes on with."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(prompt.to(torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def expected(made: PackedFolder, prompt: Tensor, count: int) -> list[int]:
    """Tokens that transformers goes on with, from the packed folder."""
    model = loading.load_model(made.folder, torch.float32)
    with torch.no_grad():
        found = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=count, do_sample=False
        )
    return [int(token) for token in found[0, len(prompt) :]]
