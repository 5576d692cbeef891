"""Pipelines that a single line asks for: `compress quantize`, `prune` and `merge`. Each is what a file could say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.config import elsewhere
from compress.config.advice import NOWHERE, method_for
from compress.config.mixtures import MOST, mixture
from compress.config.options import names_in
from compress.config.pipeline import METHODS, PRESETS
from compress.config.runtimes import refuse_scheme, runtime_named
from compress.config.words import known
from compress.errors import UsageError
from compress.logs import LOGGER
from compress.passes import MergePass
from compress.passes.prune.magnitude import Pruner
from compress.passes.quantize.activations import ActivationOptions
from compress.passes.quantize.grid import UniformOptions, UniformPass

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

AUTO = "auto"
LENGTH = 512  # tokens per window
EVALUATED = 64  # windows
RECOVER = {"perp_reconstruct": {"learning_rate": 2e-3, "steps": 100}}  # a block at a time: see docs/recovery.md
QUANTIZERS = {key: kind for key, kind in METHODS.items() if issubclass(kind, ActivationOptions)}
PRUNERS = {key: kind for key, kind in METHODS.items() if issubclass(kind, Pruner) or key == "global_magnitude"}
MERGES = {key: kind for key, kind in METHODS.items() if issubclass(kind, MergePass)}


def quantizing(
    bits: int, group_size: int | None, method: str, runtime: str, data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What a quantized model is called, and its pipeline.

    Args:
        bits: of the codes.
        group_size: columns that share a scale; 0 for one scale per row; None for what suits method and runtime.
        method: a quantizer, or `auto`.
        runtime: what is to run the result.
        data: sections `calibration` and `evaluate`, as `sections` makes them.

    Raises:
        UsageError: no such method or runtime, or a scheme that the runtime does not compute with.
    """
    where = runtime_named(runtime)
    chosen = method_for(bits, runtime, NOWHERE if "calibration" not in data else "demo") if method == AUTO else method
    kind = _named(chosen, QUANTIZERS, "quantizer")
    uniform = issubclass(kind, UniformOptions)
    if where.uniform and not uniform:
        fitting = ", ".join(key for key, kind in QUANTIZERS.items() if issubclass(kind, UniformOptions))
        raise UsageError(f"--method {chosen}: {runtime} takes uniform codes only; {fitting} would fit")
    if group_size is None and uniform:
        group_size = where.group
    if uniform:
        refuse_scheme(runtime, bits, group_size or None)
    options: dict[str, Any] = {"bits": bits}
    if group_size:
        options["group_size"] = group_size
    if bits in where.symmetric:
        options["symmetric"] = True
    if where.stored.get(bits) and where.stored.get(bits) == where.stored.get(bits + 1):
        said = "%s keeps %d bits in blocks as large as those of %d: no smaller; --type %s is"
        smaller = next((name for name in MOST if name.startswith(f"q{bits}")), "q6_k")
        LOGGER.warning(said, runtime, bits, bits + 1, smaller)
    name = "-".join(
        [
            *([] if method == AUTO else [method.replace("_", "-")]),
            f"w{bits}g{group_size}" if group_size else f"w{bits}",
            *([] if where.format is None else [runtime]),
        ]
    )
    export = {"export": [where.format]} if where.format else {}
    return name, {**_needed(data, kind().calibrated), "passes": [{chosen: options}], **export}


def refuse_beside_type(kind: str, others: Mapping[str, int | None]) -> None:
    """Refuse what a mixture says already. `others`: what was given, by the name of the option.

    Raises:
        UsageError: something was.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UsageError(f"--type {kind} says bits and blocks; leave {' and '.join(given)} out")


def mixing(
    kind: str, method: str, runtime: str, blocks: Callable[[], int], data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What a model in a mixture of super-blocks is called, and its pipeline.

    Args:
        kind: of the mixture, such as q4_k_m.
        method: rtn, gptq, or `auto`: gptq where there is data.
        runtime: what is to run the result.
        blocks: how many the model has; asked for when the rest is right.
        data: as of `quantizing`.

    Raises:
        UsageError: no such mixture, or one that method or runtime does not take.
    """
    where = runtime_named(runtime)
    if not where.super_blocks:
        raise UsageError(f"--type {kind}: {runtime} reads no super-blocks; leave --type out, or take --for llama.cpp")
    if kind not in MOST:
        raise UsageError(f"--type {kind}: {known(kind, [*MOST])}")
    chosen = ("gptq" if "calibration" in data else "rtn") if method == AUTO else method
    able = [key for key, kind in QUANTIZERS.items() if issubclass(kind, UniformPass)]
    if chosen not in able:
        raise UsageError(f"--method {chosen}: super-blocks are for {' and '.join(able)}")
    if chosen == "gptq" and "calibration" not in data:
        raise UsageError("--method gptq learns from data, and --data is none; name a text, or take --method rtn")
    options = {**mixture(kind, blocks()), "scale_search": "weighted" if chosen == "gptq" else "mse"}
    name = "-".join([*([] if method == AUTO else [method]), kind.replace("_", "-")])
    export = {"export": [where.format]} if where.format else {}
    return name, {**_needed(data, chosen == "gptq"), "passes": [{chosen: options}], **export}


def pruning(sparsity: str, method: str, recover: bool, data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a pruned model is called, and its pipeline.

    Args:
        sparsity: a share such as 0.5, or a pattern such as 2:4.
        method: a pruner, or `auto`.
        recover: whether kept weights are trained afterwards, block by block.
        data: as of `quantizing`.

    Raises:
        UsageError: no such method, or no data to recover with.
    """
    learns = "calibration" in data
    options: dict[str, Any] = {"sparsity": sparsity if ":" in sparsity else _share(sparsity)}
    if method == AUTO:
        method = "wanda" if learns else "magnitude"
        options |= {"update": "exact"} if learns else {}
    kind = _named(method, PRUNERS, "pruner")
    if recover and not learns:
        raise UsageError("--recover learns from data, and --data is none; name a text, or leave --recover out")
    passes = [{method: options}, *([RECOVER] if recover else [])]
    label = sparsity.replace(":", "of") if ":" in sparsity else f"{100 * _share(sparsity):g}"
    name = f"sparse-{label}{'-recovered' if recover else ''}"
    return name, {**_needed(data, recover or kind().calibrated), "passes": passes}


def merging(
    models: Sequence[str], method: str, weights: Sequence[float], data: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """What a merged model is called, and its pipeline.

    Args:
        models: that are merged with the one that the pipeline is run on.
        method: a merge.
        weights: of each; of `average` the base's stands first. Empty: the method's own.
        data: as of `quantizing`.

    Raises:
        UsageError: no such method, or one that takes no weights.
    """
    kind = _named(method, MERGES, "merge")
    options: dict[str, Any] = {"models": list(models)}
    if weights:
        if "weights" not in names_in(kind):
            how = f"its options are set by --set 'passes[0].{method}.OPTION=VALUE'; docs/methods/{method}.md names them"
            raise UsageError(f"--weights: {method} takes none; {how}")
        options["weights"] = list(weights)
    return method.replace("_", "-"), {**_needed(data, kind().calibrated), "passes": [{method: options}]}


def numbers_in(option: str, text: str) -> list[float]:
    """Numbers with commas between them, as an option has them.

    Raises:
        UsageError: one of them is none.
    """
    try:
        return [float(number) for number in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"{option} {text}: must be numbers with commas between them, such as 0.7,0.3") from None


def sections(data: str, samples: int, evaluate: str) -> dict[str, Any]:
    """The sections `calibration` and `evaluate` of a pipeline; a source that is `none` has none."""
    found: dict[str, Any] = {}
    if data != NOWHERE:
        found["calibration"] = {"source": data, "samples": samples, "length": LENGTH}
    if evaluate != NOWHERE:
        found["evaluate"] = {"source": evaluate, "samples": EVALUATED, "length": LENGTH}
    return found


def _needed(data: Mapping[str, Any], calibrated: bool) -> dict[str, Any]:
    """The sections without calibration where nothing learns."""
    return {name: section for name, section in data.items() if calibrated or name != "calibration"}


def _named(method: str, kinds: Mapping[str, Any], what: str) -> Any:
    if method in kinds:
        return kinds[method]
    ready: Collection[str] = [file.stem for file in PRESETS.glob("*.yaml")]
    there = None if method in METHODS else elsewhere.of_name(method, ready)
    raise UsageError(f"--method {method}: " + (there or f"no {what} of that name; {known(method, [*kinds])}"))


def _share(sparsity: str) -> float:
    try:
        return float(sparsity)
    except ValueError:
        raise UsageError(f"--sparsity {sparsity}: must be a share such as 0.5, or a pattern such as 2:4") from None


__all__ = [
    "AUTO", "MERGES", "PRUNERS", "QUANTIZERS", "merging", "mixing", "numbers_in", "pruning", "quantizing",
    "refuse_beside_type", "sections",
]  # fmt: skip
