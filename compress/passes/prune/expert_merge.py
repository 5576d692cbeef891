"""Expert merging: experts of a mixture that put out alike become one.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.lazy import torch
from compress.passes.experts import ExpertsPass
from compress.passes.interface import ExpertsLeft
from compress.passes.merge.permutation import align_units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.models.symmetry import Units
    from compress.passes.interface import ExpertsSeen
    from compress.passes.merge.orders import Moves, ReadTensor


@dataclass(frozen=True, kw_only=True)
class ExpertMerge(ExpertsPass):
    """Make one of the experts of every layer that put out alike: their weighted mean.

    The means of what experts put out, each shown every token of the calibration data, are clustered by average linkage
    of their distances until as many clusters are left as experts should stay. The router keeps one row for each
    cluster, so a token that would have been sent to any of its experts competes for the one they became, and is sent to
    as many as before, if so many are left.

    Source: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (HC-SMoE), 2024, arXiv
    2410.08589; the order of neurons as in Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from
    Its Routing Policy" (M-SMoE), 2023, arXiv 2310.01334. Differs from the paper in: there the router keeps the rows of
    all experts, several of which lead to the same one, which no configuration can say, so here it loses rows, and a
    token is never sent to a cluster twice; neurons are put in the order of the largest share's first; where the router
    chooses groups of experts first (DeepSeek), only experts of one group become one.

    Args:
        weigh: what the shares of a mean are: `frequency`: how many tokens each expert is sent; `router_weight`: the sum
            of the weights that the router gives it for them; `equal`. A cluster that is sent nothing has equal shares.
        router: the row of a cluster, and what else the router has for each expert: the `mean` of those of all its
            experts, or that of the `dominant` one, of the largest share.
        align: put neurons in the order that agrees best with the dominant expert's. It needs a linear assignment for
            each expert that is merged.

    Example:
        >>> import compress, torch, transformers
        >>> config = transformers.Qwen3MoeConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        ...     head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
        >>> model = transformers.Qwen3MoeForCausalLM(config).eval()
        >>> tokens = torch.randint(64, (4, 32))
        >>> result = compress.apply(model, [compress.ExpertMerge(keep=0.5)], calibration=tokens)
        >>> result.model.config.num_experts, result.model.model.layers[0].mlp.gate.weight.shape[0]
        (4, 4)
    """

    weigh: Literal["frequency", "router_weight", "equal"] = "frequency"
    router: Literal["mean", "dominant"] = "mean"
    align: bool = True

    key: ClassVar[str] = "expert_merge"
    merges: ClassVar[bool] = True

    @property
    def sees_outputs(self) -> bool:
        return False

    @property
    def sees_distances(self) -> bool:
        return True

    @property
    def aligned(self) -> bool:
        return self.align

    @property
    def mixes_routers(self) -> bool:
        return self.router == "mean"

    def scores(self, layer: ExpertsSeen) -> Tensor:
        if self.weigh == "router_weight":
            return layer.weights
        return layer.tokens.double() if self.weigh == "frequency" else torch.ones_like(layer.weights)

    def run(self, layer: ExpertsSeen) -> ExpertsLeft:
        assert layer.distances is not None
        scores, distances = self.scores(layer).tolist(), layer.distances
        count, size = len(scores), len(scores) // layer.groups
        numbers: list[int] = []
        made_of: dict[int, dict[int, float]] = {}
        for first in range(0, count, size):
            group = range(first, first + size)
            free = [i for i in group if i in layer.may]
            alone = [[i] for i in group if i not in layer.may]
            for members in [*alone, *clusters(distances, free, layer.keep // layer.groups - len(alone))]:
                total = sum(scores[i] for i in members)
                shares = {i: scores[i] / total if total else 1 / len(members) for i in members}
                dominant = max(members, key=lambda i: (shares[i], -i))
                numbers.append(dominant)
                if len(members) > 1:
                    made_of[dominant] = shares
        return ExpertsLeft(tuple(sorted(numbers)), made_of)

    def order(self, neurons: Units, ours: ReadTensor, theirs: ReadTensor) -> Moves:
        return align_units([neurons], ours, theirs, torch.Generator(), sweeps=1).moves


def clusters(distances: Tensor, members: Sequence[int], count: int) -> list[list[int]]:
    """So many clusters of some experts, by average linkage.

    Args:
        distances: (E, E) between all.
        members: of which clusters are made.
        count: of clusters; at most as many as there are members, and at least 1 where there is one.
    """
    if count >= len(members):
        return [[i] for i in members]
    from sklearn.cluster import AgglomerativeClustering  # takes a second to import

    between = distances.cpu().numpy()[list(members)][:, list(members)]
    found = AgglomerativeClustering(n_clusters=count, metric="precomputed", linkage="average").fit_predict(between)
    made: dict[int, list[int]] = {}
    for member, label in zip(members, found.tolist(), strict=True):
        made.setdefault(label, []).append(member)
    return sorted(made.values())
