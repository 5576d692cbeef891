"""Options of passes, exporters and sections, checked against what their dataclasses declare.

A dataclass says of each option its type, its range and the values it may have. Pydantic reads that; what it finds wrong
is said in our words. One adapter is made for each class, when it is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.json_schema import GenerateJsonSchema

from compress.config.words import described, known, out_of_range, shown
from compress.errors import OptionError
from compress.passes import Override, Pass
from compress.passes.merge.schedules import Matched

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from compress.export import Exporter

# Instances are checked as well: a pass that was made in Python, a `Matched` inside its options.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, revalidate_instances="always")
OUT_OF_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
PATTERNS = {"include", "exclude", "overrides", "embeddings"}  # options of the whole pass, which no override changes


for part in (Matched, Override):  # they stand inside options
    with_config(STRICT)(part)


@dataclass(frozen=True)
class Checked:
    """Options, looked at one by one.

    Attributes:
        values: those of the declared type, as that type.
        mistyped: those of another type; nothing can be made of them.
        outside: those that are out of range, which are among the values as they were given.
    """

    values: dict[str, Any]
    mistyped: tuple[OptionError, ...] = ()
    outside: tuple[OptionError, ...] = ()


class _Untitled(GenerateJsonSchema):
    """Leaves out titles, which repeat the names of the options."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def adapter(cls: type) -> TypeAdapter[Any]:
    """What checks the options of a dataclass."""
    return TypeAdapter(with_config(STRICT)(cls))


@cache
def rules(cls: type) -> dict[str, Any]:
    """The JSON schema of a dataclass: types, ranges, allowed values and defaults."""
    return adapter(cls).json_schema(schema_generator=_Untitled)


@cache
def lists_in(cls: type) -> frozenset[str]:
    """The options of a dataclass that are lists, in the place of which a file may have a single text."""
    return frozenset(name for name, hint in get_type_hints(cls).items() if get_origin(hint) is tuple)


def names_in(cls: type) -> list[str]:
    """The options of a dataclass."""
    return [f.name for f in fields(cls)]


def check_options(cls: type, options: Mapping[str, Any]) -> Checked:
    """Options against the types and ranges that a dataclass declares. Unknown ones are left out."""
    given = {name: _typed(value) for name, value in options.items() if name in names_in(cls)}
    try:
        made = adapter(cls).validate_python(cls(**given))
        return Checked({name: getattr(made, name) for name in given})
    except ValidationError as error:
        found = error.errors(include_url=False)
    mistyped, outside = [], []
    for name in dict.fromkeys(str(each["loc"][0]) for each in found):
        rule = rules(cls)["properties"][name]
        out = [e["input"] for e in found if e["loc"][0] == name and e["type"] in OUT_OF_RANGE]
        if out:
            outside.append(OptionError(name, out_of_range(out[0], rule)))
        else:
            mistyped.append(OptionError(name, f"{shown(given[name])} is not {described(rule)}"))
    wrong = {error.option for error in (*mistyped, *outside)}
    right = check_options(cls, {name: value for name, value in given.items() if name not in wrong}).values
    kept = {error.option: given[error.option] for error in outside}
    return Checked(right | kept, tuple(mistyped), tuple(outside))


def _typed(value: Any, inside: bool = False) -> Any:
    """Lists as tuples, and what stands in them for single tensors as such."""
    if isinstance(value, list | tuple):
        return tuple(_typed(item, inside=True) for item in value)
    if inside and isinstance(value, Mapping) and value.keys() == {"match", "value"}:
        return Matched(value["match"], _typed(value["value"]))
    if isinstance(value, Mapping):
        return {name: _typed(item) for name, item in value.items()}
    if isinstance(value, Matched):
        return Matched(value.match, _typed(value.value))
    return value


def unknown(cls: type, options: Mapping[str, Any], names: Collection[str]) -> Iterator[OptionError]:
    """An error for each option that is none of `names`."""
    for name in options:
        if name not in names:
            what = f"unknown option of {cls.key}" if hasattr(cls, "key") else "unknown key"
            yield OptionError(str(name), f"{what}; {known(name, names)}")


def errors_in(made: Pass | Exporter) -> list[OptionError]:
    """Every impossible option of a pass or exporter, wherever it was made: `bits`, or `overrides[0].bits`."""
    cls = type(made)
    own = check_options(cls, {name: getattr(made, name) for name in names_in(cls)})
    mistyped, outside = [*own.mistyped], [*own.outside]
    readable = not {"overrides", "choose", "embeddings"} & {error.option for error in mistyped}
    for prefix, options in made.alternatives() if isinstance(made, Pass) and readable else ():
        other = check_options(cls, options)
        mistyped += _within(prefix, [*unknown(cls, options, {*names_in(cls)} - PATTERNS), *other.mistyped])
        outside += _within(prefix, other.outside)
    if mistyped:  # nothing more can be said of what is no option, or of another type
        return [*mistyped, *outside]
    named = {error.option for error in outside}
    return [*outside, *(error for error in made.mistakes() if error.option not in named)]


def _within(prefix: str, errors: Iterable[OptionError]) -> Iterator[OptionError]:
    return (OptionError(prefix + error.option, error.message) for error in errors)
