"""The JSON schema of pipeline files, for completion and help in editors, from the dataclasses that files are read into.

Types, ranges, allowed values and defaults are those that files are checked against; descriptions are the docstrings'.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from compress.config.options import PATTERNS, lists_in, names_in, rules
from compress.config.pipeline import FORMATS, GATES, METHODS, PACKED, Pipeline, Settings
from compress.config.reading import PERCENTAGE, SECTIONS
from compress.config.schemes import DESCRIBED, NAMED
from compress.config.words import bounded
from compress.passes.merge.schedules import Matched
from compress.passes.quantize.named_grids import NAMED_GRIDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compress.export import Exporter
    from compress.passes import Pass


def schema() -> dict[str, Any]:
    """A JSON schema of pipeline files."""
    method, format_ = {"$ref": "#/$defs/method"}, {"$ref": "#/$defs/format"}
    parts: dict[str, dict[str, Any]] = {
        "passes": {"type": "array", "items": {"anyOf": [method, _blockwise(method)]}},
        "export": {"anyOf": [{"type": "array", "items": format_, "minItems": 1}, {"enum": [PACKED, *FORMATS]}]},
        **{name: _section_schema(cls) for name, cls in SECTIONS.items()},
    }
    described = descriptions(Pipeline)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress pipeline",
        "type": "object",
        "properties": {
            **{name: {"description": described[name], **part} for name, part in parts.items()},
            **_properties(Settings),
        },
        "required": ["passes"],
        "additionalProperties": False,
        "$defs": {
            "method": _one_of(METHODS, [*METHODS]),
            "format": _one_of(FORMATS, [PACKED, *FORMATS]),
            # By their classes: a method and a format may have one name.
            **{cls.__name__: _method(cls) for cls in METHODS.values()},
            **{cls.__name__: _options_schema(cls) for cls in FORMATS.values()},
            Matched.__name__: rules(Matched),
        },
    }


def descriptions(cls: type) -> dict[str, str]:
    """What a class and those that it inherits from say of their options under `Args:`."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, text = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("\nArgs:\n")
        for names, said in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", text.split("\n\n")[0], re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(said.split()))
    return found


def _one_of(classes: Mapping[str, type[Pass | Exporter]], names: list[str]) -> dict[str, Any]:
    """A name alone, or one of the classes with its options."""
    return {"anyOf": [{"enum": names}, *(_single(name, cls) for name, cls in classes.items())]}


def _single(name: str, cls: type) -> dict[str, Any]:
    """A mapping of one name to the options of its class."""
    return {"description": _summary(cls), **_closed({name: {"$ref": f"#/$defs/{cls.__name__}"}}, required=[name])}


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A mapping that has no other keys."""
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _blockwise(method: dict[str, Any]) -> dict[str, Any]:
    description = "Methods that run together on each block, before the next."
    inner = {"type": "array", "items": method, "minItems": 1, "description": description}
    return {"description": description, **_closed({"blockwise": inner}, required=["blockwise"])}


def _options_schema(cls: type) -> dict[str, Any]:
    """The options of a class, or nothing for its defaults."""
    return {**_closed(_properties(cls)), "type": ["object", "null"], "description": _summary(cls)}


def _section_schema(cls: type) -> dict[str, Any]:
    section = _options_schema(cls)
    for gate in {*GATES} & section["properties"].keys():
        share = section["properties"][gate]
        percentage = {"type": "string", "pattern": f"^{PERCENTAGE}$"}
        section["properties"][gate] = {**share, "anyOf": [*share["anyOf"], percentage]}
    return section


def _method(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass, with the short form for two of them, and overrides as files have them."""
    options = _options_schema(cls)
    properties = options["properties"]
    if "bits" in properties:
        widths = "|".join(map(str, _bit_widths(properties["bits"])))
        named = [name for name in properties["grid"]["enum"] if name in NAMED_GRIDS] if "grid" in properties else []
        properties["scheme"] = {
            "type": "string",
            "pattern": f"^({'|'.join([*named, f'w({widths})(g[1-9][0-9]*)?'])})$",
            "description": f"Short for {DESCRIBED}{f'; {NAMED}' if named else ''}.",
        }
    here = {name: {"$ref": f"#/$defs/{cls.__name__}/properties/{name}"} for name in properties if name not in PATTERNS}
    match = {"type": "string", "description": "A shell wildcard on full names; the last override that matches wins."}
    inner = _closed({"match": match, **here}, required=["match"])
    if "embeddings" in properties:
        forms = [
            _closed(here),
            *([{key: properties["scheme"][key] for key in ("type", "pattern")}] if "scheme" in here else []),
        ]
        properties["embeddings"] = {
            "anyOf": [*forms, {"type": "null"}],
            "description": properties["embeddings"]["description"],
            "default": None,
        }
    properties["overrides"] = {
        "type": "array",
        "items": inner,
        "description": "Other options for the layers that match.",
    }
    return options


def _bit_widths(rule: dict[str, Any]) -> Iterable[int]:
    """The numbers of bits that an option may have."""
    within = bounded(rule)
    return rule["enum"] if "enum" in rule else range(within["minimum"], within["maximum"] + 1)


def _properties(cls: type) -> dict[str, Any]:
    said = descriptions(cls)
    found = {}
    for name in names_in(cls):
        rule = {**rules(cls)["properties"][name], "description": said[name]}
        if name in lists_in(cls) and name != "overrides":  # one text may stand for a list of one
            listed = {"type": rule.pop("type"), "items": rule.pop("items")}
            rule["anyOf"] = [listed, listed["items"]]
        found[name] = rule
    return found


def _summary(cls: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
