"""PERP: recover what pruning lost by training a small part of the parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compress.passes.retrain.options import EndToEndRetraining, Train


@dataclass(frozen=True, kw_only=True)
class Perp(EndToEndRetraining):
    """Train biases, norms, the head and adapters that keep zeros, end to end; then merge the adapters.

    By default the output layer is left as it is where it is tied to the embedding, or no longer dense. The whole model
    is in memory while it is trained. Zeros stay zeros, and the merged model is exactly as large as before.

    Source: Zimmer, Andoni, Spiegel and Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
    arXiv 2312.15230. Differs from the paper in: the best iterate on held-out samples is kept, the start among them;
    masks are stored, never read off zeros; scale_lora starts with one component of ones, so that its components can
    differ; the paper trains for the next token; `scale`, `lora` beside codes, new biases and `distill` are ours, and
    `principal` and `sensitive` are of other papers, see `importance`.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.Magnitude(sparsity=0.5), compress.Perp(steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> round(float((result.model[0].weight == 0).float().mean()), 2)
        0.5
    """

    train: tuple[Train, ...] = ("bias", "norm", "head", "mask_lora")

    key: ClassVar[str] = "perp"
