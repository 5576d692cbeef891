"""Pipeline and model structure to stages: what each pass will touch, what it will cost. Reads no weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from compress.calibration.data import IMAGES
from compress.calibration.metrics import REFERENCE_NUMBERS
from compress.calibration.metrics import TOKENS_AT_ONCE as EVALUATED_AT_ONCE
from compress.config.lines import line_of
from compress.config.pipeline import GATES, GIVEN, walk
from compress.encodings import FACTORED, Spec
from compress.encodings.pattern import promised
from compress.errors import ConfigError, Problem, UnsupportedModelError
from compress.models.shorten import without
from compress.models.tracing import find_units
from compress.passes import BlockPass, DeltaPass, DepthPass, LinearPass, MergePass, ModelPass
from compress.passes.merge.permutation import coupled
from compress.passes.prune.selection import pattern
from compress.planning.depth import candidates, check

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from compress.config.pipeline import Pipeline
    from compress.encodings.pattern import Pattern
    from compress.models.graph import Graph, Site
    from compress.passes import Pass

BASELINE = 450 << 20  # Python, torch and transformers, before any work
FLOAT = 4
TRAINING = 5  # numbers a weight of a model that is trained as a whole, adapters not counted
LEARNING = 18  # numbers a weight while it is learned: values, gradients, moments, the best so far, temporaries


@dataclass(frozen=True)
class PassPlan:
    """One pass on one model: the sites it works on, and each one's expected spec afterwards.

    A pass that takes blocks out has the sites of which it may take some, and one that merges those whose weights it
    merges; both have no specs.
    """

    path: str
    pass_: Pass
    sites: tuple[Site, ...]
    specs: dict[str, Spec]


@dataclass(frozen=True)
class Plan:
    """All stages, and what they need.

    Attributes:
        stages: passes that run together, in order.
        final_bytes: expected size of the weights afterwards.
        peak_memory: estimate in bytes, the interpreter included.
        disk: bytes needed beside and at the destination while running.
    """

    stages: tuple[tuple[PassPlan, ...], ...]
    original_bytes: int
    final_bytes: int
    peak_memory: int
    disk: int


def make(pipeline: Pipeline, graph: Graph, dtypes: dict[str, torch.dtype], file: str = "pipeline") -> Plan:
    """Plan a pipeline on a model.

    Args:
        pipeline: parsed.
        graph: the model, parameters possibly on the meta device.
        dtypes: parameter name -> type it is stored in.
        file: for messages.

    Raises:
        ConfigError: every impossible thing at once.
    """
    planner = _Planner(pipeline, graph, dtypes)
    stages: list[list[PassPlan]] = [[] for _ in pipeline.passes]
    for path, number, pass_ in walk(pipeline):
        fused = len(pipeline.passes[number]) > 1
        stages[number].append(planner.add(path, pass_, fused=fused, first=not stages[number]))
    planner.check_data()
    if planner.problems:
        raise ConfigError(planner.problems, file)
    original = sum(p.numel() * dtypes[n].itemsize for n, p in graph.tensors())
    final = dict(planner.sizes)
    for site in planner.graph.sites:
        if site.name in planner.specs:
            final[site.parameter] = planner.specs[site.name].num_bytes
    total = sum(final.values()) + sum(planner.new_biases.values())
    merges = sum(isinstance(p, MergePass) for stage in pipeline.passes for p in stage)
    tries = any(isinstance(p.pass_, MergePass) and p.pass_.judged for stage in stages for p in stage)
    disk = total * (len(stages) - merges + 1) + original * (len(pipeline.export) + merges + tries)
    return Plan(tuple(tuple(s) for s in stages), original, total, planner.memory(), disk)


class _Planner:
    def __init__(self, pipeline: Pipeline, graph: Graph, dtypes: dict[str, torch.dtype]):
        self.pipeline, self.graph, self.dtypes = pipeline, graph, dtypes
        self.problems: list[Problem] = []
        self.specs: dict[str, Spec] = {}
        self.kinds = {s.name: "dense" for s in graph.sites}
        self.tied = graph.tied
        self.parameters = {name for name, _ in graph.model.named_parameters(remove_duplicate=False)}
        self.needy = ""
        self.new_biases: dict[str, int] = {}  # layer -> bytes of a bias that it is given
        self.sizes = {n: p.numel() * dtypes[n].itemsize for n, p in graph.tensors()}
        self.shorter = False  # without some blocks
        self.after_merging = ""  # the first pass that is no merge
        self.merges = 0  # so far

    def problem(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message, line_of(self.pipeline.lines, path)))

    def add(self, path: str, pass_: Pass, fused: bool, first: bool) -> PassPlan:
        what, names = "layer", [s.name for s in self.graph.sites]
        if isinstance(pass_, MergePass):
            what, names = "tensor", [name for name, _ in self.graph.tensors()]
        for option, p in pass_.patterns():
            if not any(fnmatchcase(name, p) for name in names):
                self.problem(f"{path}.{option}", f"{p!r} matches no {what}; {what}s are named like {_some(names, 2)}")
        if fused and isinstance(pass_, ModelPass | DepthPass | MergePass):
            self.problem(
                path, f"{pass_.key} needs the whole model at once and cannot be fused with others by `blockwise:`"
            )
        if isinstance(pass_, MergePass):
            return self._add_merge(path, pass_)
        self.after_merging = self.after_merging or path
        if isinstance(pass_, DepthPass):
            return self._add_depth(path, pass_)
        sites = tuple(s for s in self.graph.sites if pass_.selects(s.name, s.block is not None))
        if pass_.preserves:
            sites = self._check_order(path, pass_, sites)
        elif not sites and not any(pass_.trains(name) for name in self.graph.vectors()):
            self.problem(path, f"works on no layer at all; layers are named like {self._examples()}")
        if not first and isinstance(pass_, LinearPass) and pass_.surveys:
            self.problem(
                path, f"{pass_.key} looks at all layers before it begins, so it must be the first of `blockwise:`"
            )
        self._check_sites(path, pass_, sites)
        if isinstance(pass_, ModelPass) and pass_.loss == "next_token" and not self.graph.is_language_model:
            self.problem(
                f"{path}.objective",
                f"a {type(self.graph.model).__name__} predicts no next token; set it to distill, which trains towards "
                "the original's predictions",
            )
        if self.shorter and isinstance(pass_, ModelPass) and pass_.loss == "distill" and not self.specs:
            more = ", or set it to next_token, which learns from the text" if self.graph.is_language_model else ""
            self.problem(
                f"{path}.objective",
                "the original to learn from is without the blocks that went before, and nothing else is lost; put "
                f"{pass_.key} behind a pruner or quantizer{more}",
            )
        if pass_.calibrated:
            self.needy = self.needy or path
        error = pass_.check_shapes({s.name: s.shape for s in sites}) if sites else None
        if error:
            self.problem(f"{path}.{error.option}", error.message)
        specs = {}
        for site in sites:
            if pass_.refusal(self.kinds[site.name]) is None:
                self.kinds[site.name] = pass_.produces(self.kinds[site.name])
                specs[site.name] = self.specs[site.name] = self._spec(pass_.at(site.name), site)
            if pass_.at(site.name).adds_biases and f"{site.name}.bias" not in self.parameters:
                self.new_biases[site.name] = site.shape[0] * self.dtypes[site.parameter].itemsize
        return PassPlan(path, pass_, sites, specs)

    def _add_merge(self, path: str, pass_: MergePass) -> PassPlan:
        if pass_.calibrated:
            self.needy = self.needy or path
        if self.after_merging:
            before = self.after_merging.rpartition(".")[2]
            self.problem(path, f"{pass_.key} merges whole checkpoints, before anything else; put it before {before}")
        if isinstance(pass_, DeltaPass) and self.merges:
            self.problem(
                path,
                f"{pass_.key} makes a delta to the model that the pipeline is run on; put it first. "
                "What such a run leaves in OUT/delta may be named in `models` of any merge",
            )
        self.merges += 1
        if not any(pass_.selects(name, in_block=True) for name, _ in self.graph.tensors()):
            self.problem(path, f"merges no tensor at all; tensors are named like {self._examples()}")
        elif pass_.aligns and not any(
            pass_.selects(name, in_block=True) for units in find_units(self.graph) for name in units.tensors()
        ):
            self.problem(
                path,
                f"{pass_.key} knows nothing of a {type(self.graph.model).__name__} whose order is free, or it merges "
                "none of it; use average or slerp. It knows the MLPs and heads of Llama and its like, GPT-2, GPT-NeoX, "
                "OPT, BERT and ViT, ResNet, and plain networks of convolutions and linear layers that can be traced",
            )
        return PassPlan(path, pass_, tuple(s for s in self.graph.sites if pass_.selects(s.parameter, True)), {})

    def _add_depth(self, path: str, pass_: DepthPass) -> PassPlan:
        """What comes after it is planned as if the first blocks went: those that may go are of one make."""
        graph = self.graph
        may = candidates(graph, pass_) if pass_.blocks else ()
        made = PassPlan(path, pass_, tuple(s for s in graph.sites if s.block in may), {})
        if not pass_.blocks:
            return made
        self.needy = self.needy or path
        try:
            check(graph, pass_)
            shorter = without(graph, range(may[0], may[0] + pass_.blocks))
        except UnsupportedModelError as error:
            self.problem(path, str(error))
            return made
        between = (graph.in_block(i) for i in range(may[0], may[-1] + 1))
        if len({tuple(self.kinds[s.name] for s in block) for block in between}) > 1:
            self.problem(
                path,
                "passes before it made weights of different kinds in different blocks, so what may follow would depend "
                f"on which block goes; put {pass_.key} before them",
            )
        self.graph, self.shorter = shorter.graph, True
        self.kinds, self.specs = shorter.moved(self.kinds), shorter.moved(self.specs)
        self.sizes, self.dtypes = shorter.moved(self.sizes), shorter.moved(self.dtypes)
        self.new_biases = shorter.moved(self.new_biases)
        self.parameters = set(shorter.moved(dict.fromkeys(self.parameters)))
        return made

    def _check_order(self, path: str, pass_: Pass, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites whose channels a pass may put in another order."""
        chosen = {s.name for s in sites}
        free: set[str] = set()
        for axis in self.graph.axes:
            both = {*axis.makers, *axis.readers}
            if both <= chosen:
                free |= both
            elif both & chosen:
                missing, there = _some(sorted(both - chosen)), _some(sorted(both & chosen))
                self.problem(path, f"{there} share their channels with {missing}: include or exclude them together")
        if not free and not any({*a.makers, *a.readers} & chosen for a in self.graph.axes):
            self.problem(
                path,
                f"{pass_.key} knows no channels of a {type(self.graph.model).__name__} whose order is free; leave it "
                "out. It knows the MLPs and values of Llama and its like, in layers without a bias",
            )
        changed = [name for name in sorted(free) if name in self.specs]
        if changed:
            self.problem(path, f"{_some(changed)} were worked on before; put {pass_.key} before every other pass")
        return tuple(s for s in sites if s.name in free)

    def _check_sites(self, path: str, pass_: Pass, sites: Sequence[Site]) -> None:
        refused = [s for s in sites if pass_.refusal(self.kinds[s.name])]
        if refused:
            kind = self.kinds[refused[0].name]
            self.problem(
                path,
                f"{pass_.key} cannot work on {kind} weights ({_some(s.name for s in refused)}): {pass_.refusal(kind)}",
            )
        misfits: dict[str, list[str]] = {}
        for site in sites:
            reason = pass_.at(site.name).check_shape(site.shape)
            if reason:
                misfits.setdefault(reason, []).append(site.name)
            inputs = pass_.at(site.name).input_form()
            if inputs and not inputs.static and site.stored:
                reason = "a convolution has no tokens, each with a scale of its own; use activation_scale: tensor"
                misfits.setdefault(reason, []).append(site.name)
        for reason, names in misfits.items():
            self.problem(path, f"{_some(names)}: {reason}; change it for them in `overrides`, or `exclude` them")
        grouped = [s for s in sites if s.groups > 1 and pass_.needs != "none"]
        if grouped:
            self.problem(
                path,
                f"{_some(s.name for s in grouped)}: a convolution in {grouped[0].groups} groups, whose rows have "
                f"different inputs; {pass_.key} learns from inputs that all rows share. `exclude` them; a pass that "
                "needs no statistics, such as rtn, can work on them",
            )
        for site in sites:
            if site.parameter in self.tied:
                self.problem(
                    path,
                    f"{site.name} is tied to {self.tied[site.parameter].removesuffix('.weight')}; compressing "
                    "one would change the other. Exclude it",
                )
            if site.block is None and pass_.calibrated and not isinstance(pass_, ModelPass):
                self.problem(
                    path,
                    f"{site.name} is outside the blocks, where no statistics are collected; {pass_.key} cannot work "
                    "on it. Use rtn for it, in a pass of its own with `include`"
                    + (" and without activation_scale: tensor" if getattr(pass_, "ranged", False) else ""),
                )

    def check_data(self) -> None:
        longest = getattr(getattr(self.graph.model, "config", None), "max_position_embeddings", None)
        images = self.graph.is_image_model
        if self.needy and self.pipeline.calibration is None:
            method = self.needy.rpartition(".")[2]
            example = (
                "{source: images.safetensors, samples: 128}" if images else "{source: demo, samples: 128, length: 512}"
            )
            self.problem(
                self.needy,
                f"{method} learns from data, and `calibration:` is missing; for example calibration: {example}",
            )
        if self.pipeline.evaluate:
            gate, other = GATES if self.graph.is_language_model else reversed(GATES)
            measured = "perplexity" if self.graph.is_language_model else "accuracy"
            if getattr(self.pipeline.evaluate, other) is not None:
                self.problem(f"evaluate.{other}", f"this model is judged by its {measured}; its gate is {gate}")
        for exporter in self.pipeline.export:
            for reason in exporter.refusals(self.graph, self.specs, self.new_biases):
                self.problem(f"export.{exporter.key}", reason)
        for name in ("calibration", "evaluate"):
            section = getattr(self.pipeline, name)
            for source in section.sources.values() if section else ():
                if source != GIVEN and source.endswith(IMAGES) != images:
                    wanted = f"images from a {IMAGES} file" if images else "text"
                    self.problem(f"{name}.source", f"{source}: {type(self.graph.model).__name__} takes {wanted}")
            if section and longest and section.length > longest:
                self.problem(f"{name}.length", f"{section.length} is more than the model's {longest} positions")

    def _examples(self) -> str:
        return _some([s.name for s in self.graph.sites], 2)

    def _spec(self, pass_: Pass, site: Site) -> Spec:
        before = self.specs.get(site.name)
        rows, columns = site.shape
        kept, laid = (before.kept, before.pattern) if before else (None, None)
        sparsity = getattr(pass_, "sparsity", None)
        if sparsity is not None:
            n_of_m = pattern(sparsity)
            share = 1 - n_of_m[0] / n_of_m[1] if n_of_m else sparsity
            kept = min(int(rows * columns * (1 - share)), kept if kept is not None else rows * columns)
            laid = _laid(before, n_of_m, kept, columns)
        stored = str(self.dtypes.get(site.parameter, torch.float32)).removeprefix("torch.")
        form, inputs = pass_.form(site.shape), pass_.input_form() or (before.inputs if before else None)
        kind = self.kinds[site.name]
        if kind == FACTORED and (before is None or before.kind != kind):
            return Spec(site.shape, value_dtype=None, inputs=inputs, low_rank=pass_.low_rank_form(site.shape))
        low_rank = pass_.low_rank_form(site.shape) if kind.endswith("-compensated") else None
        if low_rank:
            return replace(before or Spec(site.shape, value_dtype=stored), low_rank=low_rank)
        if form:
            return Spec(site.shape, form, kept, inputs=inputs, pattern=laid)
        if before and sparsity is None:
            return replace(before, inputs=inputs)
        return Spec(site.shape, kept=kept, value_dtype=stored, inputs=inputs, pattern=laid)

    def memory(self) -> int:
        """Interpreter + one block + its statistics and workspace + the activations + the largest outside tensor."""
        graph = self.graph
        parameters = dict(graph.model.named_parameters())
        in_blocks: dict[int, int] = {}
        for site in graph.sites:
            if site.block is not None:
                in_blocks[site.block] = in_blocks.get(site.block, 0) + site.shape[0] * site.shape[1]
        block = max(in_blocks.values(), default=0) * FLOAT
        widest = max((s.shape[1] for s in graph.sites), default=0)
        largest = max((s.shape[0] * s.shape[1] for s in graph.sites), default=0) * FLOAT
        outside = max((p.numel() for p in parameters.values()), default=0) * FLOAT
        calibrated = any(p.calibrated for stage in self.pipeline.passes for p in stage)
        gram = any(p.needs == "gram" for stage in self.pipeline.passes for p in stage)
        hidden = getattr(getattr(graph.model, "config", None), "hidden_size", widest)
        tokens = data.samples * len(data.sources) * data.length if (data := self.pipeline.calibration) else 0
        learned = any(isinstance(p, BlockPass) for stage in self.pipeline.passes for p in stage)
        if learned:
            block *= LEARNING
        statistics = 4 * widest * widest * FLOAT if gram else 0
        # Learning keeps what arrives at a block, what arrives in the original model, and what comes out there.
        activations = (3 if learned else 1) * min(tokens * hidden * FLOAT, 1 << 30) if calibrated else 0
        # Measuring holds a batch's logits, their log-probabilities and temporaries, and the original's for the KL.
        vocabulary = getattr(getattr(graph.model, "config", None), "vocab_size", 0)
        logits = 5 * EVALUATED_AT_ONCE * vocabulary * FLOAT + REFERENCE_NUMBERS * FLOAT
        measuring = logits if self.pipeline.evaluate else 0
        # Training holds the model, what its matrices start as and become, and a batch's logits and their gradients.
        training = [p for stage in self.pipeline.passes for p in stage if p.trains_whole]
        length = self.pipeline.calibration.length if self.pipeline.calibration else 0
        at_once = max((getattr(p, "batch_size", 1) for p in training), default=0) * length
        weights = sum(p.numel() for p in parameters.values())
        aligns = any(isinstance(p, MergePass) and p.aligns for stage in self.pipeline.passes for p in stage)
        whole = TRAINING * weights * FLOAT + 6 * at_once * vocabulary * FLOAT if training else 0
        return (
            BASELINE
            + measuring
            + max(outside * 2, (block if calibrated else 0) + statistics + 4 * largest, whole)
            + (_aligning(graph) if aligns else 0)
            + activations
        )


def _aligning(graph: Graph) -> int:
    """Bytes to match two models: the tensors of one coupled group in both, twice while they move, and its scores."""
    sizes = {name: tensor.numel() for name, tensor in graph.tensors()}
    groups = [(set().union(*(u.tensors() for u in g)), max(u.count for u in g)) for g in coupled(find_units(graph))]
    return max((2 * FLOAT * (4 * sum(sizes[n] for n in names) + 3 * most**2) for names, most in groups), default=0)


def _laid(before: Spec | None, n_of_m: tuple[int, int] | None, kept: int, columns: int) -> Pattern | None:
    """The pattern that a mask is stored with after a pruner that leaves `kept` weights by its pattern or by a share."""
    old = before.pattern if before else None
    pruned = before is not None and before.kept is not None
    more = before is None or before.kept != kept
    if n_of_m is None:
        return None if more else old
    if pruned and (old is None or n_of_m[1] % old.of):
        return None  # zeros that follow different rules: not all runs keep as many
    return promised(*n_of_m, columns) if more else old


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


__all__ = ["LinearPass", "PassPlan", "Plan", "make"]
