"""Write what `compress list` and `compress advise` know, and the tables of docs/choosing.md.

    python scripts/choosing.py

Writes compress/config/measured.json and the tables between marks in docs/choosing.md. Which format holds a result is
what the plan of each pipeline on the bundled model says. Nothing is measured here: docs/results.json and
docs/quantizers.json are read. Run it when a method, a ready-made pipeline, a format or a measurement is new.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from compress.checkpoint import opening
from compress.config.pipeline import FORMATS, PRESETS, Pipeline, walk
from compress.config.reading import load_pipeline
from compress.config.runtimes import RUNTIMES
from compress.passes import PASSES, KvCache, MergePass, Pass
from compress.planning.plan import PLANNERS
from compress.planning.state import initial

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "compress" / "config" / "measured.json"
PAGE = ROOT / "docs" / "choosing.md"
PLAIN = {"bits", "group_size"}
FREE = {"expert_prune", "expert_merge", "recalibrate_norms"}  # work on what the bundled model has not
NEEDS = {  # what stands before a method that works on no dense weights, or beside others, in the matrix of formats
    "eora": {"gptq": {"scheme": "w3g64"}}, "perp": {"wanda": {}}, "perp_reconstruct": {"wanda": {}},
    "sparse_soup": {"wanda": {}}, "kv_cache": {"gptq": {"scheme": "w4g64", "symmetric": True}},
}  # fmt: skip
OPENED: list[Any] = []


def formats(steps: Pipeline) -> list[str]:
    """The containers that hold the result of a pipeline on the bundled model, by what its plan says."""
    if not OPENED:
        OPENED.append(opening.open_model("demo"))
    state = initial(OPENED[0].artifact.graph, OPENED[0].dtypes, 0)
    for path, _, pass_ in walk(steps):
        planned = PLANNERS[pass_.reach](state, path, pass_, fused=False, first=True)
        assert not planned.problems, planned.problems
        state = planned.state
    given = state.graph, state.specs, state.new_biases, state.caches
    return [key for key, exporter in FORMATS.items() if not any(exporter().reasons(*given))]


def described(steps: Pipeline) -> dict[str, Any]:
    """What a row says of a pipeline before anything is measured."""
    passes = [pass_ for _, _, pass_ in walk(steps)]
    coded = [p for p in passes if hasattr(p, "bits") and not isinstance(p, MergePass | KvCache)]
    rooms = [type(pass_).__module__.split(".")[2] for pass_ in passes]
    pruned = "prune" in rooms
    if "merge" in rooms:
        group = "merge"
    elif coded or "quantize" in rooms:
        group = "prune and quantize" if pruned else "quantize"
    else:
        group = "prune" if pruned else "factorize"
    own = {f.name for p in passes for f in fields(p) if getattr(p, f.name) != f.default}
    return {
        "group": group,
        "methods": [p.key for p in passes],
        "plain": len(passes) == 1 and bool(coded) and own <= PLAIN,
        "bits": coded[-1].bits if coded else None,
        "group_size": coded[-1].group_size if coded and hasattr(coded[-1], "granularity") else None,
        **({"super_blocks": True} if any(getattr(p, "has_super_blocks", False) for p in passes) else {}),
        "rounds_inputs": any(p.input_form() is not None for p in passes),
        "data": any(p.calibrated for p in passes),
        "formats": formats(steps),
    }


def preset(name: str, measured: list[dict[str, Any]] | None) -> dict[str, Any]:
    steps = load_pipeline(name)
    row = {"name": name, "description": steps.description, **described(steps)}
    if measured:
        last = measured[-1]
        row |= {
            "perplexity": round(last["perplexity"], 5), "kl": round(last["kl"], 5), "size": last["bytes"],
            "bits_per_weight": round(last["bits_per_weight"], 5), "sparsity": round(last["sparsity"], 3),
            "seconds": round(sum(each["seconds"] for each in measured), 2),
        }  # fmt: skip
    return row


def quantizer(measured: dict[str, Any]) -> dict[str, Any]:
    options = {"bits": measured["bits"], **({"group_size": size} if (size := measured["group_size"]) else {})}
    steps = load_pipeline({"passes": [{measured["method"]: options}]})
    found = {"perplexity": 5, "kl": 5, "bits_per_weight": 5, "seconds": 2}
    return {**described(steps), **{name: round(measured[name], digits) for name, digits in found.items()}}


def same(row: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for a ready-made pipeline and a row of docs/quantizers.json that do the same."""
    return row["methods"], row["bits"], row["group_size"]


def content() -> str:
    """The file that is shipped: the original, and a row in each line."""
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    measured = json.loads((ROOT / "docs" / "quantizers.json").read_text())
    ready = [preset(name, results.get(name)) for name in sorted(p.stem for p in PRESETS.glob("*.yaml"))]
    there = [same(row) for row in ready if row["plain"]]
    others = [row for row in map(quantizer, measured) if same(row) not in there]
    first = next(iter(results.values()))[0]
    original = {"perplexity": round(first["perplexity"], 5), "size": first["bytes"], "weights": first["bytes"] // 2}
    lines = ",\n  ".join(json.dumps(row) for row in [*ready, *others])
    return f'{{\n "original": {json.dumps(original)},\n "rows": [\n  {lines}\n ]\n}}\n'


def alone(kind: type[Pass]) -> Pipeline:
    """A pipeline of one method as it is by itself, on the bundled model."""
    uniform = "symmetric" in {f.name for f in fields(kind)}
    options: dict[str, Any] = {"group_size": 64} if uniform else {}
    if issubclass(kind, MergePass):
        options = {"models": ["demo"] * (1 if kind.pairwise else 2)}
    before = [NEEDS[kind.key]] if kind.key in NEEDS else []
    return load_pipeline({"passes": [*before, {kind.key: options}], "calibration": {"source": "demo"}})


def matrix() -> str:
    """A line for each method: the formats that hold what it makes, and with them what runs it."""
    heads = [f"`{key}`" for key in FORMATS]
    lines = [f"| method | {' | '.join(heads)} | runs in |", f"|---|{':---:|' * len(heads)}---|"]
    for kind in PASSES:
        if kind.key in FREE:
            continue
        held = formats(alone(kind))
        marks = " | ".join("x" if key in held else "" for key in FORMATS)
        behind = " (behind " + ", ".join(NEEDS[kind.key]) + ")" if kind.key in NEEDS else ""
        runs = ", ".join(name for name, runtime in RUNTIMES.items() if runtime.format in (None, *held))
        lines.append(f"| [{kind.key}](methods/{kind.key}.md){behind} | {marks} | {runs} |")
    return "\n".join(lines)


def runtimes() -> str:
    """A line for each runtime: what `--for` chooses."""
    lines = ["| `--for` | container | bits | columns that share a scale | codes |", "|---|---|---|---|---|"]
    for name, runtime in RUNTIMES.items():
        codes = "uniform" if runtime.uniform else "every kind"
        if runtime.symmetric:
            always = set(runtime.bits) <= set(runtime.symmetric)
            codes += ", symmetric" + ("" if always else f" from {min(runtime.symmetric)} bits on")
        container = f"`{runtime.format}`" if runtime.format else "the packed folder"
        groups = f"{runtime.sizes}, or a row; {runtime.group} unless given"
        lines.append(f"| {name} | {container} | {runtime.widths} | {groups} | {codes} |")
    return "\n".join(lines)


def replace(page: str, mark: str, text: str) -> str:
    before, _, rest = page.partition(f"<!-- {mark} -->\n")
    behind = rest.partition(f"<!-- /{mark} -->")[2]
    assert behind, f"{PAGE.name} has no {mark}"
    return f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{behind}"


def page(text: str) -> str:
    """docs/choosing.md with its tables as they should be."""
    return replace(replace(text, "formats", matrix()), "runtimes", runtimes())


def write() -> None:
    SHIPPED.write_text(content())
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    write()
