"""What holds of every pass that leaves fewer experts."""

import json
from pathlib import Path

import pytest
from children import FILES, killed_again_and_again, prepare
from expert_models import make_mixture
from selection import only

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
"""
RESUMED = {
    "expert_prune": "passes: [{magnitude: {sparsity: 0.3}}, {expert_prune: {keep: 0.5}}, {gptq: {scheme: w3g32}}]\n",
    "expert_merge": "passes: [{layer_drop: {}}, {expert_merge: {keep: 0.5}}, {gptq: {scheme: w3g32}}]\n",
}


@FILES
@pytest.mark.parametrize("name", only(["expert_merge"], RESUMED))
def test_killed_again_and_again_the_run_ends_bit_identical(name: str, files: int, tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, DATA + RESUMED[name])
    vocabulary = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    make_mixture("Mixtral", vocab_size=vocabulary).save_pretrained(tmp_path / "model")
    assert "s01-routing.json" in killed_again_and_again(whole, killed, files)
