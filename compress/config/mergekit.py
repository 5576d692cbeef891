"""A merge that mergekit describes, as a pipeline. What a pipeline cannot express is an error that says so."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.config.lines import MOST_LETTERS, document
from compress.config.mergekit_settings import Settings
from compress.errors import ConfigError, Problem
from compress.io.small_file import read_object, read_text
from compress.logs import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Their method -> ours, and the options that make it the same.
MERGEKIT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("average", {}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"scope": "tensor", "tie": "positive"}),
    "dare_linear": ("dare", {"merge": "linear"}),
    "dare_ties": ("dare", {"merge": "ties", "tie": "positive"}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs_ties": ("breadcrumbs", {"merge": "ties", "tie": "positive"}),
    "della": ("della", {"merge": "ties", "tie": "positive"}),
    "della_linear": ("della", {"merge": "linear"}),
    "model_stock": ("model_stock", {}),
    "nuslerp": ("nuslerp", {}),
}
KNOWN = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "random_seed", "chat_template",
)  # fmt: skip
# What they call what, or what to write in the place of a method that has no other name here.
ELSEWHERE = {
    "passthrough": "stacks layers, and pipelines merge whole models: stack with mergekit, then run a pipeline on that",
    "karcher": "is not here; model_stock and average make one of several models, too",
}
OF_METHOD = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "lambda", "int8_mask"},
    "ties": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
    "breadcrumbs": {"weight", "density", "gamma", "normalize", "lambda", "int8_mask", "rescale"},
    "breadcrumbs_ties": {"weight", "density", "gamma", "normalize", "lambda", "int8_mask", "rescale"},
    "della": {"weight", "density", "epsilon", "normalize", "lambda", "int8_mask", "rescale"},
    "della_linear": {"weight", "density", "epsilon", "normalize", "lambda", "int8_mask", "rescale"},
    "model_stock": {"filter_wise"},
    "nuslerp": {"weight", "nuslerp_flatten", "nuslerp_row_wise"},
}
SWITCHES = ("normalize", "int8_mask", "rescale", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise")
MEAN_BY_DEFAULT = ("linear", "ties", "della")
RESCALED_BY_DEFAULT = ("dare_linear", "dare_ties", "della", "della_linear")
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # what a configuration may call its blocks
NOTHING = 1e-6  # a sum of weights that nothing is divided by


@dataclass(frozen=True)
class Converted:
    """A pipeline file that does the same.

    Attributes:
        model: to run it on.
        text: the file.
        notes: what the file does otherwise than mergekit would; they stand in it, too.
    """

    model: str
    text: str
    notes: tuple[str, ...] = ()


def convert(file: Path) -> Converted:
    """Read a mergekit configuration.

    Raises:
        UsageError: no such file.
        ConfigError: everything that is not mergekit's, or has no place in a pipeline.
    """
    read = document(read_text(file, MOST_LETTERS), str(file))
    if read.problems or not isinstance(read.values, dict):
        raise ConfigError(read.problems or [Problem("", "must be a mapping with `merge_method:`")], str(file))
    reader = _Reader(read.values)
    found = reader.converted()
    if reader.problems or found is None:
        raise ConfigError(reader.problems, str(file))
    return found


class _Reader:
    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.problems: list[Problem] = []
        self.method = str(data.get("merge_method"))
        self.notes: list[str] = []
        self.settings = Settings(self.problem)

    def problem(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message))

    def converted(self) -> Converted | None:
        """The pipeline, or None after a problem."""
        data, method = self.data, self.method
        for key in sorted(data.keys() - set(KNOWN)):
            self.problem(str(key), "has no place in a pipeline; leave it out, or merge with mergekit first")
        if method not in MERGEKIT_METHODS:
            known = f"is not one of those that are known here: {', '.join(MERGEKIT_METHODS)}"
            self.problem("merge_method", f"{method} {ELSEWHERE.get(method, known)}")
            return None
        sources, shared = self._sources()
        found = self._first_and_others(sources)
        if found is None:
            return None
        first, sources, others = found
        key, fixed = MERGEKIT_METHODS[method]
        if method == "nuslerp" and self.data.get("base_model") is None:  # the arc between the models themselves
            key, fixed = "slerp", {"straight": 1.0}
        options = {"models": others, **fixed, **self._options(sources, shared)}
        seed = self.data.get("random_seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            self.problem("random_seed", f"{seed!r:.100} is not a whole number")
        if self.problems:
            return None
        pipeline = {"seed": seed} if seed else {}
        text = yaml.dump({**pipeline, "passes": [{key: options}]}, sort_keys=False, width=120)
        head = [f"run it: compress run PIPELINE {shlex.quote(first)} -o OUT", *self.notes]
        return Converted(first, "".join(map(comment, head)) + str(text), tuple(self.notes))

    def _first_and_others(
        self, sources: list[Mapping[str, Any]]
    ) -> tuple[str, list[Mapping[str, Any]], list[str]] | None:
        """The model to run on, the entries whose settings count, and the models to merge with it; None: a problem."""
        method, base = self.method, _model_name(self.data.get("base_model"))
        names = [_model_name(source.get("model")) for source in sources]
        if not names or None in names:
            self.problem("models", "must be a list of entries with `model:`, a folder or hub id each")
            return None
        for name in filter(None, (base, *names)):
            if not name.isprintable():
                self.problem("models", f"{name!r:.200} is no name of a model: it holds control characters")
                return None
        if method == "linear" or (method == "nuslerp" and base is None):
            first, others = str(names[0]), list(map(str, names[1:]))
            if base is not None and base not in names:
                self.problem("base_model", f"{method} has no base beside its models; leave it out")
        elif base is None:
            self.problem("base_model", f"{method} needs one")
            return None
        else:
            first, others = base, [str(name) for name in names if name != base]
            sources = [s for s, name in zip(sources, names, strict=True) if name != base]
        wanted = {"slerp": 1, "nuslerp": 1 if base is None else 2}.get(method, len(others))
        if len(others) != wanted:
            beside = "" if base is None or method == "slerp" else " beside its base"
            self.problem("models", f"{method} merges two models{beside}; {len(names)} are named")
        return first, sources, others

    def _sources(self) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        """The entries for each model; and what holds for all, the nearest first."""
        data = self.data
        shared = [_as_mapping(data.get("parameters"))]
        if data.get("dtype") not in (None, "float32"):
            self.notes.append(f"dtype {data['dtype']}: pipelines merge in float32, and keep the type of the model")
        if data.get("out_dtype") is not None:
            self.notes.append(f"out_dtype {data['out_dtype']}: the type of the model is kept; convert it if it differs")
        if data.get("tokenizer_source") not in (None, "base"):
            self.problem("tokenizer_source", "pipelines keep the tokenizer of the model they are run on; use base")
        if data.get("chat_template") not in (None, "auto"):
            self.problem("chat_template", "pipelines keep that of the model they are run on; leave it out, or use auto")
        if "slices" not in data:
            return [_as_mapping(entry) for entry in _list(data.get("models"))], shared
        slices = [_as_mapping(entry) for entry in _list(data["slices"])]
        if len(slices) != 1:
            self.problem("slices", "layers of different models cannot be stacked; pipelines merge whole models")
            return [], shared
        sources = [_as_mapping(entry) for entry in _list(slices[0].get("sources"))]
        ranges = [source.get("layer_range") for source in sources]
        fine = [r is None or (isinstance(r, list) and len(r) == 2 and r[0] == 0) for r in ranges]
        if not all(fine) or any(r != ranges[0] for r in ranges):
            self.problem("slices[0]", f"pipelines merge whole models; layer_range {ranges} is a part of them")
        elif ranges and ranges[0]:
            self._whole(ranges[0][1], [_model_name(source.get("model")) for source in sources])
        return sources, [_as_mapping(slices[0].get("parameters")), *shared]

    def _whole(self, last: Any, models: Sequence[str | None]) -> None:
        """Whether the first `last` blocks are all that the models have: known of folders, said of others."""
        counts = {name: count for name in models if name is not None and (count := _blocks_in(name)) is not None}
        fewer = next((name for name, count in counts.items() if count != last), None)
        if fewer is not None:
            self.problem(
                "slices[0]",
                f"layer_range [0, {last}] is a part of {fewer}, which has {counts[fewer]} blocks, and pipelines merge "
                "whole models; merge all, and add layer_drop to the pipeline, which finds the blocks that matter least",
            )
        elif len(counts) < len({*models}):
            self.notes.append(f"layer_range [0, {last}] is taken for all blocks of the models")

    def _options(self, sources: Sequence[Mapping[str, Any]], shared: list[Mapping[str, Any]]) -> dict[str, Any]:
        method, allowed = self.method, OF_METHOD[self.method]
        own = [_as_mapping(source.get("parameters")) for source in sources]
        for where in (*own, *shared):
            for name in sorted(set(map(str, where)) - allowed):
                self.problem(f"parameters.{name}", f"is not known of {method}; known: {', '.join(sorted(allowed))}")
        switches = {name: self.settings.switch(name, shared) for name in SWITCHES}
        options: dict[str, Any] = {}
        if method == "model_stock":
            if switches["filter_wise"]:
                self.problem("parameters.filter_wise", "angles here are those of whole tensors; leave it out")
            return options
        if method == "nuslerp":
            return self._arc(own, shared, switches)
        if method == "slerp":
            options["t"] = self.settings.value("t", [*shared], None)
            if options["t"] is None:
                self.problem("parameters.t", "is missing")
            return options
        options["weights"] = [self.settings.value("weight", [o, *shared], None) for o in own]
        if None in options["weights"]:
            self.problem("parameters.weight", "is missing for a model")
        if "density" in allowed:
            options["density"] = [self.settings.value("density", [o, *shared], 1.0) for o in own]
        if "gamma" in allowed:
            options["gamma"] = [self.settings.value("gamma", [o, *shared], 0.01) for o in own]
        if "epsilon" in allowed:
            epsilons = [self.settings.value("epsilon", [o, *shared], 0.15) for o in own]
            if any(value != epsilons[0] or not isinstance(value, float) for value in epsilons):
                self.problem("parameters.epsilon", "must be one number for all models here")
            options["epsilon"] = epsilons[0]
        mean = switches["normalize"] if switches["normalize"] is not None else method in MEAN_BY_DEFAULT
        if method == "linear":
            options["normalize"] = mean
            return options
        options["scale"] = self.settings.value("lambda", shared, 1.0)
        options["combine"] = "mean" if mean else "sum"
        rescaled = switches["rescale"]
        if method in RESCALED_BY_DEFAULT:
            options["rescale"] = "l1" if rescaled in (None, True) else "none"
        elif rescaled:
            self.problem("parameters.rescale", f"{method} does not rescale what it keeps; leave it out")
        return options

    def _arc(
        self, own: list[Mapping[str, Any]], shared: list[Mapping[str, Any]], switches: Mapping[str, bool | None]
    ) -> dict[str, Any]:
        """The options of nuslerp, or of slerp where there is no base."""
        if switches["nuslerp_flatten"] is False or switches["nuslerp_row_wise"]:
            self.problem("parameters.nuslerp_flatten", "arcs here are those of whole tensors; leave it out")
        weights = [self.settings.value("weight", [o, *shared], None) for o in own]
        if None in weights:
            self.problem("parameters.weight", "is missing for a model")
            return {}
        if self.data.get("base_model") is not None:
            return {"weights": weights}
        if not all(isinstance(weight, float) for weight in weights):
            self.problem("parameters.weight", "of nuslerp without a base must be one number for each model")
            return {}
        return {"t": weights[1] / sum(weights) if abs(sum(weights)) >= NOTHING else 0.5}


def _blocks_in(model: str) -> int | None:
    """How many blocks a model in a folder has; None where that is not known before it is opened."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return None
    settings = read_object(file)
    text = settings.get("text_config")
    found = next((s[name] for s in (settings, _as_mapping(text)) for name in COUNTS if name in s), None)
    return found if isinstance(found, int) else None


def comment(text: str) -> str:
    """A line of a YAML file that is no part of its values, whatever words of the user's are in it."""
    return f"# {printable(' '.join(text.split()))}\n"


def _model_name(model: Any) -> str | None:
    """What a model is called: a text, or a mapping as mergekit writes it; with an adapter BASE+ADAPTER."""
    if isinstance(model, dict) and isinstance(model.get("model"), dict):
        path, lora = model["model"].get("path"), model.get("lora")
        if lora is None:
            model = path
        else:
            adapter = lora.get("path") if isinstance(lora, dict) else lora
            model = f"{path}+{adapter}" if isinstance(path, str) and isinstance(adapter, str) else None
    return model if isinstance(model, str) else None


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
