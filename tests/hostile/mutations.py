"""Damage to files, drawn from a seeded generator: bytes, JSON, YAML."""

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "0", "x", "x" * 3000, "../../etc/passwd", "/", "..", "a\0b", "a\nb: c", "[/x]", "\x1b[2J", "\ud800", "ü" * 50,
    "float8_e4m3fn", "auto", "${HOME}", "%s%n", [], [[]], {}, [1, 2], {"a": 1}, [None], {"": {}}, [0.5] * 200,
)  # fmt: skip
SNIPPETS = (
    "- gptq.", "- wanda[2:4]", "passes: []", "passes: *a", "a: &a [*a]", "? ", "<<: {}",
    "!!python/object:os.system x", "!!binary aGk=", "- {}", "- rtn: {bits: 0x10}", "- rtn: {bits: .inf}",
    "- rtn: {group_size: 1e9}", "seed: 2001-01-01", "seed: " + "9" * 5000, "calibration: {source: /dev/zero}",
    "calibration: {source: /dev/null}", "evaluate: {source: .}", "evaluate: {source: 'a\\0b'}",
    "export: [gguf, gguf]", "- " * 800 + "x", "{a: " * 400, "[" * 3000, "\t- rtn", "---", "...", "%YAML 9.9",
    "- rtn: {include: ['[']}", "- rtn: {include: ['" + "*a" * 40 + "']}", "- rtn: {overrides: [{}]}",
    "- rtn: {overrides: [{match: '*', overrides: []}]}", "- ties: {models: ['a\\nb']}",
    "- blockwise: [blockwise: [rtn]]", "- average: {models: [model, model]}", "description: \"\\ud800\"", "- rtn: ~",
    "- ~", "- 5", "- [rtn]", "- ''",
)  # fmt: skip


def of_bytes(data: bytes, rng: Random) -> bytes:
    """One or a few changes of bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(9)
        if kind <= 2 and found:  # a bit, as disks and memory do
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 3 and found:
            found[at % len(found)] = rng.randrange(256)
        elif kind == 4:
            del found[at:]
        elif kind == 5:
            del found[at : at + rng.randrange(1, 40)]
        elif kind == 6:
            found[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 7:
            start = rng.randrange(len(found) + 1)
            found[at:at] = found[start : start + rng.randrange(1, 200)]
        else:
            size = rng.choice((1, 4, 8))
            found[at : at + size] = rng.choice((b"\0", b"\xff")) * size
    return bytes(found)


def of_json(data: bytes, rng: Random) -> bytes:
    """A value, a key or a few, as another program would write them; sometimes bytes."""
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    if rng.random() < 0.05:
        return rng.choice((b"", b"[]", b"{}", b"null", b"5", b'"text"', b"[" * 9000, b'{"a":' * 9000, data + data))
    found = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        change(found, rng)
    return json.dumps(found)[:MOST].encode()


def change(found: Any, rng: Random) -> None:
    """Change one value of a nested structure, wherever it is."""
    places = [place for place in containers(found) if place]
    if not places:
        return
    place = rng.choice(places)
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(("", "x", "newer", "__class__", f"{key}x", "[/x]"))] = deepcopy(rng.choice(VALUES))
    elif kind == 2:
        place[key] = nearby(place[key], rng)
    elif kind == 3:
        other = rng.choice(places)
        place[key] = deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
    else:
        place[key] = deepcopy(rng.choice(VALUES))


def nearby(value: Any, rng: Random) -> Any:
    """A value of the same kind."""
    value = deepcopy(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value * 2, [value]))
    return rng.choice((value * 2 if isinstance(value, list) else [value], None))


def containers(value: Any) -> list[Any]:
    """Every mapping and list of a nested structure."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    inner = [found for part in parts for found in containers(part)]
    return [value, *inner] if isinstance(value, dict | list) else inner


def of_lines(data: bytes, rng: Random) -> bytes:
    """Lines of a text such as YAML or JSON lines; sometimes bytes."""
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines) + 1)
        kind = rng.randrange(5)
        if kind == 0 and lines:
            del lines[at % len(lines)]
        elif kind == 1 and lines:
            lines.insert(at, rng.choice(lines))
        elif kind == 2 and lines:
            words = lines[at % len(lines)].split(" ")
            words[rng.randrange(len(words))] = rng.choice((*map(str, VALUES), "{", "]", "*a", "&a", "'", ","))
            lines[at % len(lines)] = " ".join(words)
        elif kind == 3 and lines:
            lines[at % len(lines)] = rng.choice(("  ", " ", "- ", "\t")) + lines[at % len(lines)]
        else:
            lines.insert(at, rng.choice(SNIPPETS))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def of_header(data: bytes, rng: Random) -> bytes:
    """The header of a safetensors file, its length kept true; sometimes any byte, or the length."""
    if rng.random() < 0.4:
        return of_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 8, 2**40, 2**63))) + data[8:]
    header = of_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


MOST = 1 << 20  # letters of damaged JSON
Mutation = Callable[[bytes, Random], bytes]
