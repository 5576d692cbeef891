"""A pipeline back to YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import yaml

from compress.config.lines import Dumper
from compress.config.pipeline import GATES, PACKED
from compress.passes.merge.schedules import Matched

if TYPE_CHECKING:
    from compress.config.pipeline import Pipeline
    from compress.export import Exporter
    from compress.passes import Pass


def dump(pipeline: Pipeline) -> str:
    """The resolved pipeline as YAML: parsing it again gives an equal pipeline."""
    data: dict[str, Any] = {}
    if pipeline.description:
        data["description"] = pipeline.description
    for name in ("calibration", "evaluate"):
        section = getattr(pipeline, name)
        if section is not None:
            data[name] = {f.name: _written_option(f.name, getattr(section, f.name)) for f in fields(section)}
    data["passes"] = [
        _written_pass(stage[0]) if len(stage) == 1 else {"blockwise": [_written_pass(p) for p in stage]}
        for stage in pipeline.passes
    ]
    data["export"] = [PACKED, *map(_exporter, pipeline.export)]
    data |= {name: getattr(pipeline, name) for name in ("seed", "dtype", "products", "device")}
    if pipeline.towers is not None:
        data["towers"] = list(pipeline.towers)
    if pipeline.allow_dense:
        data["allow_dense"] = True
    if pipeline.max_memory:
        data["max_memory"] = dict(pipeline.max_memory)
    return str(yaml.dump(data, Dumper=Dumper, sort_keys=False, width=120))


def written(values: Mapping[str, Any]) -> str:
    """A pipeline's plain values as a person would write the file."""
    return str(yaml.dump(values, Dumper=Dumper, sort_keys=False, width=120, default_flow_style=None))


def _written_option(name: str, value: Any) -> Any:
    """A gate above 1 as per cent, which is how it is given."""
    if name in GATES and value is not None and value > 1:
        return f"{100 * value!r}%"
    return written_value(value)


def written_value(value: Any) -> Any:
    """A value of an option as YAML has it."""
    if isinstance(value, tuple):
        return [written_value(item) for item in value]
    if isinstance(value, Matched):
        return {"match": value.match, "value": written_value(value.value)}
    return {name: written_value(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _written_pass(pass_: Pass) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for f in fields(pass_):
        value = getattr(pass_, f.name)
        if f.name == "overrides":
            if value:
                options[f.name] = [{"match": o.match, **written_value(o.options)} for o in value]
        elif isinstance(value, tuple):
            if value:
                options[f.name] = written_value(value)
        else:
            options[f.name] = written_value(value)
    return {pass_.key: options}


def _exporter(exporter: Exporter) -> str | dict[str, Any]:
    return {exporter.key: options} if (options := asdict(exporter)) else exporter.key
