"""A merge that mergekit describes, as a pipeline. What a pipeline cannot express is an error that says so."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from compress.config.lines import MOST_LETTERS, document
from compress.config.mergekit_settings import Settings
from compress.errors import ConfigError, Problem
from compress.io.small_file import read_text
from compress.logs import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Their method -> ours, and the options that make it the same.
MERGEKIT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("average", {}),
    "slerp": ("slerp", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {"scope": "tensor", "tie": "positive"}),
    "dare_linear": ("dare", {"merge": "linear"}),
    "dare_ties": ("dare", {"merge": "ties", "tie": "positive"}),
}
KNOWN = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
OF_METHOD = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "lambda", "int8_mask"},
    "ties": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "int8_mask", "rescale"},
}
SWITCHES = ("normalize", "int8_mask", "rescale")
MEAN_BY_DEFAULT = ("linear", "ties")
RESCALED_BY_DEFAULT = ("dare_linear", "dare_ties")


@dataclass(frozen=True)
class Converted:
    """A pipeline file that does the same.

    Attributes:
        model: to run it on.
        text: the file.
    """

    model: str
    text: str


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
            known = ", ".join(MERGEKIT_METHODS)
            self.problem("merge_method", f"{method} is not one of those that are known here: {known}")
            return None
        sources, shared = self._sources()
        found = self._first_and_others(sources)
        if found is None:
            return None
        first, sources, others = found
        options = {"models": others, **MERGEKIT_METHODS[method][1], **self._options(sources, shared)}
        if self.problems:
            return None
        text = yaml.dump({"passes": [{MERGEKIT_METHODS[method][0]: options}]}, sort_keys=False, width=120)
        head = [f"run it: compress run PIPELINE {shlex.quote(first)} -o OUT", *self.notes]
        return Converted(first, "".join(map(comment, head)) + str(text))

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
        if method == "linear":
            first, others = str(names[0]), list(map(str, names[1:]))
            if base is not None and base not in names:
                self.problem("base_model", "linear has no base beside its models; leave it out")
        elif base is None:
            self.problem("base_model", f"{method} needs one")
            return None
        else:
            first, others = base, [str(name) for name in names if name != base]
            sources = [s for s, name in zip(sources, names, strict=True) if name != base]
        if method == "slerp" and len(others) != 1:
            self.problem("models", f"slerp merges two models; {len(others) + 1} are named")
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
            self.notes.append(f"layer_range {ranges[0]} was taken for all blocks of the models")
        return sources, [_as_mapping(slices[0].get("parameters")), *shared]

    def _options(self, sources: Sequence[Mapping[str, Any]], shared: list[Mapping[str, Any]]) -> dict[str, Any]:
        method, allowed = self.method, OF_METHOD[self.method]
        own = [_as_mapping(source.get("parameters")) for source in sources]
        for where in (*own, *shared):
            for name in sorted(set(map(str, where)) - allowed):
                self.problem(f"parameters.{name}", f"is not known of {method}; known: {', '.join(sorted(allowed))}")
        switches = {name: self.settings.switch(name, shared) for name in SWITCHES}
        options: dict[str, Any] = {}
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
