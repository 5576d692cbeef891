"""Names and files of other tools where a pipeline is expected: what to write here instead.

Names are those of llm-compressor (W4A16), AutoRound (W2A16G64), llama.cpp (Q4_K_M), bitsandbytes (nf4) and papers
(awq); files are recipes of llm-compressor, mergekit's configurations, and quantization configurations of transformers.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any

from compress.config.mixtures import MOST
from compress.config.pipeline import FORMATS, METHODS
from compress.logs import printable
from compress.passes import MergePass
from compress.passes.quantize.named_grids import FLOAT_GRIDS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

WIDTHS = range(2, 9)  # bits that quantizers here have
SCHEME = re.compile(r"(?:int\d+_)?w(\d+)a(\d+)(?:_?g(\d+))?", re.IGNORECASE)
GGML = re.compile(r"(?:gguf:)?i?q(\d)_(?:k|0|1|nl|xs|xxs|s|m)(?:_(?:s|m|l|xl))?", re.IGNORECASE)
FLOATS = re.compile(r"(fp8|mxfp4|nvfp4)(?:[-_]?(a16|dynamic|block|static))?", re.IGNORECASE)  # that are here too
OTHER_FLOATS = re.compile(r"(?:mx|nv|nf|fp|bnb)[-_]?(?:fp|w)?(\d)(?:-?bits?|a\d+|_\w+)?", re.IGNORECASE)
WIDTH = re.compile(r"(?:u?int|w)?_?-?(\d)(?:-?bits?)?", re.IGNORECASE)
RUNTIMES = {
    "vllm": "vllm", "marlin": "vllm", "sglang": "sglang", "mlx": "mlx", "llama.cpp": "llama.cpp",
    "llamacpp": "llama.cpp", "gguf": "llama.cpp",
}  # fmt: skip
CALLED = {"awq": "scale", "smoothquant": "smooth", "quarot": "rotate"}  # methods that have another name here
NEAREST = {  # methods of others -> the nearest here, by what they do
    "autoround": ("flexround", "learns how to round, too"),
    "signround": ("flexround", "learns how to round, too"),
    "omniquant": ("flexround", "learns scales, too"),
    "spinquant": ("rotate", "turns the residual stream, too"),
    "hqq": ("rtn", "needs no data, either"),
    "aqlm": ("jlcm", "learns tables of values, too"),
    "squeezellm": ("codebook", "makes tables by k-means, too"),
    "slicegpt": ("width_prune", "takes out channels, too"),
    "shortgpt": ("layer_drop", "drops blocks, too"),
}
MODIFIERS = {  # of llm-compressor -> the methods here
    "GPTQModifier": ("gptq",), "QuantizationModifier": ("rtn",), "AWQModifier": ("scale", "rtn"),
    "SmoothQuantModifier": ("smooth",), "AutoRoundModifier": ("flexround",), "SparseGPTModifier": ("sparsegpt",),
    "WandaPruningModifier": ("wanda",), "MagnitudePruningModifier": ("magnitude",),
    "ConstantPruningModifier": ("magnitude",),
}  # fmt: skip
PRUNERS = ("sparsegpt", "wanda", "magnitude")
DEEPEST = 4  # levels of a recipe at which modifiers stand


def of_name(name: str, ready: Collection[str]) -> str | None:
    """What to write for a name that is no pipeline here, but something to others; None where it is nothing known.

    Args:
        name: as it was given.
        ready: names of the ready-made pipelines.
    """
    word = name.lower().removesuffix(".yaml")
    plain = re.sub(r"[-_ ]", "", word)
    method = next((key for key in METHODS if key.replace("_", "") == plain), None)
    if method is not None:
        return f"{name} is a method, and a pipeline is expected; {_with_method(method, ready)}"
    if match := SCHEME.fullmatch(word):
        bits, inputs, group = int(match[1]), int(match[2]), match[3]
        how = _weights(bits, ready, group) if inputs >= 16 else _both(bits, inputs, ready)
        return f"{name} is a scheme of other tools; {how}"
    if match := GGML.fullmatch(word):
        mixed = word.removeprefix("gguf:")
        mixed = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}.get(mixed, mixed)
        what = f"--type {mixed}" if mixed in MOST else f"--bits {match[1]}"
        line = f"compress quantize MODEL {what} --for llama.cpp"
        return f"{name} is a type of llama.cpp, and a pipeline is expected; write `{line}`"
    if plain in RUNTIMES or word in RUNTIMES:
        runtime = RUNTIMES.get(word) or RUNTIMES[plain]
        return f"{name} is no pipeline; write `compress quantize MODEL --bits 4 --for {runtime}`"
    if plain in CALLED:
        return f"{name} is called {CALLED[plain]} here; {_with_method(CALLED[plain], ready)}"
    if word in FORMATS:
        return f"{name} is a format, and a pipeline is expected; give it `--set export={word}`"
    if plain in NEAREST:
        nearest, why = NEAREST[plain]
        return f"{name} is not among the methods; {nearest} {why}: {_with_method(nearest, ready)}"
    if match := FLOATS.fullmatch(word):
        named = [each for each in sorted(ready) if each.endswith(f"-{match[1]}") and "-kv-" not in each]
        found = next(iter(named), None)
        how = f"`{found}`" if found else f"a file with `passes: [{{rtn: {{scheme: {match[1]}}}}}]`"
        return f"{name} is a grid, and a pipeline is expected; write {how}"
    if match := OTHER_FLOATS.fullmatch(word):
        return f"{name} is not among the floats here ({', '.join(FLOAT_GRIDS)}); {_weights(int(match[1]), ready)}"
    if match := WIDTH.fullmatch(word):
        return f"{name} says bits, and a pipeline is expected; {_weights(int(match[1]), ready)}"
    return None


def of_file(values: Any, file: str) -> str | None:
    """What to do with a file of another tool that was given as a pipeline; None where it may be one."""
    if not isinstance(values, dict) or "passes" in values:
        return None
    if "merge_method" in values:
        return (
            f"{file} is a configuration of mergekit; `compress init pipeline.yaml --from-mergekit "
            f"{shlex.quote(file)}` writes it as a pipeline"
        )
    found = list(_modifiers(values, DEEPEST))
    if found:
        return printable(f"{file} is a recipe of llm-compressor; {_recipe(found)}")
    config = values.get("quantization_config", values)
    bits = config.get("bits", config.get("w_bit")) if isinstance(config, dict) else None
    if isinstance(bits, int) and bits in WIDTHS:
        group = config.get("group_size", config.get("q_group_size"))
        sized = f" --group-size {group}" if isinstance(group, int) and group > 0 else ""
        return f"{file} is a quantization configuration; write `compress quantize MODEL --bits {bits}{sized}`"
    return None


def _with_method(method: str, ready: Collection[str]) -> str:
    """How to run one method."""
    begin = f"{method.replace('_', '-')}-"
    found = sorted((name for name in ready if name.startswith(begin)), key=lambda name: (len(name), name))
    if issubclass(METHODS[method], MergePass):
        return f"write `compress merge BASE MODEL MODEL --method {method}`"
    if found:
        return f"write {' or '.join(f'`{name}`' for name in found[:4])}"
    return f"write a file with `passes: [{method}]`; `compress init` writes one to start from"


def _weights(bits: int, ready: Collection[str], group: str | None = None) -> str:
    """How to round weights alone to so many bits."""
    if bits not in WIDTHS:
        return f"quantizers have 2 to 8 bits, not {bits}; write `compress quantize MODEL --bits 4`"
    name = f"gptq-w{bits}"
    if group is None and name in ready:
        return f"write `{name}`"
    return f"write `compress quantize MODEL --bits {bits}{f' --group-size {group}' if group else ''}`"


def _both(bits: int, inputs: int, ready: Collection[str]) -> str:
    """How to round weights and what they are multiplied with."""
    found = next((name for name in sorted(ready) if name.endswith(f"-w{bits}a{inputs}")), None)
    return f"write `{found}`" if found else f"write `passes: [{{gptq: {{bits: {bits}, activation_bits: {inputs}}}}}]`"


def _modifiers(values: Any, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every modifier of a recipe with its options, in order."""
    parts = values.items() if isinstance(values, dict) else ()
    for name, inner in parts:
        if name.endswith("Modifier"):
            yield name, inner if isinstance(inner, dict) else {}
        elif depth:
            yield from _modifiers(inner, depth - 1)


def _recipe(found: list[tuple[str, Mapping[str, Any]]]) -> str:
    """The passes that are nearest to a recipe, and what is left out."""
    passes = [f"{method}: {_options(method, options)}" for name, options in found for method in MODIFIERS.get(name, ())]
    left = [name for name, _ in found if name not in MODIFIERS]
    rest = f" ({', '.join(left)}: nothing here does that)" if left else ""
    ignored = {str(pattern) for _, options in found for pattern in _list(options.get("ignore"))} - {"lm_head"}
    rest += "; what `ignore` names goes into `exclude`, as shell wildcards" if ignored else ""
    if not passes:
        return f"none of {', '.join(left)} has a method here; `compress list` names those that there are"
    return f"write `passes: [{', '.join(f'{{{entry}}}' for entry in passes)}]`{rest}"


def _options(method: str, options: Mapping[str, Any]) -> str:
    """The options of a method that say what a modifier's do."""
    if method in PRUNERS:
        pattern = options.get("mask_structure")
        free = pattern in (None, "0:0", "unstructured")
        return f"{{sparsity: {options.get('sparsity', 0.5)}}}" if free else f'{{sparsity: "{pattern}"}}'
    if method == "smooth":
        return f"{{strength: {options.get('smoothing_strength', 0.5)}}}"
    groups = options.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    if floats := FLOATS.fullmatch(str(options.get("scheme"))):
        return _floats(floats[1].lower(), (floats[2] or "").lower())
    match = SCHEME.fullmatch(str(options.get("scheme")))
    bits = int(match[1]) if match else weights.get("num_bits", 4)
    inputs = int(match[2]) if match else 16
    group = weights.get("group_size", 128 if inputs >= 16 and bits == 4 else None)
    scheme = f"w{bits}g{group}" if group else f"w{bits}"
    if method == "scale":  # of weights alone
        return f"{{scheme: {scheme}}}"
    return f"{{scheme: {scheme}{'' if inputs >= 16 else f', activation_bits: {inputs}'}}}"


def _floats(grid: str, kind: str) -> str:
    """The options of a scheme of floats; inputs of 4 bits are not rounded here."""
    options = [f"scheme: {grid}"]
    if grid == "fp8" and kind != "a16":
        options += ["granularity: block"] if kind == "block" else []
        options += ["activation_bits: 8", "activation_grid: fp8"]
        options += ["granularity: tensor", "activation_scale: tensor"] if kind in ("", "static") else []
    return f"{{{', '.join(options)}}}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


__all__ = ["of_file", "of_name"]
