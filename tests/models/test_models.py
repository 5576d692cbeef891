"""Small random models of every kind go in, and the same models come out: reached, loadable, equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from every import EVERY, KINDS
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if entry.quick else pytest.mark.real) for name, entry in EVERY.items()]
)
def test_a_model_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    entry = EVERY[name]
    saved(entry, tmp_path / "source")
    if entry.refused:
        with pytest.raises(compress.CompressError, match=re.escape(entry.refused)):
            tried(entry, "rtn", tmp_path / "source", tmp_path / "out", entry.exports)
        return
    for method in METHODS:
        containers = entry.exports if method == "rtn" else ()
        if method in entry.without:
            with pytest.raises(compress.CompressError):
                tried(entry, method, tmp_path / "source", tmp_path / method, containers)
            continue
        found = tried(entry, method, tmp_path / "source", tmp_path / method, containers)
        assert found.share >= entry.share, method
        assert found.difference <= entry.tolerance, method
        assert set(found.exports.values()) <= {""}, method


def test_enough_of_every_kind_is_tried_and_one_of_each_every_time() -> None:
    assert sum(map(len, KINDS.values())) == len(EVERY)
    for kind, entries in KINDS.items():
        assert len(entries) >= FEWEST[kind]
        assert any(entry.quick for entry in entries)
