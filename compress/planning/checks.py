"""What is refused before any work: one function per impossible thing, which yields what is wrong and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from compress.errors import Problem
from compress.models.members import is_recurrent
from compress.passes.retrain.options import TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass
    from compress.planning.state import PlanState


def listed(names: Iterable[str], most: int = 3) -> str:
    """Some names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def examples(graph: Graph) -> str:
    """What the layers of a model are called."""
    return listed([s.name for s in graph.sites], 2)


# --- of any pass -----------------------------------------------------------------------------------------------------


def unmatched_patterns(path: str, pass_: Pass, names: Sequence[str], what: str) -> Iterator[Problem]:
    """Patterns that match none of the names; `what` has a name: `layer` or `tensor`."""
    for option, p in pass_.patterns():
        if not any(fnmatchcase(name, p) for name in names):
            yield Problem(f"{path}.{option}", f"{p!r} matches no {what}; {what}s are named like {listed(names, 2)}")


def idle_patterns(
    path: str, pass_: Pass, names: Sequence[str], worked_on: Sequence[str], what: str
) -> Iterator[Problem]:
    """Patterns that match something, but nothing that they could change.

    Args:
        path: of the pass in the pipeline.
        pass_: with its options.
        names: of everything that the model has of its kind.
        worked_on: those that the pass works on.
        what: has a name: `layer` or `tensor`.
    """
    if not worked_on:
        return  # which is said of the pass itself
    rest = f"{what}s that {pass_.key} leaves alone"
    for option, pattern in pass_.patterns():
        there = any(fnmatchcase(name, pattern) for name in names)
        if there and option == "include" and not any(fnmatchcase(name, pattern) for name in worked_on):
            yield Problem(f"{path}.{option}", f"{pattern!r} matches only {what}s that `exclude` leaves alone")
        elif there and option not in ("include", "exclude") and not any(fnmatchcase(n, pattern) for n in worked_on):
            option = option if option != "overrides" else f"overrides[{_number(pass_, pattern)}]"
            yield Problem(
                f"{path}.{option}", f"{pattern!r} matches only {rest}; it works on {what}s like {worked_on[0]}"
            )
    for number, override in enumerate(pass_.overrides):
        later = pass_.overrides[number + 1 :]
        matched = [name for name in worked_on if fnmatchcase(name, override.match)]
        if matched and all(any(fnmatchcase(name, other.match) for other in later) for name in matched):
            yield Problem(
                f"{path}.overrides[{number}]",
                f"changes nothing: every {what} that {override.match!r} matches is also matched by a later override, "
                "and the last one wins",
            )


def _number(pass_: Pass, pattern: str) -> int:
    return next(number for number, override in enumerate(pass_.overrides) if override.match == pattern)


def fused_whole(path: str, pass_: Pass, fused: bool) -> Iterator[Problem]:
    """A pass over the whole model among others that run block by block."""
    if fused and pass_.reach not in ("matrix", "block"):
        yield Problem(
            path, f"{pass_.key} needs the whole model at once and cannot be fused with others by `blockwise:`"
        )


# --- of a pass over layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pass over layers, and what it is to work on.

    Attributes:
        state: the model as the passes before leave it.
        path: of the pass in the pipeline.
        pass_: with its options.
        sites: that it works on.
    """

    state: PlanState
    path: str
    pass_: Pass
    sites: tuple[Site, ...]

    def refused(self, message: str, option: str = "") -> Problem:
        """A problem of this pass, or of one of its options."""
        return Problem(f"{self.path}.{option}" if option else self.path, message)

    @property
    def model(self) -> str:
        """What the model's class is called."""
        return type(self.state.graph.model).__name__


def no_layer(case: Case) -> Iterator[Problem]:
    """Nothing to work on, matrix or vector."""
    graph = case.state.graph
    if not case.sites and not any(case.pass_.trains(name) for name in graph.vectors()):
        yield case.refused(f"works on no layer at all; layers are named like {examples(graph)}")


def channel_order(case: Case, free: Sequence[Site]) -> Iterator[Problem]:
    """Channels that cannot be put in another order. `free`: the sites of the case whose channels can."""
    axes, chosen = case.state.graph.axes, {s.name for s in case.sites}
    for axis in axes:
        both = {*axis.makers, *axis.readers}
        if both & chosen and not both <= chosen:
            missing, there = listed(sorted(both - chosen)), listed(sorted(both & chosen))
            yield case.refused(f"{there} share their channels with {missing}: include or exclude them together")
    if not free and not any({*a.makers, *a.readers} & chosen for a in axes):
        yield case.refused(
            f"{case.pass_.key} knows no channels of a {case.model} whose order is free; leave it out. It knows the "
            "MLPs and values of Llama and its like, in layers without a bias"
        )
    changed = sorted(s.name for s in free if s.name in case.state.specs)
    if changed:
        yield case.refused(f"{listed(changed)} were worked on before; put {case.pass_.key} before every other pass")


def survey_behind_others(case: Case, first: bool) -> Iterator[Problem]:
    """A pass that must see all layers, behind passes that change one block after the other."""
    if not first and case.pass_.surveys:
        yield case.refused(
            f"{case.pass_.key} looks at all layers before it begins, so it must be the first of `blockwise:`"
        )


def kinds(case: Case) -> Iterator[Problem]:
    """Weights of a kind that the pass cannot work on."""
    refused = [s for s in case.sites if case.pass_.refusal(case.state.kinds[s.name])]
    if refused:
        kind = case.state.kinds[refused[0].name]
        names, reason = listed(s.name for s in refused), case.pass_.refusal(kind)
        yield case.refused(f"{case.pass_.key} cannot work on {kind} weights ({names}): {reason}")


def forms(case: Case) -> Iterator[Problem]:
    """Codes that the pass cannot go on from."""
    if not isinstance(case.pass_, TrainingOptions):
        return
    misfits: dict[str, list[str]] = {}
    for site in case.sites:
        spec = case.state.specs.get(site.name)
        reason = None if spec is None or spec.form is None else case.pass_.at(site.name).check_form(spec.form)
        if reason and case.pass_.refusal(case.state.kinds[site.name]) is None:
            misfits.setdefault(reason, []).append(site.name)
    for reason, names in misfits.items():
        yield case.refused(f"{listed(names)}: {reason}; or `exclude` them")


def shapes(case: Case) -> Iterator[Problem]:
    """Matrices whose shape does not fit the options, and inputs whose grid does not fit the layer."""
    misfits: dict[str, list[str]] = {}
    for site in case.sites:
        own = case.pass_.at(site.name)
        reason, inputs = own.check_shape(site.shape), own.input_form()
        if reason:
            misfits.setdefault(reason, []).append(site.name)
        if inputs and not inputs.static and site.is_convolution:
            reason = "a convolution has no tokens, each with a scale of its own; use activation_scale: tensor"
            misfits.setdefault(reason, []).append(site.name)
        if inputs and inputs.kind.per_column and site.is_convolution:
            reason = "a convolution reads its inputs in windows, and has no columns to skip"
            misfits.setdefault(reason, []).append(site.name)
    for reason, names in misfits.items():
        yield case.refused(f"{listed(names)}: {reason}; change it for them in `overrides`, or `exclude` them")


def inputs_changed_twice(case: Case) -> Iterator[Problem]:
    """Inputs that are rounded and skipped: what is stored beside a layer says one of the two."""
    specs = case.state.specs
    both = []
    for site in case.sites:
        before, own = specs[site.name].inputs if site.name in specs else None, case.pass_.at(site.name).input_form()
        if before and own and before.kind.per_column != own.kind.per_column:
            both.append(site.name)
    if both:
        yield case.refused(
            f"the inputs of {listed(both)} are {specs[both[0]].inputs} already, and a layer either rounds or skips "
            "its inputs; `exclude` them here, or leave activation_bits or activation_sparsity out"
        )


def grouped_convolutions(case: Case) -> Iterator[Problem]:
    """Convolutions in groups, for a pass that learns from inputs and does not take one row after the other."""
    grouped = [s for s in case.sites if s.groups > 1 and _mixes_rows(case.pass_.at(s.name))]
    if grouped:
        yield case.refused(
            f"{listed(s.name for s in grouped)}: a convolution in {grouped[0].groups} groups, whose rows have "
            f"different inputs; {case.pass_.key}, as it is set here, learns from inputs that all rows share. `exclude` "
            "them; gptq with a scale for each row or group, wanda, sparsegpt with N:M, and a pass that needs no "
            "statistics, such as rtn, can work on them"
        )


def _mixes_rows(pass_: Pass) -> bool:
    """Whether a pass learns from the inputs of a matrix, and not of each row alone."""
    return learns_from_inputs(pass_) and (pass_.surveys or not getattr(pass_, "rowwise", False))


def experts(case: Case) -> Iterator[Problem]:
    """What has no place at an expert of a fused parameter: changed inputs, and a bias of its own."""
    chosen = [s for s in case.sites if s.is_expert]
    rounded = [s.name for s in chosen if case.pass_.at(s.name).input_form() is not None]
    if rounded:
        yield case.refused(
            f"{listed(rounded)}: experts that the model keeps together in one tensor, whose inputs cannot be rounded "
            f"or skipped; `exclude` them{_without_inputs(case.pass_)}"
        )
    biased = [s.name for s in chosen if case.pass_.at(s.name).adds_biases]
    if biased:
        yield case.refused(
            f"{listed(biased)}: experts that the model keeps together in one tensor can be given no bias; `exclude` "
            f"them, or let {case.pass_.key} add none"
        )


def _without_inputs(pass_: Pass) -> str:
    """How else a pass may work on weights whose inputs cannot change, behind a comma; nothing where it cannot."""
    quantizer = hasattr(pass_, "activation_bits")
    return " and quantize their weights in a pass of their own, without activation_bits" if quantizer else ""


def members(case: Case) -> Iterator[Problem]:
    """What has no place at a matrix that a module reads itself: changed inputs, a new bias, sums over its inside."""
    chosen = [(site, case.pass_.at(site.name)) for site in case.sites if site.read_by is not None]
    rounded = [site.name for site, own in chosen if own.input_form() is not None]
    if rounded:
        yield case.refused(
            f"{listed(rounded)}: matrices that a module of torch multiplies with itself, whose inputs cannot be "
            f"rounded or skipped; `exclude` them{_without_inputs(case.pass_)}"
        )
    biased = [site.name for site, own in chosen if own.adds_biases and not site.is_layer]
    if biased:
        yield case.refused(f"{listed(biased)}: no layers, so they can be given no bias; `exclude` them")
    modules = dict(case.state.graph.model.named_modules())
    unseen = [site for site, own in chosen if learns_from_inputs(own) and is_recurrent(modules[site.read_by or ""])]
    if unseen:
        kind = type(modules[unseen[0].read_by or ""]).__name__
        yield case.refused(
            f"{listed(site.name for site in unseen)}: matrices of an {kind}, in which nobody sees what they are "
            f"multiplied with, and {case.pass_.key} learns from that; `exclude` them, or let a pass that needs no "
            "statistics, such as rtn, work on them"
        )


def learns_from_inputs(pass_: Pass) -> bool:
    """Whether a pass must know anything of the inputs of a matrix."""
    return pass_.needs != "none" or (pass_.surveys and getattr(pass_, "survey_needs", "none") != "none")


def tied_or_outside(case: Case) -> Iterator[Problem]:
    """Matrices that share their values with another, and those where a block is learned that is none."""
    graph, pass_ = case.state.graph, case.pass_
    for site in case.sites:
        if site.shared and not site.looked_up and pass_.at(site.name).adds_biases:
            yield case.refused(
                f"{site.name} is shared with {site.shared[0]}, so {pass_.key} cannot give it a bias of its own; "
                "`exclude` it, or use a method that adds none"
            )
        if site.parameter in graph.tied and not site.looked_up:
            other = graph.tied[site.parameter].removesuffix(".weight")
            yield case.refused(f"{site.name} is tied to {other}; compressing one would change the other. Exclude it")
        if site.block is None and pass_.calibrated and pass_.reach == "block":
            yield case.refused(
                f"{site.name} is outside the blocks, and {pass_.key} learns blocks; it cannot work on it. Use a method "
                "that works on one matrix at a time, such as gptq or rtn, in a pass of its own with `include`"
            )


def tables(case: Case, written: Pass) -> Iterator[Problem]:
    """What cannot be done to the table of an embedding. `written`: the pass as the pipeline has it."""
    graph, pass_ = case.state.graph, case.pass_
    if getattr(written, "embeddings", None) is not None and not any(s.block is None for s in case.sites):
        yield case.refused(
            f"a {case.model} has no embedding and no head that is not excluded; leave it out", "embeddings"
        )
    others = [site for site in graph.sites if site not in case.sites]
    for site in others if pass_.reach == "model" and pass_.calibrated else ():
        head = next((name for name in site.shared if pass_.selects(name, in_block=False)), None)
        if head is not None:
            yield case.refused(f"{head} is tied to {site.name}; compressing one would change the other. Exclude it")
    for site in case.sites:
        own = pass_.at(site.name)
        if not site.looked_up:
            continue
        if pass_.reach == "model" and pass_.calibrated:
            yield case.refused(f"{site.name} is an embedding, which {pass_.key} cannot train; `exclude` it")
        if own.input_form() is not None:
            rest = "use activation_bits: null for it in `overrides`, or name it with `embeddings:`"
            rest = rest if hasattr(own, "activation_bits") else "`exclude` it"
            yield case.refused(f"rows of {site.name} are looked up, so it has no inputs to round or skip; {rest}")
        if own.low_rank_form(site.shape) is not None:
            yield case.refused(
                f"rows of {site.name} are looked up, and {pass_.key} keeps two factors whose product is no row; "
                "`exclude` it"
            )


def training_objective(case: Case) -> Iterator[Problem]:
    """A loss that the model cannot be trained for."""
    state, pass_, language = case.state, case.pass_, case.state.graph.is_language_model
    if pass_.loss == "next_token" and not language:
        yield case.refused(
            f"a {case.model} predicts no next token; set it to distill, which trains towards the original's "
            "predictions",
            "objective",
        )
    if state.shorter and pass_.loss == "distill" and not state.specs:
        more = ", or set it to next_token, which learns from the text" if language else ""
        yield case.refused(
            "the original to learn from is without the blocks, experts, neurons or heads that went before, and nothing "
            "else is lost; "
            f"put {pass_.key} behind a pruner or quantizer{more}",
            "objective",
        )


def shapes_together(case: Case) -> Iterator[Problem]:
    """Options that do not fit all the matrices together."""
    error = case.pass_.check_shapes({s.name: s.shape for s in case.sites}) if case.sites else None
    if error:
        yield case.refused(error.message, error.option)
