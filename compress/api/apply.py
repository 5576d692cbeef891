"""Passes over a module in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress import progress
from compress.api import data as given
from compress.api import saving
from compress.api.gates import refuse_idle_gate
from compress.calibration import collect
from compress.calibration.statistics import MIN_EXPERT_TOKENS
from compress.calibration.surroundings import device_of, evaluating, undisturbed
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.sources import ModuleSource
from compress.config.pipeline import Calibration, Evaluation, Pipeline
from compress.config.reading import MOST_SHARE, large_share, mistakes
from compress.encodings import Weight
from compress.engine import manager
from compress.engine.context import Context, expert_options, products_of
from compress.engine.devices import devices_of
from compress.engine.ledger import MemoryLedger
from compress.engine.merge import checks as merges
from compress.errors import ConfigError, Problem
from compress.models import graph as graphs
from compress.models.experts import running_one_by_one
from compress.planning import plan, resources
from compress.planning.places import chosen_device, places_on
from compress.runtime.cache import change_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from compress.calibration.precision import Products
    from compress.config.pipeline import MemoryOf
    from compress.passes import Pass
    from compress.report.report import Report


@dataclass(frozen=True)
class Result:
    """What `apply` made.

    Attributes:
        model: the compressed module; its weights are the dequantized ones, and it rounds inputs and caches that are
            quantized.
        weights: site name -> what is stored: codes, mask, values; on the device that computed them if it has room.
        report: sizes, errors and, with evaluation data, perplexity or accuracy after every pass.
        made: what `save` writes.
    """

    model: nn.Module
    weights: dict[str, Weight]
    report: Report
    made: saving.Made = field(repr=False, compare=False)

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write the packed folder that `run` writes: transformers loads it, and every command reads it.

        Args:
            folder: to write; must not exist.
            tokenizer: of transformers, or a processor, that is saved beside the weights.

        Raises:
            UsageError: the folder exists, or the model is none of transformers.
        """
        saving.save(self.made, self.report, folder, tokenizer)

    def _repr_html_(self) -> str:
        """The table of the report, as notebooks show it."""
        return self.report._repr_html_()


@undisturbed()
def apply(
    model: nn.Module,
    passes: Sequence[Pass | Sequence[Pass]],
    calibration: given.Given | None = None,
    *,
    evaluation: given.Given | None = None,
    max_increase: float | None = None,
    max_drop: float | None = None,
    max_error: float | None = None,
    seed: int = 0,
    inplace: bool = False,
    store_dtype: torch.dtype | None = None,
    products: Products = "bfloat16",
    device: str | None = None,
    max_memory: Mapping[MemoryOf, str] | None = None,
    min_expert_tokens: int = MIN_EXPERT_TOKENS,
    calibrate_all_experts: bool = False,
    towers: Sequence[str] | None = None,
    allow_dense: bool = False,
) -> Result:
    """Run passes over a module in memory.

    Args:
        model: a transformers causal language model or image classifier, or any module that has layers.
        passes: in order; a nested list is fused block by block, as `blockwise:` in a pipeline file.
        calibration: (samples, length) integer token ids for a language model, else inputs (samples, ...), or those and
            (samples,) integer labels: as tensors or arrays, a list of samples, what a tokenizer or an image processor
            returns (without padding), or a data loader; from several sources, a mapping of their names to such data.
        evaluation: (windows, length) token ids of a language model, to measure perplexity and KL after every pass; of
            a classifier, its inputs and (samples,) integer labels, to measure accuracy and KL; of another model, inputs
            on which its outputs are compared with the original's; from several sources, a mapping of their names to
            such data.
        max_increase: the gate: largest relative increase of perplexity, 0.1 for 10 %.
        max_drop: the gate of a classifier: largest fall of accuracy, 0.01 for one point.
        max_error: the gate of other models: largest mean relative error of outputs, 0.05 for 5 %.
        seed: of every random choice.
        inplace: change `model` itself instead of a copy; its parts stay in training or evaluation mode, as they are.
        store_dtype: the type that changed dense weights are kept in; None keeps each parameter's own. A model loaded in
            float32 from a bfloat16 file gives the command line's numbers with torch.bfloat16.
        products: how float32 matrices are multiplied while calibrating: `bfloat16` rounds the factors, `float32` does
            not and is several times slower on processors that have both.
        device: what computes, and where the compressed module then is: `auto`, `cpu`, `cuda`, `cuda:1`; None for where
            the module is. Activations wait there too if they fit, else in the host's memory.
        max_memory: what the passes may take beside the module, such as {"device": "12GB"}; by default what is free.
        min_expert_tokens: experts of a mixture that fewer tokens are sent to are worked on without their statistics.
        calibrate_all_experts: statistics of experts are of all tokens, not of those alone that the router sends them.
        towers: the parts of a model with several that passes work on, such as ["language", "vision"]; by default the
            language of a model that writes, and all of others.
        allow_dense: run also where passes can reach less than 90 % of the matrices that they are for.

    Returns:
        The compressed module and what is stored of every weight.

    Raises:
        ConfigError: impossible options or orders.
        DataError: calibration missing or of the wrong kind.
        GateError: the gate was not met.
        ResourceError: more than `max_memory` is needed, or a device has no room.
        UsageError: a device that is not there, or a size that is none.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=8, length=128)
        >>> result = compress.apply(model, [compress.Wanda(sparsity="2:4"), compress.Gptq(bits=4)], calibration=tokens)
        >>> round(result.report.rows[-1].sparsity, 2)
        0.5
    """
    stages = tuple(tuple(p) if isinstance(p, Sequence) else (p,) for p in passes)
    gates = {"max_increase": max_increase, "max_drop": max_drop, "max_error": max_error}
    steps = Pipeline(
        passes=stages, seed=seed, products=products, max_memory=max_memory or {},
        towers=None if towers is None else tuple(towers), allow_dense=allow_dense,
    )  # fmt: skip
    problems = [*mistakes(steps), *_mistaken_gates(gates, evaluation is not None)]
    if problems:
        raise ConfigError(problems, "apply")
    experts = {"min_expert_tokens": min_expert_tokens, "calibrate_all_experts": calibrate_all_experts}
    compute = device_of(model) if device is None else chosen_device(device)
    if inplace:
        with evaluating(model), running_one_by_one(model):
            return _applied(model.to(compute), steps, calibration, evaluation, gates, store_dtype, experts)
    copied = copy.deepcopy(model).to(compute).eval()
    with running_one_by_one(copied):
        return _applied(copied, steps, calibration, evaluation, gates, store_dtype, experts)


def _mistaken_gates(gates: Mapping[str, float | None], measured: bool) -> Iterator[Problem]:
    for name, limit in gates.items():
        if limit is not None and not measured:
            yield Problem(name, "changes nothing without evaluation data: give `evaluation`")
        if limit is not None and limit > MOST_SHARE:
            yield Problem(name, large_share(limit))


def _applied(
    model: nn.Module,
    steps: Pipeline,
    calibration: given.Given | None,
    evaluation: given.Given | None,
    gates: Mapping[str, float | None],
    store_dtype: torch.dtype | None,
    experts: Mapping[str, Any],
) -> Result:
    """What the passes of `steps` make of the module itself, which is in evaluation mode; see `apply`."""
    graph = graphs.chosen(graphs.find(model), steps.towers)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    data = manager.Data(
        given.dataset(graph, "calibration", calibration, dtype), given.dataset(graph, "evaluation", evaluation, dtype)
    )
    pipeline = replace(
        steps,
        calibration=given.given_section(Calibration, data.calibration, experts),
        evaluate=given.given_section(Evaluation, data.evaluation, gates),
    )
    source = _RecastSource(model, store_dtype)
    artifact = Artifact(graph, source, dict(graph.tied))
    dtypes = {name: tensor.dtype for name, tensor in graph.tensors()}
    where = places_on(device_of(model), steps.max_memory)
    made = plan.make(pipeline, graph, dtypes, where=where)
    if steps.max_memory:
        resources.check_memory(made)
    if pipeline.evaluate and data.evaluation is not None:
        refuse_idle_gate(pipeline.evaluate, model, data.evaluation)
    merges.check_models(pipeline, artifact, "apply")
    merges.check_data(pipeline, data.calibration, graph, "apply")
    given.refuse_by_name(pipeline, data.calibration)
    devices = devices_of(made, resident=True)
    context = Context(
        artifact=artifact, given=artifact, ledger=MemoryLedger(), seed=steps.seed, dtype=dtype,
        products=products_of(graph, steps.products), resident=True, bars=progress.Bars(), devices=devices,
        experts=expert_options(pipeline.calibration),
    )  # fmt: skip
    with devices.scope():
        measured, context = manager.execute(pipeline, made, context, data, type(model).__name__)
    weights = {name: w for name, w in context.artifact.committed.items() if isinstance(w, Weight)}
    for name, weight in weights.items():
        if weight.inputs is not None:
            for user in context.artifact.sites[name].names:
                collect.quantize_inputs(model.get_submodule(user), weight.inputs.apply)
    for name, grid in context.artifact.caches.items():
        change_cache(model.get_submodule(name), grid.apply)
    return Result(model, weights, measured, saving.Made(pipeline, context))


class _RecastSource(ModuleSource):
    """A module's values, with changed ones kept in a type of choice."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None):
        super().__init__(module)
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or super().dtype(name)
