"""The pipeline file: YAML to a typed pipeline and back, every mistake with its place.

A mistake never hides another: the whole file is read, every problem is collected and all are raised at once, each with
line, path, what is allowed and, for a misspelt word, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

import yaml

from compress.calibration.data import check_source
from compress.calibration.precision import Products  # noqa: TC001  (the type of an option)
from compress.config.options import choices, describe, fits, mistyped, written
from compress.errors import ConfigError, Problem, UsageError
from compress.export import EXPORTERS, Exporter
from compress.passes import PASSES, Override, Pass

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


METHODS: dict[str, type[Pass]] = {p.key: p for p in PASSES}
FORMATS: dict[str, type[Exporter]] = {e.key: e for e in EXPORTERS}
PRESETS = Path(__file__).parent / "presets"  # ready-made pipelines, by name
PACKED = "safetensors"  # OUT itself, which is always written
Built = TypeVar("Built", Pass, Exporter)
GATES = ("max_increase", "max_drop")
GIVEN = "given from Python"  # the source of tensors that no file holds


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The data that passes learn from.

    Args:
        source: `demo`, a .txt / .jsonl / .parquet file, or the id of a Hugging Face data set; for an image model a
            .safetensors file. Several by name, such as {maths: a.jsonl, code: b.jsonl}: quality is reported of each.
        samples: windows of tokens, or images, of each source.
        length: tokens a window.
        field: the field or column that holds the text.
        subset: the configuration name of a data set id.
    """

    source: str | Mapping[str, str] = "demo"
    samples: int = 128
    length: int = 512
    field: str = "text"
    subset: str | None = None

    @property
    def sources(self) -> Mapping[str, str]:
        """Name -> source; one without a name is called ""."""
        return {"": self.source} if isinstance(self.source, str) else self.source


@dataclass(frozen=True, kw_only=True)
class Evaluation(Calibration):
    """The data that quality is measured on, and the gate.

    Args:
        after: `each` pass, or only at the `end`.
        max_increase: the largest allowed increase of perplexity over the original, such as 10% or 0.1; the run fails
            with exit code 3 above it.
        max_drop: the same gate for image models: the largest allowed fall of accuracy under the original's, such as 1%
            or 0.01 for one point.
    """

    samples: int = 64
    after: Literal["each", "end"] = "each"
    max_increase: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A whole pipeline file.

    Args:
        passes: stages in order; a stage is one pass, or several fused with `blockwise:`.
        calibration: None when no pass needs data.
        evaluate: None to measure nothing but size.
        export: folders to write beside the packed one, which is always written.
        seed: of every random choice.
        dtype: what calibration and evaluation compute in; `auto` is what the model's configuration says.
        products: how float32 matrices are multiplied while calibrating: `bfloat16` rounds the factors and sums in
            float32, several times quicker where the processor can; `float32` does not round. Evaluation never rounds.
        description: free text.
    """

    passes: tuple[tuple[Pass, ...], ...]
    calibration: Calibration | None = None
    evaluate: Evaluation | None = None
    export: tuple[Exporter, ...] = ()
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    products: Products = "bfloat16"
    description: str = ""
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)


def load(source: str | Path | Mapping[str, Any] | Pipeline) -> Pipeline:
    """A pipeline from a file, by the name of a ready-made one, from a mapping of the same shape, or one already built.

    Raises:
        ConfigError: every mistake at once.
        UsageError: no such file.
    """
    if isinstance(source, Pipeline):
        problems = mistakes(source)
        if problems:
            raise ConfigError(problems, "pipeline")
        return source
    if isinstance(source, Mapping):
        return _Reader({}, "pipeline").pipeline(dict(source))
    path = Path(source)
    if not path.exists() and (PRESETS / f"{source}.yaml").is_file():
        path = PRESETS / f"{source}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the pipeline {path}: {error}") from error
    return parse(text, str(path))


def parse(text: str, file: str = "pipeline") -> Pipeline:
    """A pipeline from YAML text."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        raise ConfigError([Problem("", f"not YAML: {getattr(error, 'problem', error)}", line)], file) from error
    lines: dict[str, int] = {}
    problems: list[Problem] = []
    try:
        data = _plain(node, "", lines, problems) if node else None
    except RecursionError as error:
        raise ConfigError([Problem("", "an anchor refers to itself")], file) from error
    return _Reader(lines, file, problems).pipeline(data)


def exporters(texts: Sequence[str]) -> tuple[Exporter, ...]:
    """Exporters from a command line: `hf`, or with options `onnx:mode=fast,accuracy_level=1`.

    Raises:
        ConfigError: every mistake at once.
    """
    entries: list[Any] = []
    for text in texts:
        name, _, options = text.partition(":")
        pairs = [o.partition("=") for o in options.split(",") if o]
        entries.append({name: {key.strip(): yaml.safe_load(value) for key, _, value in pairs}} if pairs else name)
    reader = _Reader({}, "--to")
    found = reader._export(entries)
    if reader.problems:
        raise ConfigError(reader.problems, "--to")
    if not found:
        raise UsageError(f"--to {PACKED}: the folder is that already; give one of {', '.join(FORMATS)}")
    return found


def _plain(node: yaml.Node, path: str, lines: dict[str, int], problems: list[Problem]) -> Any:
    """A YAML node as Python values, noting the line of every path."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(Problem(path, "a key must be a word", key_node.start_mark.line + 1))
                continue
            key = key_node.value
            here = f"{path}.{key}" if path else str(key)
            lines[here] = key_node.start_mark.line + 1
            if key in result:
                problems.append(Problem(here, "stands twice", lines[here]))
            result[key] = _plain(value_node, here, lines, problems)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{path}[{i}]", lines, problems) for i, item in enumerate(node.value)]
    if node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
        return node.value  # YAML 1.1 reads an unquoted 2:4 as 124, a number in base sixty; here it is a pattern
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        problems.append(Problem(path, f"{node.value!r} cannot be read: {reason}", lines[path]))
        return None


_WRONG = object()  # stands for a value that was refused, so that the others are still looked at


class _Reader:
    """Builds the typed pipeline, collecting problems."""

    def __init__(self, lines: dict[str, int], file: str, problems: list[Problem] | None = None):
        self.lines, self.file, self.problems = lines, file, problems if problems is not None else []

    def problem(self, path: str, message: str) -> None:
        line = self.lines.get(path)
        parent = path
        while line is None and parent:
            parent = re.sub(r"(\.[^.\[\]]+|\[\d+\]|^[^.\[\]]+)$", "", parent)
            line = self.lines.get(parent)
        self.problems.append(Problem(path, message, line))

    def pipeline(self, data: Any) -> Pipeline:
        if not isinstance(data, dict):
            raise ConfigError([Problem("", "a pipeline is a mapping with at least `passes:`")], self.file)
        known = {f.name for f in fields(Pipeline)} - {"lines"}
        for key in data:
            if key not in known:
                self.problem(str(key), f"unknown key; {_allowed(key, known)}")
        if "passes" not in data:
            self.problem("", "`passes:` is missing: a list of methods, in order")
        options: dict[str, Any] = {"passes": self._passes(data.get("passes", []))}
        for name, cls in (("calibration", Calibration), ("evaluate", Evaluation)):
            if data.get(name) is not None:
                options[name] = self._data(cls, data[name], name)
        hints = get_type_hints(Pipeline)
        for name in ("seed", "dtype", "products", "description"):
            if name in data:
                options[name] = self._value(hints[name], data[name], name)  # if refused, nothing is built from it
        if "export" in data:
            options["export"] = self._export(data["export"])
        if self.problems:
            raise ConfigError(self.problems, self.file)
        return Pipeline(**options, lines=self.lines)

    def _passes(self, data: Any) -> tuple[tuple[Pass, ...], ...]:
        if not isinstance(data, list):
            self.problem("passes", "must be a list of methods")
            return ()
        stages = []
        for i, entry in enumerate(data):
            path = f"passes[{i}]"
            if isinstance(entry, dict) and list(entry) == ["blockwise"]:
                inner = entry["blockwise"]
                if not isinstance(inner, list) or not inner:
                    self.problem(f"{path}.blockwise", "must be a list of methods to run together on each block")
                    continue
                found = [self._pass(e, f"{path}.blockwise[{j}]") for j, e in enumerate(inner)]
                stages.append(tuple(p for p in found if p))
            elif pass_ := self._pass(entry, path):
                stages.append((pass_,))
        return tuple(stages)

    def _pass(self, entry: Any, path: str) -> Pass | None:
        return self._entry(entry, path, METHODS, "method")

    def _entry(self, entry: Any, path: str, known: Mapping[str, type[Built]], what: str) -> Built | None:
        """One of the known, with its options."""
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            example = "gptq: {bits: 4}" if what == "method" else "onnx: {accuracy_level: 4}"
            self.problem(path, f"must be one {what} with its options, such as `{example}`")
            return None
        (name, options), here = next(iter(entry.items())), f"{path}.{next(iter(entry))}"
        cls = known.get(name) if isinstance(name, str) else None
        if cls is None:
            self.problem(here, f"unknown {what}; {_allowed(name, known if what == 'method' else {PACKED, *known})}")
            return None
        if options is not None and not isinstance(options, dict):
            self.problem(here, "options must be a mapping, such as {bits: 4}")
            return None
        return self._build(cls, dict(options or {}), here)

    def _build(self, cls: type[Built], options: dict[str, Any], path: str) -> Built:
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        if "scheme" in options and "bits" in known:
            options = {**self._scheme(options.pop("scheme"), f"{path}.scheme", known), **options}
        values: dict[str, Any] = {}
        for key, value in options.items():
            here = f"{path}.{key}"
            if key not in known:
                extra = {"scheme"} if "bits" in known else set()
                self.problem(here, f"unknown option of {cls.key}; {_allowed(key, known | extra)}")
            elif key == "overrides":
                values[key] = self._overrides(cls, value, here)
            else:
                values[key] = self._value(hints[key], value, here)
        built = cls(**{k: v for k, v in values.items() if v is not _WRONG})
        for error in built.mistakes():
            self.problem(f"{path}.{error.option}", error.message)
        return built

    def _scheme(self, value: Any, path: str, known: set[str]) -> dict[str, Any]:
        match = re.fullmatch(r"w(\d+)(?:g(\d+))?", str(value))
        if not match:
            self.problem(path, f"{value!r} is not bits and group size such as w4g128, or w4 for one scale a row")
            return {}
        if not match[2] and "group_size" not in known:
            return {"bits": int(match[1])}
        return {"bits": int(match[1]), "group_size": int(match[2]) if match[2] else None}

    def _overrides(self, cls: type[Pass | Exporter], value: Any, path: str) -> tuple[Override, ...]:
        if not isinstance(value, list):
            self.problem(path, "must be a list such as [{match: '*.down_proj', bits: 8}]")
            return ()
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)} - {"include", "exclude", "overrides"}
        found = []
        for i, entry in enumerate(value):
            here = f"{path}[{i}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
                self.problem(here, "must be a mapping with `match:` and the options to change")
                continue
            options = {k: v for k, v in entry.items() if k != "match"}
            if "scheme" in options and "bits" in known:
                options = {**self._scheme(options.pop("scheme"), f"{here}.scheme", known), **options}
            for key in list(options):
                if key not in known:
                    self.problem(f"{here}.{key}", f"unknown option of {cls.key}; {_allowed(key, known)}")
                    del options[key]
                else:
                    options[key] = self._value(hints[key], options[key], f"{here}.{key}")
            found.append(Override(entry["match"], {k: v for k, v in options.items() if v is not _WRONG}))
        return tuple(found)

    def _data(self, cls: type[Calibration], data: Any, path: str) -> Calibration | None:
        if not isinstance(data, dict):
            self.problem(path, "must be a mapping such as {source: demo, samples: 128, length: 512}")
            return None
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in data.items():
            here = f"{path}.{key}"
            if key not in known:
                self.problem(here, f"unknown key; {_allowed(key, known)}")
            elif key in GATES and isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)? *%", value):
                values[key] = float(value.rstrip(" %")) / 100
            else:
                values[key] = self._value(hints[key], value, here)
        for key in ("samples", "length"):
            if isinstance(values.get(key), int) and values[key] < (2 if key == "length" else 1):
                self.problem(f"{path}.{key}", f"{values[key]} is too small")
        for key in GATES:
            limit = values.get(key)
            if isinstance(limit, float) and limit < 0:
                self.problem(f"{path}.{key}", f"{limit} is negative")
        section = cls(**{k: v for k, v in values.items() if v is not _WRONG})
        if not section.sources:
            self.problem(f"{path}.source", "names no source; give one, or several such as {maths: a.jsonl}")
        for name, source in section.sources.items():
            if wrong := check_source(source):
                self.problem(f"{path}.source.{name}" if name else f"{path}.source", wrong)
        return section

    def _export(self, data: Any) -> tuple[Exporter, ...]:
        entries = [data] if isinstance(data, str) else data
        if not isinstance(entries, list) or not entries:
            self.problem("export", f"must be a list of {', '.join((PACKED, *FORMATS))}")
            return ()
        found: list[Exporter] = []
        for i, entry in enumerate(entries):
            if entry == PACKED:
                continue
            made = self._entry(entry, f"export[{i}]", FORMATS, "format")
            if made is not None and any(made.key == other.key for other in found):
                self.problem(f"export[{i}]", f"{made.key} stands twice")
            elif made is not None:
                found.append(made)
        return tuple(found)

    def _value(self, hint: Any, value: Any, path: str) -> Any:
        """`value` as the annotated type; a problem and None if it is not."""
        for option in choices(hint):
            matched, result = fits(option, value)
            if matched:
                return result
        self.problem(path, f"{value!r} is not {describe(hint)}")
        return _WRONG


def _allowed(word: Any, known: Mapping[str, Any] | set[str] | tuple[str, ...]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


# --- back to YAML ----------------------------------------------------------------------------------------------------


def dump(pipeline: Pipeline) -> str:
    """The resolved pipeline as YAML: parsing it again gives an equal pipeline."""
    data: dict[str, Any] = {}
    if pipeline.description:
        data["description"] = pipeline.description
    for name in ("calibration", "evaluate"):
        section = getattr(pipeline, name)
        if section is not None:
            data[name] = {f.name: written(getattr(section, f.name)) for f in fields(section)}
    data["passes"] = [
        _entry(stage[0]) if len(stage) == 1 else {"blockwise": [_entry(p) for p in stage]} for stage in pipeline.passes
    ]
    data["export"] = [PACKED, *map(_exporter, pipeline.export)]
    data |= {"seed": pipeline.seed, "dtype": pipeline.dtype, "products": pipeline.products}
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(yaml.SafeDumper):
    """Quotes N:M patterns, which YAML 1.1 readers would take for numbers in base sixty."""


def _entry(pass_: Pass) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for f in fields(pass_):
        value = getattr(pass_, f.name)
        if f.name == "overrides":
            if value:
                options[f.name] = [{"match": o.match, **written(o.options)} for o in value]
        elif isinstance(value, tuple):
            if value:
                options[f.name] = written(value)
        else:
            options[f.name] = written(value)
    return {pass_.key: options}


def _exporter(exporter: Exporter) -> str | dict[str, Any]:
    return {exporter.key: options} if (options := asdict(exporter)) else exporter.key


def walk(pipeline: Pipeline) -> Iterator[tuple[str, int, Pass]]:
    """(path in the file, stage number, pass) of every pass, in order."""
    for i, stage in enumerate(pipeline.passes):
        for j, pass_ in enumerate(stage):
            fused = f".blockwise[{j}]" if len(stage) > 1 or f"passes[{i}].blockwise" in pipeline.lines else ""
            yield f"passes[{i}]{fused}.{pass_.key}", i, pass_


def mistakes(pipeline: Pipeline) -> list[Problem]:
    """Every impossible option of passes that were made in Python."""
    found = []
    for path, _, pass_ in walk(pipeline):
        wrong = list(mistyped(pass_))  # what is of the wrong type cannot be looked at further
        found += [Problem(f"{path}.{e.option}", e.message) for e in wrong or pass_.mistakes()]
    for exporter in pipeline.export:
        wrong = list(mistyped(exporter))
        found += [Problem(f"export.{exporter.key}.{e.option}", e.message) for e in wrong or exporter.mistakes()]
    return found


__all__ = ["Calibration", "Evaluation", "Pipeline", "dump", "load", "mistakes", "parse", "walk"]
