"""YAML to plain values, with the line of every path, however strange the file is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from compress.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_VALUES = 100_000  # of a file, aliases spelled out: a few lines of aliases of aliases stand for billions
MOST_LETTERS = 200_000  # of a file; the longest pipelines that people write have some thousands
MOST_LETTERS_OF_KEY = 200  # a path repeats the keys that it goes through
MOST_INTEGER_BITS = 64  # of a whole number
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 takes 1e-2, without a point, for a text


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Attributes:
        values: mappings, lists, texts, numbers.
        lines: path -> line; a path is like `passes[0].gptq.bits`.
        problems: keys that stand twice, and values that cannot be read.
    """

    values: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Loader(yaml.SafeLoader):
    """Reads 1e-2 as a number."""


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` or another reader would take for a number: N:M patterns are base sixty in YAML 1.1."""


for each in (Loader, Dumper):
    each.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("+-0123456789"))


def line_of(lines: Mapping[str, int], path: str) -> int | None:
    """The line of a path, or of its nearest parent that has one."""
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines.get(path)


def document(text: str, file: str) -> Document:
    """Read YAML text, in bounded time and memory.

    Raises:
        ConfigError: not YAML, too long, or without end.
    """
    if len(text) > MOST_LETTERS:
        said = f"holds {len(text):,} letters, and no more than {MOST_LETTERS:,} are read; is it the right file?"
        raise ConfigError([Problem("", said)], file)
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            return Document(None)
        _count(node, {}, file)
        found = Document(None)
        return Document(_plain_value(node, "", found), found.lines, found.problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        raise ConfigError([Problem("", f"not YAML: {getattr(error, 'problem', error)}", line)], file) from error
    except RecursionError as error:
        raise ConfigError([Problem("", "is nested too deeply")], file) from error


def _count(node: yaml.Node, counts: dict[int, int], file: str) -> int:
    """How many values a node stands for, aliases spelled out; `counts` holds those of the nodes seen before."""
    known = counts.get(id(node))
    line = node.start_mark.line + 1
    if known == 0:  # it is being counted
        raise ConfigError([Problem("", "an anchor refers to itself", line)], file)
    if known is None:
        counts[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known = counts[id(node)] = 1 + sum(_count(part, counts, file) for part in inner)
    if known > MOST_VALUES:
        raise ConfigError([Problem("", f"stands for more than {MOST_VALUES} values, through its aliases", line)], file)
    return known


def _plain_value(node: yaml.Node, path: str, found: Document) -> Any:
    """A YAML node as Python values, noting lines and problems in `found`."""
    found.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, path, found)
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(item, f"{path}[{i}]", found) for i, item in enumerate(node.value)]
    if node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
        return node.value  # YAML 1.1 reads an unquoted 2:4 as 124, a number in base sixty; here it is a pattern
    try:
        value = Loader("").construct_object(node)
        if isinstance(value, int) and value.bit_length() > MOST_INTEGER_BITS:
            raise ValueError("it is too large")
        return value
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        found.problems.append(Problem(path, f"{node.value!r:.200} cannot be read: {reason}", found.lines[path]))
        return None


def _plain_mapping(node: yaml.MappingNode, path: str, found: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            found.problems.append(Problem(path, "a key must be a word", line))
            continue
        if len(key_node.value) > MOST_LETTERS_OF_KEY:
            found.problems.append(Problem(path, f"a key has {len(key_node.value)} letters", line))
            continue
        key = key_node.value
        here = f"{path}.{key}" if path else str(key)
        found.lines[here] = line
        if key in result:
            found.problems.append(Problem(here, "appears twice", line))
        result[key] = _plain_value(value_node, here, found)
    return result
