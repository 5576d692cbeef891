"""The JSON schema of pipeline files, for completion in editors, from the dataclasses the parser reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from compress.config.options import choices
from compress.config.pipeline import FORMATS, GATES, METHODS, PACKED, Calibration, Evaluation, Pipeline
from compress.passes import Override
from compress.passes.merge.schedules import Matched


def schema() -> dict[str, Any]:
    """A JSON schema of pipeline files, for completion in editors."""
    methods: list[dict[str, Any]] = [{"enum": list(METHODS)}]
    for name, cls in METHODS.items():
        properties = _properties(cls)
        if "bits" in properties:
            properties["scheme"] = {"type": "string", "pattern": "^w[2-8](g[0-9]+)?$"}
        methods.append(_entry(name, properties))
    fused = {"type": "array", "items": {"anyOf": methods}, "minItems": 1}
    top = _properties(Pipeline)
    top["passes"] = {
        "type": "array",
        "items": {
            "anyOf": [
                *methods,
                {
                    "type": "object",
                    "properties": {"blockwise": fused},
                    "required": ["blockwise"],
                    "additionalProperties": False,
                },
            ]
        },
    }
    evaluate = _properties(Evaluation)
    for gate in GATES:
        evaluate[gate] = {"type": ["number", "string", "null"]}
    for name, properties in (("calibration", _properties(Calibration)), ("evaluate", evaluate)):
        top[name] = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    names = [PACKED, *FORMATS]
    formats: list[dict[str, Any]] = [{"enum": names}]
    formats += [_entry(name, _properties(cls)) for name, cls in FORMATS.items()]
    top["export"] = {"anyOf": [{"type": "array", "items": {"anyOf": formats}}, {"enum": names}]}
    del top["lines"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress pipeline",
        "type": "object",
        "properties": top,
        "required": ["passes"],
        "additionalProperties": False,
    }


def _entry(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    """One method or format with its options."""
    inner = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return {"type": "object", "properties": {name: inner}, "required": [name], "additionalProperties": False}


def _properties(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: _schema_of(hints[f.name]) for f in fields(cls)}


def _schema_of(hint: Any) -> dict[str, Any]:
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    options: list[dict[str, Any]] = []
    for option in choices(hint):
        if get_origin(option) is Literal:
            options.append({"enum": list(get_args(option))})
        elif get_origin(option) is tuple:
            item = _schema_of(get_args(option)[0])
            options.append({"type": "array", "items": item})
            if item == {"type": "string"}:
                options.append(item)
        elif get_origin(option) is Mapping:
            options.append({"type": "object", "additionalProperties": _schema_of(get_args(option)[1])})
        elif option is Override:
            options.append({"type": "object", "required": ["match"]})
        elif option is Matched:
            options.append({
                "type": "object",
                "properties": {"match": {"type": "string"}, "value": _schema_of(get_type_hints(Matched)["value"])},
                "required": ["match", "value"],
                "additionalProperties": False,
            })  # fmt: skip
        elif option in names:
            options.append({"type": names[option]})
        else:
            options.append({})
    return options[0] if len(options) == 1 else {"anyOf": options}
