"""What stands in a file: for each of its tensors the parameter it is made of, which rows, and what is done to them.

Names are those of the gguf package's own map. A linear layer is (out, in) whatever way its model keeps it. Experts of a
mixture, which models keep in one parameter, are one tensor of three dimensions for gate, up and down each.

llama.cpp rotates pairs of a head's channels that are next to each other where it calls the rotation normal, and pairs
that are half a head apart as transformers does elsewhere: for the first, rows of query and key layers change places.

Shapes: E = experts, O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.export.gguf.architectures import head_width
from compress.export.gguf.blocks import Blocks, common_type, smallest_type, to_blocks
from compress.export.gguf.keys import kv_heads
from compress.export.hf import Dense
from compress.io.safetensors_file import type_name
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.export.gguf.architectures import Architecture
    from compress.models.graph import Graph
    from compress.models.site import Site

PLAIN = ("F32", "F16", "BF16")
PREFIXES = ("", "transformer.", "model.", "bert.")
SUFFIXES = (".weight", ".bias")
# Names that transformers gives to what its hub files, and so the map, call otherwise.
ALIASES = (
    ("block_sparse_moe.experts.", "mlp.experts."),
    ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
    ("mlp.gate.moe_statics.", "mlp.moe_statics."),
    ("mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
    (".e_score_correction_bias", ".e_score_correction.bias"),
)
# Matrices that are read as float32 whatever the others are: routers and what is added to embeddings.
SINGLE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file.

    Attributes:
        name: in the file.
        parameter: of the model.
        rows: which of its rows, in order; None for all as they are. Of every expert, where there are some.
        plus: is added to every value.
        experts: it has three dimensions.
    """

    name: str
    parameter: str
    rows: Tensor | None = None
    plus: float = 0.0
    experts: bool = False

    def of(self, value: Tensor) -> Tensor:
        """The values it has, of those of the whole parameter as (O, I), (O,) or (E, O, I)."""
        if self.rows is not None:
            value = value[:, self.rows] if self.experts else value[self.rows]
        return value.float() + self.plus if self.plus else value


@dataclass(frozen=True)
class Layout:
    """The tensors of a model of some architecture."""

    graph: Graph
    architecture: Architecture

    @property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.graph.model.config

    @cached_property
    def _map(self) -> Any:
        import gguf

        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        return gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)

    def name(self, parameter: str) -> str | None:
        """What the map calls a parameter."""
        for ours, theirs in ALIASES:
            parameter = parameter.replace(ours, theirs)
        found = (
            self._map.get_name(parameter.removeprefix(prefix), try_suffixes=SUFFIXES)
            for prefix in PREFIXES
            if parameter.startswith(prefix)
        )
        return next((name for name in found if name), None)

    def leaves_out(self, parameter: str) -> bool:
        """Whether a parameter is no part of the file: it is tied, or one that the architecture does without."""
        return parameter in self.graph.tied or parameter.startswith(self.architecture.left_out or ("\0",))

    def pieces(self) -> Iterator[Piece]:
        """In the model's order; parameters without a name are passed over.

        A tied head that llama.cpp looks for is the embedding once more.
        """
        sites = {site.parameter: site for site in self.graph.sites}
        for parameter, value in self.graph.tensors():
            if self.leaves_out(parameter):
                continue
            site = sites.get(parameter)
            if site is not None and site.is_expert:
                yield from self._of_experts(parameter, site)
                continue
            name = self.name(parameter)
            if name is not None:
                plus = float(self.architecture.plus_one and parameter.endswith("norm.weight"))
                count = site.shape[0] if site is not None else value.shape[0]
                yield Piece(name, parameter, self._order(parameter, count), plus)
        for parameter, kept in self.graph.tied.items():
            name = self.name(parameter) if self.architecture.own_head else None
            if name is not None:
                yield Piece(name, kept)

    def nameless(self) -> list[str]:
        """Parameters that the file has no place for."""
        named = {piece.parameter for piece in self.pieces()}
        return [p for p, _ in self.graph.tensors() if p not in named and not self.leaves_out(p)]

    def _of_experts(self, parameter: str, site: Site) -> Iterator[Piece]:
        base, _, leaf = parameter.rpartition(".")
        half = site.shape[0] // 2
        parts = {"gate_up_proj": (("gate_proj", 0), ("up_proj", half)), "down_proj": (("down_proj", None),)}
        for part, start in parts.get(leaf, ()):
            name = self.name(f"{base}.{part}.weight")
            if name is not None:
                rows = None if start is None else torch.arange(start, start + half, device="cpu")
                yield Piece(name, parameter, rows, experts=True)

    def _order(self, parameter: str, rows: int) -> Tensor | None:
        """(rows,) which row of a parameter stands where, or None where they keep their places."""
        layer, config = parameter.split(".")[-2], self.config
        numbers = torch.arange(rows, device="cpu")
        if self.architecture.rows == "pairs":
            count = {"q_proj": config.num_attention_heads, "k_proj": kv_heads(config)}.get(layer)
            return None if count is None else numbers.view(count, 2, -1).transpose(1, 2).flatten()
        if layer != "query_key_value":
            return None
        if self.architecture.rows == "by head":
            return numbers.view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
        grouped = numbers.view(kv_heads(config), -1, head_width(config))
        return torch.cat([grouped[:, :-2].flatten(), grouped[:, -2].flatten(), grouped[:, -1].flatten()])


@dataclass(frozen=True)
class Contents:
    """The values of a file's tensors, from a finished packed folder."""

    artifact: Artifact
    layout: Layout

    @cached_property
    def pieces(self) -> list[Piece]:
        """In order."""
        return list(self.layout.pieces())

    def read(self, piece: Piece) -> Blocks:
        """One tensor as it stands in the file.

        Raises:
            CompressError: its codes fit no type.
        """
        sites = self.artifact.made_sites(piece.parameter)
        kinds = [self._kind(site) for site in sites]
        if not sites or None in kinds or piece.plus:
            return self._plain(piece)
        return self._coded(piece, sites, common_type([kind for kind in kinds if kind is not None]))

    def meant(self, piece: Piece) -> Tensor:
        """The values that a tensor has to have, float32."""
        return piece.of(self._whole(piece.parameter, self.artifact.tensor(piece.parameter))).float()

    def _plain(self, piece: Piece) -> Blocks:
        parameter = piece.parameter
        values = piece.of(self._whole(parameter, Dense(self.artifact, None).read(parameter)[parameter]))
        single = values.dim() < 2 or piece.name.endswith(SINGLE) or "_norm." in piece.name
        values = values.float() if single or type_name(values.dtype) not in PLAIN else values
        return Blocks(type_name(values.dtype), values.contiguous().view(torch.uint8))

    def _kind(self, site: Site) -> str | None:
        """The type of its codes, or None where it has none."""
        encoding = self.artifact.weight(site).encoding
        return None if encoding is None else smallest_type(encoding)

    def _coded(self, piece: Piece, sites: Sequence[Site], kind: str | None) -> Blocks:
        found: list[Blocks] = []
        for site in sites:
            encoding = self.artifact.weight(site).encoding
            assert encoding is not None
            blocks = to_blocks(encoding, kind)
            if isinstance(blocks, str):
                raise CompressError(
                    f"{site.place} fits no type of GGUF exactly, because of {blocks}; leave gguf out of "
                    "`export:`, or quantize with symmetric: true. What is done is kept: run the same command again"
                )
            found.append(blocks if piece.rows is None else Blocks(blocks.type, blocks.data[piece.rows]))
        data = torch.stack([blocks.data for blocks in found]) if piece.experts else found[0].data
        return Blocks(found[0].type, data)

    def _whole(self, parameter: str, value: Tensor) -> Tensor:
        """A parameter as (O, I), (O,) or (E, O, I)."""
        sites = self.artifact.sites_of(parameter)
        if not sites:
            return value
        ref = sites[0].ref
        if not sites[0].is_expert:
            return sites[0].matrix(value)
        pieces = ref.pieces(value)
        return pieces.transpose(1, 2).contiguous() if ref.transposed else pieces
