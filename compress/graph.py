"""A model as blocks and sites.

A block is one of the model's repeated modules (decoder layers; the children of a plain `nn.Sequential`). A site is a
matrix to compress: the weight of a `Linear` or a transformers `Conv1D` (stored transposed). Nothing is traced: which
block feeds which is observed while running (`calibration/collect.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from compress.errors import CheckpointError, UnsupportedModelError

# Above this share of block weights out of every pass's reach, running would be pretending.
MOST_UNREACHABLE = 0.01


@dataclass(frozen=True)
class Site:
    """One matrix to compress.

    Attributes:
        name: the module's full name, as patterns match it.
        shape: (out, in).
        transposed: the module keeps it as (in, out).
        block: index into `Graph.blocks`, or None for a site outside every block, such as an output head.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None

    @property
    def parameter(self) -> str:
        """The parameter's full name."""
        return f"{self.name}.weight" if self.name else "weight"

    def matrix(self, value: Tensor) -> Tensor:
        """The parameter's value as (out, in)."""
        return value.T.contiguous() if self.transposed else value

    def value(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.T.contiguous() if self.transposed else matrix


@dataclass(frozen=True)
class Graph:
    """A model (its parameters possibly on the meta device) with its blocks and sites found.

    Attributes:
        tied: parameter name -> the name its value is kept under, for parameters that share one tensor.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    tied: dict[str, str] = field(default_factory=dict)

    def in_block(self, index: int) -> tuple[Site, ...]:
        """The sites of one block, in the model's order."""
        return tuple(s for s in self.sites if s.block == index)

    @property
    def outside(self) -> tuple[Site, ...]:
        """Sites of no block."""
        return tuple(s for s in self.sites if s.block is None)

    @property
    def is_language_model(self) -> bool:
        """Whether it is called with token ids."""
        return isinstance(self.model, PreTrainedModel)


def find(model: nn.Module) -> Graph:
    """Blocks and sites of a model.

    Raises:
        UnsupportedModelError: there is nothing to compress, or a block keeps weights in fused tensors (experts
            stored as one three-dimensional parameter) that no pass can reach.
    """
    blocks = _blocks(model)
    index = {name: i for i, name in enumerate(blocks)}
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            out, width = module.weight.shape
            transposed = isinstance(module, Conv1D)
            shape = (width, out) if transposed else (out, width)
            sites.append(Site(name, shape, transposed, _owner(name, index)))
    if not sites:
        raise UnsupportedModelError(f"{type(model).__name__} has no Linear or Conv1D layer: nothing to compress")
    _refuse_unreachable(model, blocks, {s.parameter for s in sites})
    return Graph(model, blocks, tuple(sites), _tied(model))


def _blocks(model: nn.Module) -> tuple[str, ...]:
    if type(model) is nn.Sequential:
        return tuple(name for name, child in model.named_children() if next(child.parameters(), None) is not None)
    best: tuple[str, ...] = ()
    most = 0
    for name, module in model.named_modules():
        children = list(module.named_children())
        if isinstance(module, nn.ModuleList) and children and len({type(c) for _, c in children}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                best, most = tuple(f"{name}.{child}" for child, _ in children), size
    return best or ("",)  # no repeated modules: the whole model is the one block


def _tied(model: nn.Module) -> dict[str, str]:
    kept_under = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept_under[id(p)] for name, p in every if kept_under[id(p)] != name}


def _owner(name: str, blocks: dict[str, int]) -> int | None:
    if "" in blocks:
        return blocks[""]
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        owner = blocks.get(".".join(parts[:end]))
        if owner is not None:
            return owner
    return None


def _refuse_unreachable(model: nn.Module, blocks: tuple[str, ...], reached: set[str]) -> None:
    total = unreachable = 0
    examples = []
    for block in blocks:
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block):
            total += parameter.numel()
            if parameter.dim() > 2 and name not in reached:
                unreachable += parameter.numel()
                examples.append(f"{name} {tuple(parameter.shape)}")
    if total and unreachable / total > MOST_UNREACHABLE:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps {unreachable / total:.0%} of its block weights in fused tensors that no "
            f"pass can reach, such as {examples[0]} ({len(examples)} in all). Mixtures of experts stored this way are "
            "not supported; use a dense model, or one whose experts are separate Linear layers."
        )


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json of a folder; custom code is never run."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model is a folder as save_pretrained writes it")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return config
    except Exception as error:  # each model's configuration class refuses in its own way
        raise CheckpointError(f"{folder}/config.json cannot be used: {error}") from error


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model a configuration describes, parameters on the meta device, buffers real.

    Raises:
        CheckpointError: not a causal language model transformers knows.
    """
    try:
        with no_init_weights(), _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above: a wrong value surfaces wherever the model's code first uses it
        raise CheckpointError(
            f"config.json describes no causal language model that transformers can build: {error}"
        ) from error
    model.tie_weights()
    model.eval()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside keep real buffers (rotary frequencies are computed, not stored) but no parameter data."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
