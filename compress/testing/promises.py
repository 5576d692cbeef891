"""What every pass promises about the tensors that it is given and returns, and its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compress.config.options import errors_in
from compress.config.pipeline import METHODS, Pipeline
from compress.config.plugins import register_pass
from compress.config.reading import parse
from compress.config.writing import dump
from compress.encodings import Weight
from compress.engine.validate import observed
from compress.errors import CompressError
from compress.models.site import Site, TensorRef
from compress.passes import BlockPass, DepthPass, ExpertsPass, LinearPass, MergePass, ModelPass, ScalingPass, WidthPass
from compress.testing import merging, seen
from compress.testing.broken import demand
from compress.testing.elsewhere import MixedDevicesError, elsewhere
from compress.testing.trial import CPU, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from compress.passes import Pass
    from compress.passes.interface import Edit
    from compress.testing.trial import Trial

EDITORS = (LinearPass, BlockPass, ModelPass)
SHARES = (None, 0.1, 0.5, 0.9)  # of zeros in what a pass is given; None: dense
LARGEST_ERROR = 2.0  # of a weight, relative: what is further off than its negative is a mistake
OTHER_SEED = 12345  # of the global generator, which must not matter


@dataclass(frozen=True)
class Promise:
    """One promise.

    Attributes:
        kinds: of passes that make it.
        kept: raises where it is not kept; its docstring is the promise in words.
    """

    kinds: tuple[type, ...]
    kept: Callable[[Trial], None]

    @property
    def said(self) -> str:
        """The promise in words."""
        return (self.kept.__doc__ or "").strip().splitlines()[0]


def promises_of(pass_: Pass) -> list[Promise]:
    """Those that a pass of its kind makes."""
    return [promise for promise in (*OF_OPTIONS, *OF_TENSORS) if isinstance(pass_, promise.kinds)]


@contextmanager
def known(kind: type[Pass]) -> Iterator[None]:
    """While open, pipeline files know a pass by its key."""
    before = dict(METHODS)
    try:
        if METHODS.get(kind.key) is not kind:
            register_pass(kind)
        yield
    finally:
        METHODS.clear()
        METHODS.update(before)


def _options(trial: Trial) -> None:
    """Its options are those of a frozen dataclass, described and with defaults, and all that it has."""
    kind = type(trial.pass_)
    names = [f.name for f in dataclasses.fields(kind)]
    demand(set(vars(trial.pass_)) == set(names), f"it keeps more than its options {', '.join(names)}")
    described = " ".join(inspect.getdoc(base) or "" for base in kind.__mro__)
    for field in dataclasses.fields(kind):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        demand(has_default, f"its option {field.name} has no default")
        stands = re.search(rf"^ +{field.name}: ", described, re.MULTILINE)
        demand(stands is not None, f"its option {field.name} is not described under `Args:` of its docstring")
    wrong = errors_in(trial.pass_)
    demand(not wrong, f"the options that it is tried with are impossible: {'; '.join(map(str, wrong))}")


def _file(trial: Trial) -> None:
    """Its options and patterns survive a pipeline file."""
    patterned = dataclasses.replace(trial.pass_, include=("*.mlp.*", "a"), exclude=("*.b",))
    for pass_ in (trial.pass_, *([] if errors_in(patterned) else [patterned])):
        written = dump(Pipeline(passes=((pass_,),)))
        back = parse(written).passes
        demand(back == ((pass_,),), f"{pass_} becomes {back} in a pipeline file")
        demand(dump(Pipeline(passes=back)) == written, f"{pass_} is written otherwise when it was read")


def _repeats(trial: Trial) -> None:
    """The same input gives the same result, whatever the global generator, and is left as it was."""
    for masked in (None, 0.5):
        if trial.accepts(masked):
            given = trial.given(masked)
            before = [t.clone() for target in given.values() for t in tensors(target)]
            first = trial.once(masked)[1]
            torch.manual_seed(OTHER_SEED)
            _same(first, trial.edits(given), "it makes something else the second time")
            after = [t for target in given.values() for t in tensors(target)]
            left = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            demand(left, "it changes the tensors that it is given; clone them first")


def _alone(trial: Trial) -> None:
    """The result of a matrix does not depend on the others."""
    together = trial.once(trial.share)[1]
    backwards = trial.edits(dict(reversed(trial.given(trial.share).items())))
    _same(together, {name: backwards[name] for name in together}, "what it makes depends on the order of matrices")
    for name in trial.shapes:
        alone = trial.edits({name: trial.given(trial.share)[name]})
        _same({name: together[name]}, alone, "what it makes of a matrix depends on the others")


def _zeros(trial: Trial) -> None:
    """No zero comes back."""
    for share in filter(trial.accepts, SHARES[1:]):
        given, found = trial.once(share)
        for name, edit in found.items():
            kept = given[name].mask
            if edit.keeps or kept is None:
                continue
            demand(edit.mask is not None, "it returns an edit without the `mask` that the matrix had")
            assert edit.mask is not None
            revived = bool((edit.mask & ~kept).any())
            demand(not revived, f"its mask keeps weights that were zero, with {share:.0%} zeros")
            values = given[name].weight if edit.low_rank else edit.weight
            made = Weight(values, edit.mask, edit.encoding, low_rank=edit.low_rank).base()
            demand(bool((made[~kept] == 0).all()), f"weights that were zero have values again, with {share:.0%} zeros")


def _edits(trial: Trial) -> None:
    """Its edits have shape, type and kind that they should, and are near what was there."""
    pass_ = trial.pass_
    for masked in filter(trial.accepts, SHARES):
        given, found = trial.once(masked)
        for name, edit in found.items():
            before = Weight(given[name].weight, given[name].mask)
            site = Site(name, trial.shapes[name], TensorRef(f"{name}.weight"), 0)
            original = given[name].original
            old = before.dequantize() if original is None else original
            try:
                after, error = observed(site, pass_, before, old, edit, torch.float32)
            except CompressError as wrong:
                demand(False, str(wrong))
            wanted = pass_.produces(before.kind)
            demand(after.kind == wanted, f"`produces` says {before.kind} becomes {wanted}, and it becomes {after.kind}")
            demand(0 <= error < LARGEST_ERROR, f"with {masked or 0:.0%} zeros its relative error is {error:.3g}")


def _fallback(trial: Trial) -> None:
    """Its stand-in needs no data, has possible options and makes the same kind of weight."""
    assert isinstance(trial.pass_, LinearPass | BlockPass)
    fallback = trial.pass_.stand_in()
    demand(fallback.needs == "none", f"its stand-in needs {fallback.needs} of inputs, which may be what is missing")
    demand(not errors_in(fallback), f"its stand-in has impossible options: {errors_in(fallback)}")
    for kind in trial.pass_.accepts:
        wanted, made = trial.pass_.produces(kind), fallback.produces(kind)
        demand(made == wanted, f"its stand-in makes {made} of {kind}, and it makes {wanted}")


def _rows(trial: Trial) -> None:
    """Rows of a pass that says it is `rowwise` may be stacked."""
    assert isinstance(trial.pass_, LinearPass)
    if not trial.pass_.rowwise:
        return
    columns = next(iter(trial.shapes.values()))[1]
    a, b = (seen.weight(rows, columns, seed) for rows, seed in ((8, 0), (6, 1)))
    x = seen.inputs(columns, tokens=64)
    made = [trial.pass_.run(seen.target(w, x)) for w in (torch.cat([a, b]), a, b)]
    dense = [e.encoding.dequantize() if e.encoding else e.weight for e in made]
    whole, parts = dense[0], torch.cat([part for part in dense[1:] if part is not None])
    assert whole is not None
    unlike = int((whole.ne(0) != parts.ne(0)).any(dim=1).sum())  # a tie that the last bit breaks can change one row
    near = torch.allclose(whole, parts, atol=1e-4)
    demand(unlike <= 1 and near, "it is `rowwise`, and rows come out otherwise when others stand above them")


def _devices(trial: Trial) -> None:
    """It computes the same where its tensors are, and mixes no tensors of two devices."""
    here = trial.on(CPU)
    try:
        with elsewhere() as device:
            there = trial.on(device)
            found = [t for made in there for t in tensors(made)]
            demand(all(t.device == device for t in found), "what it returns does not lie where its input does")
            pairs = zip([t for made in here for t in tensors(made)], found, strict=True)
            demand(all(torch.equal(x, y.cpu()) for x, y in pairs), "it makes something else on another device")
    except MixedDevicesError as error:
        demand(False, f"{error}: make new tensors like those that are given, as in torch.zeros_like")


def _same(a: Mapping[str, Edit], b: Mapping[str, Edit], said: str) -> None:
    """Refuse edits that are not the same to the bit."""
    demand(a.keys() == b.keys(), said)
    for name in a:
        demand(dict(a[name].notes) == dict(b[name].notes), f"{said}: notes of {name}")
        pairs = list(zip(tensors(a[name]), tensors(b[name]), strict=True))
        demand(bool(pairs) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs), f"{said}: {name}")


def _drops(trial: Trial) -> None:
    """So many blocks go as it says, and every time the same ones."""
    pass_ = trial.pass_
    assert isinstance(pass_, DepthPass)
    first, left = seen.dropped(pass_)
    demand(len(first) == pass_.blocks == len(set(first)), f"blocks {first} go, and {pass_.blocks} should")
    demand(left == 6 - pass_.blocks, f"{left} of 6 blocks are left, without {pass_.blocks}")
    side_by_side = list(range(first[0], first[0] + pass_.blocks)) if first else []
    demand(not pass_.neighbours or first == side_by_side, f"blocks {first} go, and they should be neighbours")
    torch.manual_seed(OTHER_SEED)
    demand(seen.dropped(pass_) == (first, left), "other blocks go the second time")


def _experts(trial: Trial) -> None:
    """So many experts of every group stay as it says, and every time the same ones."""
    pass_ = trial.pass_
    assert isinstance(pass_, ExpertsPass)
    for groups in (1, 3):
        shown = seen.experts_seen(pass_, groups)
        before = [t.clone() for t in tensors(shown)]
        left = pass_.run(shown)
        kept, count = left.numbers, len(shown.tokens)
        size = count // groups
        demand(list(kept) == sorted(set(kept)) and len(kept) == shown.keep, f"{kept} stay, and {shown.keep} should")
        each = {sum(i // size == group for i in kept) for group in range(groups)}
        demand(each == {shown.keep // groups}, f"of {groups} groups {each} stay each, and equally many should")
        gone = set(range(count)) - set(kept)
        demand(gone <= shown.may, f"{gone - shown.may} go, which may not")
        torch.manual_seed(OTHER_SEED)
        demand(pass_.run(shown) == left, "others stay the second time")
        unchanged = all(torch.equal(x, y) for x, y in zip(before, tensors(shown), strict=True))
        demand(unchanged, "it changes the tensors that it is given; clone them first")
        demand(pass_.scores(shown).shape == shown.tokens.shape, "its scores are not one for each expert")
        _made_of(pass_, left.made_of, kept, shown.may, (count, size))


def _made_of(
    pass_: ExpertsPass,
    made_of: Mapping[int, Mapping[int, float]],
    kept: Iterable[int],
    may: frozenset[int],
    sizes: tuple[int, int],
) -> None:
    """Refuse experts that are made of others in ways that cannot be."""
    count, size = sizes
    for number, shares in made_of.items():
        demand(number in kept, f"{number} is made of others and does not stay")
        demand(shares.keys() <= may, f"{number} is made of {list(shares)}, of which some may not go")
        demand({i // size for i in shares} == {number // size}, f"{number} is made of experts of other groups")
        demand(abs(sum(shares.values()) - 1) < 1e-6, f"the shares of {number} are {sum(shares.values())} together")
        demand(shares[number] == max(shares.values()), f"{number} has not the largest share in itself")
    merged = [i for shares in made_of.values() for i in shares]
    demand(len(merged) == len(set(merged)), "an expert is in two others")
    everything = {*merged, *kept} == set(range(count)) if pass_.merges else not merged
    demand(everything, "it says whether it `merges`, and does otherwise")


def _units(trial: Trial) -> None:
    """So many units stay as it is told, and every time the same ones."""
    pass_ = trial.pass_
    assert isinstance(pass_, WidthPass)
    for width, biased in ((1, False), (1, True), (4, False), (4, True)):
        shown = seen.units_seen(pass_, width, biased)
        before = [t.clone() for t in tensors(shown)]
        found = pass_.run(shown)
        fine = list(found.kept) == sorted(set(found.kept)) and max(found.kept) < len(shown.columns)
        demand(fine and len(found.kept) == shown.keep, f"{found.kept} stay, and {shown.keep} should, in order")
        wanted = (len(shown.weight), shown.keep * width)
        demand(tuple(found.weight.shape) == wanted, f"its weight has shape {tuple(found.weight.shape)}, not {wanted}")
        demand(found.weight.dtype == torch.float32, f"its weight is {found.weight.dtype}, not float32")
        demand(found.shift is None or biased, "it shifts the bias of a layer that has none")
        demand(0 <= found.notes["error"] < LARGEST_ERROR, f"its error is {found.notes['error']:.3g}")
        torch.manual_seed(OTHER_SEED)
        again = pass_.run(shown)
        demand(again.kept == found.kept and torch.equal(again.weight, found.weight), "the second time is another")
        unchanged = all(torch.equal(x, y) for x, y in zip(before, tensors(shown), strict=True))
        demand(unchanged, "it changes the tensors that it is given; clone them first")
        spare = tuple(pass_.stand_in().run(shown).weight.shape)
        demand(spare == wanted, f"the weight of its stand-in has shape {spare}, not {wanted}")


def _scales(trial: Trial) -> None:
    """Its scales are positive, in the weights, and every time the same."""
    pass_ = trial.pass_
    assert isinstance(pass_, ScalingPass)
    for width in (1, 4):
        shown = seen.channels_seen(pass_, width)
        before = [t.clone() for t in tensors(shown)]
        found = pass_.run(shown)
        count = (len(shown.columns),)
        fine = tuple(found.scales.shape) == count and found.scales.dtype == torch.float32
        demand(fine and bool((found.scales > 0).all()), f"its scales are not {count[0]} positive float32 numbers")
        for made, w in zip(found.weights, shown.weights, strict=True):
            scaled = w * shown.of_columns(found.scales)
            smaller = made.dtype == torch.float32 and bool((made.abs() <= scaled.abs()).all())
            demand(smaller, "its weights are not what the scales make of them, or a part that was cut off")
        torch.manual_seed(OTHER_SEED)
        again = pass_.run(shown)
        pairs = zip([found.scales, *found.weights], [again.scales, *again.weights], strict=True)
        demand(all(torch.equal(a, b) for a, b in pairs), "the second time is another")
        unchanged = all(torch.equal(x, y) for x, y in zip(before, tensors(shown), strict=True))
        demand(unchanged, "it changes the tensors that it is given; clone them first")


def _merges(trial: Trial) -> None:
    """A merge changes nothing that it is given, is the same every time and however tensors are cut into pieces."""
    pass_ = trial.pass_
    assert isinstance(pass_, MergePass)
    given = merging.models(pass_)
    first = merging.merged(pass_, given)
    torch.manual_seed(OTHER_SEED)
    again, cut = merging.merged(pass_, given), merging.merged(pass_, given, piece=11)
    for name, value in first.items():
        demand(torch.equal(value, again[name]), f"the second time is another: {name}")
        fine = value.shape == given[0][name].shape and value.dtype == torch.float32
        demand(fine, f"{name} is {value.dtype} {tuple(value.shape)}, not float32 {tuple(given[0][name].shape)}")
        near = torch.allclose(value, cut[name], rtol=1e-6, atol=1e-7)
        demand(near, f"how {name} is cut into pieces matters")
    for fresh, after in zip(merging.models(pass_), given, strict=True):
        unchanged = all(torch.equal(fresh[name], after[name]) for name in fresh)
        demand(unchanged, "it changes the tensors that it is given; clone them first")


OF_OPTIONS = (
    Promise((object,), _options),
    Promise((object,), _file),
    Promise((LinearPass, BlockPass), _fallback),
)
OF_TENSORS = (
    Promise(EDITORS, _edits),
    Promise(EDITORS, _repeats),
    Promise((LinearPass,), _alone),
    Promise(EDITORS, _zeros),
    Promise((LinearPass,), _rows),
    Promise((DepthPass,), _drops),
    Promise((ExpertsPass,), _experts),
    Promise((WidthPass,), _units),
    Promise((ScalingPass,), _scales),
    Promise((MergePass,), _merges),
    Promise((object,), _devices),
)

__all__ = ["OF_OPTIONS", "OF_TENSORS", "Promise", "known", "promises_of"]
