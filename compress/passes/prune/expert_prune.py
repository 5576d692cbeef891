"""Expert pruning: of every layer of a mixture the experts go that add least to what the layer puts out.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.passes.experts import ExpertsPass
from compress.passes.interface import ExpertsLeft

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes.interface import ExpertsSeen


@dataclass(frozen=True, kw_only=True)
class ExpertPrune(ExpertsPass):
    """Drop the experts of every layer that matter least on calibration data.

    What is left is a smaller model of the same kind: fewer experts, renumbered, and routers without their rows. Its
    router does what the original's would if it could not choose the experts that went.

    Source: `reap`: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression", 2025, arXiv
    2510.13999, eq. 9: the mean, over the tokens that an expert is sent, of its router weight times the norm of its
    output; `frequency` is the baseline there: how many tokens it is sent. Differs from the paper in: the router weight
    is the one that the model multiplies with, normalised and scaled where it does that; where the router chooses groups
    of experts first (DeepSeek), equally many of each group stay.

    Args:
        by: `reap` or `frequency`, see above. An expert that is sent no token is worth 0 by both.

    Example:
        >>> import compress, torch, transformers
        >>> config = transformers.Qwen3MoeConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
        >>> model = transformers.Qwen3MoeForCausalLM(config).eval()
        >>> tokens = torch.randint(64, (4, 32))
        >>> result = compress.apply(model, [compress.ExpertPrune(keep=0.5)], calibration=tokens)
        >>> result.model.config.num_experts, result.model.model.layers[0].mlp.gate.weight.shape[0]
        (4, 4)
    """

    by: Literal["reap", "frequency"] = "reap"

    key: ClassVar[str] = "expert_prune"

    @property
    def sees_outputs(self) -> bool:
        return self.by == "reap"

    def scores(self, layer: ExpertsSeen) -> Tensor:
        tokens = layer.tokens.double()
        return layer.weighted / tokens.clamp(min=1) if self.by == "reap" else tokens

    def run(self, layer: ExpertsSeen) -> ExpertsLeft:
        return ExpertsLeft(best(self.scores(layer).tolist(), layer.keep, layer.groups, layer.may))


def best(scores: list[float], keep: int, groups: int, may: frozenset[int]) -> tuple[int, ...]:
    """The experts that stay: of each group those that must, and those of the largest scores; of equal ones the first.

    Args:
        scores: of E experts.
        keep: how many stay; `groups` divides both.
        groups: of neighbours; equally many of each stay.
        may: those that may go.
    """
    size, stay = len(scores) // groups, keep // groups
    kept: list[int] = []
    for first in range(0, len(scores), size):
        ranked = sorted(range(first, first + size), key=lambda i: (i in may, -scores[i], i))
        kept += sorted(ranked[:stay])
    return tuple(kept)
