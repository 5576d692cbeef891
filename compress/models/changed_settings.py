"""Changed entries of a configuration, put where its file has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """Settings with some of them changed.

    Args:
        settings: as a config.json has them. They are left as they are.
        changes: name of an entry -> its new value; of a part of the configuration, the changes in it.
        config: what transformers reads them as. An entry may stand in the file under another name that it takes for it
            (`attribute_map`), as `num_experts` for `num_local_experts`: both at once would contradict each other.
    """
    found = dict(settings)
    aliases: Mapping[str, str] = getattr(config, "attribute_map", {})
    for name, value in changes.items():
        if isinstance(value, dict):
            inner = settings.get(name)
            found[name] = changed(inner if isinstance(inner, dict) else {}, value, getattr(config, name, None))
            continue
        names = [name, *(alias for alias, meant in aliases.items() if meant == name)]
        for there in [n for n in names if n in settings] or [name]:
            found[there] = value
    return found
