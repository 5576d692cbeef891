"""The pipeline file to a typed pipeline, every mistake with its place.

A mistake never hides another: the whole file is read, every problem is collected and all are raised at once, each with
line, path, what is allowed and, for a misspelt word, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.calibration.texts import LOCAL, SELF, check_source, suffix_of
from compress.calibration.tokens import WIKITEXT_LENGTH
from compress.config import elsewhere
from compress.config.changes import changed
from compress.config.lines import MOST_LETTERS, document, line_of
from compress.config.options import PATTERNS, check_options, errors_in, lists_in, names_in, unknown
from compress.config.pipeline import (
    FORMATS,
    GATES,
    METHODS,
    PACKED,
    PRESETS,
    Calibration,
    Evaluation,
    Pipeline,
    Settings,
    walk,
)
from compress.config.schemes import no_scheme, options_of
from compress.config.words import known, shown
from compress.errors import ConfigError, OptionError, Problem, UsageError
from compress.io.small_file import read_text
from compress.passes import Override

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from compress.config.pipeline import DataSection
    from compress.export import Exporter
    from compress.passes import Pass

    Named = TypeVar("Named", Pass, Exporter)
SECTIONS: dict[str, type[DataSection]] = {"calibration": Calibration, "evaluate": Evaluation}
PERCENTAGE = r"\d+(\.\d+)? *%"
MOST_SHARE = 1.0  # that a plain number may be: above, it may be meant as per cent
NOTHING_TO_DO = "no method: nothing would be done. Name one, such as gptq, or a format to write in `export:`"


def load_pipeline(source: str | Path | Mapping[str, Any] | Pipeline, changes: Sequence[str] = ()) -> Pipeline:
    """A pipeline from a file, by the name of a ready-made one, from a mapping of the same shape, or one already built.

    Args:
        source: any of these.
        changes: values in the place of others, each KEY=VALUE as in `passes[0].gptq.bits=3`; none of one that is built.

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
        return _read_pipeline(changed(dict(source), changes), _Findings("pipeline"))
    path = file_of(source)
    return parse(read_text(path, MOST_LETTERS), str(path), changes)


def file_of(source: str | Path) -> Path:
    """The file that a path, or the name of a ready-made pipeline, stands for.

    Raises:
        UsageError: there is no ready-made pipeline of that name.
    """
    path = Path(source)
    ready_made = not path.exists() and path.name == str(source) and not path.suffix
    return _preset(path.name) if ready_made else path


def _preset(name: str) -> Path:
    """The file of a ready-made pipeline."""
    ready = {file.stem: file for file in PRESETS.glob("*.yaml")}
    if name not in ready:
        if known_elsewhere := elsewhere.of_name(name, ready):
            raise UsageError(known_elsewhere)
        close = difflib.get_close_matches(name, ready, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`compress list` names those that there are"
        raise UsageError(f"no file and no ready-made pipeline is called {name}; {hint}")
    return ready[name]


def parse(text: str, file: str = "pipeline", changes: Sequence[str] = ()) -> Pipeline:
    """A pipeline from YAML text; `changes` are those of `load_pipeline`.

    Raises:
        ConfigError: every mistake at once.
    """
    read = document(text, file)
    if known_elsewhere := elsewhere.of_file(read.values, file):
        raise UsageError(known_elsewhere)
    if not changes:
        return _read_pipeline(read.values, _Findings(file, read.lines, read.problems))
    values = changed(read.values, changes)  # which no line of the file has
    return _read_pipeline(values, _Findings(f"{file} with --set", problems=read.problems))


def exporters(texts: Sequence[str]) -> tuple[Exporter, ...]:
    """Exporters from a command line: `hf`, or with options `onnx:mode=fast,accuracy_level=1`.

    Raises:
        ConfigError: every mistake at once.
    """
    entries: list[Any] = []
    for text in texts:
        name, _, options = text.partition(":")
        pairs = [o.partition("=") for o in options.split(",") if o]
        entries.append({name: {key.strip(): _option_value(value) for key, _, value in pairs}} if pairs else name)
    findings = _Findings("--to")
    made = _read_exports(entries, findings)
    findings.raise_all()
    if not made:
        raise UsageError(f"--to {PACKED}: the folder already has that format; give one of {', '.join(FORMATS)}")
    return made


def read_evaluation(options: Mapping[str, Any]) -> Evaluation:
    """What a command measures on, from its options: those of an `evaluate:` section.

    Raises:
        UsageError: every mistake at once.
    """
    findings = _Findings("options")
    section = _read_section(Evaluation, dict(options), "evaluate", findings)
    if section is not None:
        findings.add_options("evaluate", idle_options(section))
    if findings.problems:
        raise UsageError("\n".join(f"--{p.path.split('.')[1]}: {p.message}" for p in findings.problems))
    assert isinstance(section, Evaluation)
    return section


def _option_value(text: str) -> Any:
    """The value of an option on a command line, as it would be in a file."""
    read = document(text, "--to")
    if read.problems:
        raise ConfigError(read.problems, "--to")
    return read.values


def mistakes(pipeline: Pipeline) -> list[Problem]:
    """Every impossible option of passes and exporters that were made in Python."""
    made: list[tuple[str, Pass | Exporter]] = [(path, pass_) for path, _, pass_ in walk(pipeline)]
    made += [(f"export.{exporter.key}", exporter) for exporter in pipeline.export]
    idle = [] if pipeline.passes or pipeline.export else [Problem("passes", NOTHING_TO_DO)]
    return [*idle, *(Problem(f"{path}.{e.option}", e.message) for path, each in made for e in errors_in(each))]


@dataclass(frozen=True)
class _Findings:
    """What is wrong with a file, so far."""

    file: str
    lines: Mapping[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message, line_of(self.lines, path)))

    def add_options(self, path: str, errors: Iterable[OptionError]) -> None:
        """Errors of options that stand under a path."""
        for error in errors:
            self.add(f"{path}.{error.option}" if path else error.option, error.message)

    def raise_all(self) -> None:
        if self.problems:
            raise ConfigError(sorted(self.problems, key=lambda problem: problem.line or 0), self.file)


def _read_pipeline(data: Any, findings: _Findings) -> Pipeline:
    if not isinstance(data, dict):
        raise ConfigError([Problem("", "a pipeline is a mapping with at least `passes:`")], findings.file)
    settings = names_in(Settings)
    findings.add_options("", unknown(Settings, data, {"passes", "export", *SECTIONS, *settings}))
    if "passes" not in data:
        findings.add("", "`passes:` is missing: a list of methods, in order")
    parts: dict[str, Any] = {"passes": _read_passes(data.get("passes", []), findings)}
    for name, cls in SECTIONS.items():
        if data.get(name) is not None:
            parts[name] = _read_section(cls, data[name], name, findings)
    if "export" in data:
        parts["export"] = _read_exports(data["export"], findings)
    if data.get("passes") == [] and not parts.get("export"):
        findings.add("passes", NOTHING_TO_DO)
    parts |= _values(Settings, {name: data[name] for name in settings if name in data}, "", findings)
    findings.raise_all()
    return Pipeline(**parts, lines=findings.lines)


def _read_passes(data: Any, findings: _Findings) -> tuple[tuple[Pass, ...], ...]:
    if not isinstance(data, list):
        findings.add("passes", "must be a list of methods")
        return ()
    stages = []
    for i, entry in enumerate(data):
        path, entries = f"passes[{i}]", [entry]
        places = [path]
        if isinstance(entry, dict) and list(entry) == ["blockwise"]:
            entries = entry["blockwise"]
            if not isinstance(entries, list) or not entries:
                findings.add(f"{path}.blockwise", "must be a list of methods to run together on each block")
                continue
            places = [f"{path}.blockwise[{j}]" for j in range(len(entries))]
        made = (_read_method(e, p, findings) for e, p in zip(entries, places, strict=True))
        stages.append(tuple(pass_ for pass_ in made if pass_))
    return tuple(stages)


def _read_exports(data: Any, findings: _Findings) -> tuple[Exporter, ...]:
    entries = [data] if isinstance(data, str) else data
    if not isinstance(entries, list) or not entries:
        findings.add("export", f"must be a list of {', '.join((PACKED, *FORMATS))}")
        return ()
    made: list[Exporter] = []
    for i, entry in enumerate(entries):
        exporter = None if entry == PACKED else _read_entry(entry, f"export[{i}]", FORMATS, (PACKED,), findings)
        if exporter is not None and any(exporter.key == other.key for other in made):
            findings.add(f"export[{i}]", f"{exporter.key} appears twice")
        elif exporter is not None:
            made.append(exporter)
    return tuple(made)


def _read_method(entry: Any, path: str, findings: _Findings) -> Pass | None:
    """A pass with its options; one that is not known is looked for among installed packages."""
    name = next(iter(entry), None) if isinstance(entry, dict) else entry
    if isinstance(name, str) and name not in METHODS:
        from compress.config import plugins

        plugins.find(name)
    return _read_entry(entry, path, METHODS, (), findings)


def _read_entry(
    entry: Any, path: str, classes: Mapping[str, type[Named]], others: Collection[str], findings: _Findings
) -> Named | None:
    """A method or format with its options; `others` are names that may stand in its place, without options."""
    what, example = ("format", "onnx: {accuracy_level: 4}") if others else ("method", "gptq: {bits: 4}")
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        findings.add(path, f"must be one {what} with its options, such as `{example}`")
        return None
    name, options = next(iter(entry.items()))
    here = f"{path}.{name}"
    if name not in classes:
        own = "" if others else "; a pass of your own is given with --plugin FILE"
        findings.add(here, f"unknown {what}; {known(name, {*classes, *others})}{own}")
        return None
    if options is not None and not isinstance(options, dict):
        findings.add(here, "options must be a mapping, such as {bits: 4}")
        return None
    return _constructed(classes[name], dict(options or {}), here, findings)


def _constructed(cls: type[Named], options: dict[str, Any], path: str, findings: _Findings) -> Named:
    """A pass or exporter of the options that are right; the others are reported."""
    overrides = options.pop("overrides", None) if "overrides" in names_in(cls) else None
    embeddings = options.pop("embeddings", None) if "embeddings" in names_in(cls) else None
    values = _read_options(cls, options, path, names_in(cls), findings)
    if embeddings is not None:
        values["embeddings"] = _embeddings(cls, embeddings, f"{path}.embeddings", findings)
    if overrides is not None:
        values["overrides"] = _overrides(cls, overrides, f"{path}.overrides", findings)
    made = cls(**values)
    findings.add_options(path, errors_in(made))
    return made


def _overrides(cls: type, data: Any, path: str, findings: _Findings) -> tuple[Override, ...]:
    if not isinstance(data, list):
        findings.add(path, "must be a list such as [{match: '*.down_proj', bits: 8}]")
        return ()
    names = [name for name in names_in(cls) if name not in PATTERNS]
    made = []
    for i, entry in enumerate(data):
        here, fine = f"{path}[{i}]", isinstance(entry, dict) and isinstance(entry.get("match"), str)
        if not fine:
            findings.add(here, "must be a mapping with `match:` and the options to change")
        options = {name: value for name, value in entry.items() if name != "match"} if fine else {}
        made.append(Override(entry["match"] if fine else "", _read_options(cls, options, here, names, findings)))
    return tuple(made)


def _embeddings(cls: type, data: Any, path: str, findings: _Findings) -> dict[str, Any]:
    """Options of embeddings: a mapping, or the text of a scheme."""
    names = [name for name in names_in(cls) if name not in PATTERNS]
    if isinstance(data, str) and "bits" in names:
        return _scheme(data, path, names, findings)
    if not isinstance(data, dict):
        findings.add(path, "must be the options of embeddings, such as {bits: 8}, or w8 where there are bits")
        return {}
    return _read_options(cls, data, path, names, findings)


def _read_options(
    cls: type, options: Mapping[str, Any], path: str, names: Collection[str], findings: _Findings
) -> dict[str, Any]:
    """Values of options, those out of range among them; `scheme` is short for two of them."""
    schemed = {"scheme"} if "bits" in names else set()
    findings.add_options(path, unknown(cls, options, {*names, *schemed}))
    short = _scheme(options["scheme"], path, names, findings) if schemed & options.keys() else {}
    for name in short.keys() & options.keys():
        findings.add(f"{path}.{name}", f"scheme: {options['scheme']} says it already; give one of the two")
    return _values(cls, short | {name: options[name] for name in names if name in options}, path, findings)


def _scheme(scheme: Any, path: str, names: Collection[str], findings: _Findings) -> dict[str, Any]:
    found = options_of(scheme, names)
    if found is None:
        said = f"{shown(scheme)} {no_scheme(names)}"
        findings.add(path if path.endswith(".embeddings") else f"{path}.scheme", said)
    return found or {}


def _values(cls: type, options: Mapping[str, Any], path: str, findings: _Findings) -> dict[str, Any]:
    """The options of declared types, as those types; one text may stand for a list of one."""
    lists = lists_in(cls)
    given = {name: [v] if name in lists and isinstance(v, str) else v for name, v in options.items()}
    checked = check_options(cls, given)
    findings.add_options(path, checked.mistyped)
    return checked.values


def _read_section(cls: type[DataSection], data: Any, path: str, findings: _Findings) -> DataSection | None:
    if not isinstance(data, dict):
        findings.add(path, "must be a mapping such as {source: demo, samples: 128, length: 512}")
        return None
    names = names_in(cls)
    findings.add_options(path, unknown(cls, data, names))
    given = {name: _share(data[name]) if name in GATES else data[name] for name in names if name in data}
    if data.get("protocol") == "wikitext":
        given = {"length": WIKITEXT_LENGTH, **({"samples": 0} if cls is Evaluation else {}), **given}
    for name in {*GATES} & data.keys():
        if isinstance(data[name], int | float) and data[name] > MOST_SHARE:
            findings.add(f"{path}.{name}", large_share(data[name]))
    section = cls(**_values(cls, given, path, findings))
    findings.add_options(path, check_options(cls, vars(section)).outside)
    if not section.sources:
        findings.add(f"{path}.source", "names no source; give one, or several such as {maths: a.jsonl}")
    for name, source in section.sources.items():
        if wrong := check_source(source) or _measured_on_itself(cls, source):
            findings.add(f"{path}.source.{name}" if name else f"{path}.source", wrong)
    return section


def _measured_on_itself(cls: type[DataSection], source: str) -> str | None:
    if source == SELF and cls is Evaluation:
        return "what a model writes itself is its likeliest text, and says nothing of its quality; name a text"
    return None


def idle_options(section: DataSection) -> Iterator[OptionError]:
    """Options that change nothing for any of the sources."""
    sources = [*section.sources.values()]
    listed = ", ".join(sources)
    if section.field != "text" and all(source in ("demo", SELF) or suffix_of(source) == ".txt" for source in sources):
        yield OptionError("field", f"changes nothing: {listed} has no fields")
    if section.protocol != "spread" and all(source == SELF for source in sources):
        yield OptionError("protocol", "changes nothing: the model writes whole windows")
    if section.subset is not None and all(source in ("demo", SELF) or suffix_of(source) in LOCAL for source in sources):
        yield OptionError("subset", f"chooses a configuration of a data set id; {listed} has none")


def large_share(value: float) -> str:
    """What is said of a gate that is a plain number above 1."""
    return f"{value:g} would allow {value:.0%}; for {value:g} per cent give {value / 100:g}, or in a file '{value:g}%'"


def _share(value: Any) -> Any:
    """A percentage as a share."""
    if isinstance(value, str) and re.fullmatch(PERCENTAGE, value):
        return float(value.rstrip(" %")) / 100
    return value
