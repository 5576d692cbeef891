"""Small random models of every kind go in, and the same models come out: reached, loadable, equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from every import EVERY, KINDS
from selection import only
from tried import METHODS, saved, tried

import compress

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What transformers and torch warn of in the code of single models, none of which is ours.
    pytest.mark.filterwarnings("ignore"),
]
FEWEST = {
    "text decoders": 60, "mixtures of experts": 30, "vision and language": 12, "encoders and encoder-decoders": 20,
    "images and sound": 10, "state space and linear attention": 12,
}  # fmt: skip


CASES = [(name, method) for name in EVERY for method in METHODS]
QUICK = [(name, method) for name, method in CASES if EVERY[name].quick and method == "gptq"]


@pytest.mark.parametrize(("name", "method"), only(QUICK, CASES))
def test_a_model_comes_out_as_it_went_in(name: str, method: str, tmp_path: Path) -> None:
    entry = EVERY[name]
    saved(entry, tmp_path / "source")
    containers = entry.exports if method == "rtn" else ()
    if entry.refused or method in entry.without:
        with pytest.raises(compress.CompressError, match=re.escape(entry.refused)):
            tried(entry, method, tmp_path / "source", tmp_path / "out", containers)
        return
    found = tried(entry, method, tmp_path / "source", tmp_path / "out", containers)
    assert found.share >= entry.share
    assert found.difference <= entry.tolerance
    assert set(found.exports.values()) <= {""}


def test_enough_of_every_kind_is_tried_and_one_of_each_every_time() -> None:
    assert sum(map(len, KINDS.values())) == len(EVERY)
    for kind, entries in KINDS.items():
        assert len(entries) >= FEWEST[kind]
        assert any(entry.quick for entry in entries)
