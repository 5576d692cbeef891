"""What every quantizer that learns by reconstruction promises of masked weights."""

from dataclasses import replace

import pytest
import textbook
import torch
from torch import Tensor

from compress.calibration.reconstruct import Weights
from compress.encodings import Weight
from compress.passes import AdaRound, FlexRound, Jlcm, Nupes
from compress.passes.base import Target
from compress.passes.quantize.learned import LearnedPass

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNED: list[LearnedPass] = [
    AdaRound(bits=3, steps=6),
    FlexRound(bits=3, steps=6),
    Jlcm(bits=2, steps=6, weighting="none"),
    Jlcm(bits=2, tables=1, scale="row", steps=6, weighting="none"),
    *(
        Nupes(bits=3, steps=6, levels=levels, moves=moves)
        for levels in ("zero", "half")
        for moves in ("division", "grid")
    ),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("pass_", LEARNED, ids=lambda p: f"{p.key}-{p.options()}")
@pytest.mark.parametrize("objective", ["block", "layer"])
def test_masked_weights_are_zero_while_learning_and_in_the_end(pass_: LearnedPass, objective: str) -> None:
    pass_ = replace(pass_, objective=objective)  # type: ignore[arg-type]
    mask = textbook.mask(16, 48, share=0.5)
    x = textbook.inputs(48)
    w = textbook.weight(16, 48) * mask
    target = Target(w, mask, textbook.statistics(x, "gram"), torch.Generator().manual_seed(0))
    block, shown = textbook.block({"a": target}), 0
    assert block.data is not None
    plain = block.data.call

    def call(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
        nonlocal shown
        shown += 1
        assert bool((weights["a"][~mask] == 0).all())
        assert bool((weights["a"][mask] != 0).any())
        return plain(weights, hidden, numbers)

    ((_, edit),) = pass_.run(replace(block, data=replace(block.data, call=call)))
    assert (shown > pass_.steps) == (objective == "block")
    stored = Weight(mask=edit.mask, encoding=edit.encoding).dequantize()
    assert bool((stored[~mask] == 0).all())
    assert float((stored - w)[mask].norm() / w.norm()) < 0.6
