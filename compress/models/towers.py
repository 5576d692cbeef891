"""The lists of repeated modules that a model is made of: one of most, one for each part of a model with several.

A tower is told by the list that holds its blocks, whatever their classes and sizes are. Its name comes from where the
list lies: `language`, `vision`, `audio`, `encoder`, `decoder`, else the path of the list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.lazy import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LANGUAGE = "language"
# What a part of a path says that begins with a word, or has it behind a line.
WORDS = {
    "vis": "vision", "image": "vision", "vit": "vision", "pixel": "vision", "audio": "audio", "speech": "audio",
    "sound": "audio", "connector": "connector", "projector": "connector", "perceiver": "connector",
    "resampler": "connector", "qformer": "connector", "language": LANGUAGE, "text": LANGUAGE, "llm": LANGUAGE,
    "encoder": "encoder", "decoder": "decoder",
}  # fmt: skip
APART = ("vision", "audio")  # towers beside which the main one is that of the language


@dataclass(frozen=True)
class Tower:
    """Blocks that run one after the other.

    Attributes:
        name: `language`, `vision`, ..., which several lists of one part of a model share.
        blocks: full names, in order; ("",) where the model is one block as a whole.
        start: number of the first of them among the blocks of all towers.
    """

    name: str
    blocks: tuple[str, ...]
    start: int = 0

    @property
    def numbers(self) -> range:
        """Their numbers among the blocks of all towers."""
        return range(self.start, self.start + len(self.blocks))


def towers_of(model: nn.Module) -> tuple[Tower, ...]:
    """All towers of a model, in the order in which it defines them; one of ("",) where nothing is repeated."""
    if type(model) is nn.Sequential:
        return numbered([Tower("", tuple(name for name, _ in model.named_children()))])
    lists = list(_lists(model))
    names = [named(path) for path, _ in lists]
    beside = any(name in APART for name in names)
    towers = [
        Tower(_main(name, path) if beside else name or path, unwrapped(model, blocks))
        for name, (path, blocks) in zip(names, lists, strict=True)
    ]
    return numbered(towers or [Tower("", ("",))])


def numbered(towers: Sequence[Tower]) -> tuple[Tower, ...]:
    """The same towers, their blocks counted one tower after the other."""
    found, start = [], 0
    for tower in towers:
        found.append(replace(tower, start=start))
        start += len(tower.blocks)
    return tuple(found)


def _lists(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(path, blocks) of every list of modules with matrices that lies in no other; one of single layers is none."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer) for outer in inside):
            continue
        children = list(module.named_children())
        if any(isinstance(child, nn.ModuleList) for _, child in children):
            continue  # stages of PVT: a list is nothing that runs, and those in it are lists of their own
        if any(list(child.children()) for _, child in children) and any(p.dim() > 1 for p in module.parameters()):
            inside.append(f"{path}.")
            yield path, tuple(f"{path}.{name}" for name, _ in children)


def named(path: str) -> str:
    """What the words of a path say of the list that lies there; the outermost says most. Empty: nothing."""
    for part in path.lower().split("."):
        for beginning, name in WORDS.items():
            if part.startswith(beginning) or f"_{beginning}" in part:
                return name
    return ""


def _main(name: str, path: str) -> str:
    """The name of a tower in a model that has one for images or sounds, too."""
    plain = path.rpartition(".")[2] in ("layers", "h", "blocks")
    return name or (LANGUAGE if plain else path)


def unwrapped(model: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Blocks that only hold a list of modules (the stages of a ResNet) give way to what is on the list."""
    found: list[str] = []
    for name in blocks:
        children = list(model.get_submodule(name).named_children())
        if len(children) != 1 or not isinstance(children[0][1], nn.Sequential | nn.ModuleList):
            return blocks
        if len({type(each) for each in children[0][1]}) > 1:  # the parts of one block, such as attention and MLP of T5
            return blocks
        found += [f"{name}.{children[0][0]}.{inner}" for inner, _ in children[0][1].named_children()]
    return tuple(found)
