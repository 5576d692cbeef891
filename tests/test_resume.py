"""A killed run continues and ends bit-identical: real processes, really killed."""

import json
import signal
from pathlib import Path
from typing import Any

from children import FILES, contents, killed_again_and_again, prepare, run
from expert_models import make_mixture

PASSES = """\
passes:
  - wanda: {sparsity: "2:4"}
  - blockwise:
      - gptq: {scheme: w3g64, include: ["*.mlp.*"]}
      - rtn: {scheme: w4g64, include: ["*.self_attn.*"]}
"""
PIPELINE = f"""\
calibration: {{source: calibration.txt, samples: 4, length: 32}}
evaluate: {{source: calibration.txt, samples: 2, length: 32}}
{PASSES}"""
BLOCKS = 3


def test_a_changed_later_pass_keeps_the_work_before_it(tmp_path: Path) -> None:
    _, killed = prepare(tmp_path, PIPELINE, num_hidden_layers=BLOCKS)
    assert run(killed, "model", kill_after=BLOCKS + 3) == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in (killed / "out.work").glob("s00-*")}
    assert len(before) == BLOCKS
    (killed / "pipeline.yaml").write_text(PIPELINE.replace("w3g64", "w2g64"))
    assert run(killed, "model", kill_after=2) == -signal.SIGKILL
    assert {p.name: p.stat().st_mtime_ns for p in (killed / "out.work").glob("s00-*")} == before


def test_a_damaged_or_foreign_unit_is_done_again(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, PIPELINE, num_hidden_layers=BLOCKS)
    assert run(whole, "model") == 0
    assert run(killed, "model", kill_after=BLOCKS + 1) == -signal.SIGKILL
    units = sorted((killed / "out.work").glob("s00-*.safetensors"))
    assert len(units) == BLOCKS
    units[0].write_bytes(units[0].read_bytes()[:100])
    units[1].write_bytes(units[2].read_bytes())
    data = bytearray(units[2].read_bytes())
    data[-1] ^= 1  # one bit of a stored tensor: only its seal tells
    units[2].write_bytes(data)
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


SURVEYING = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - wanda: {sparsity: 0.6, allocate: owl}
  - rtn: {scheme: w3g32}
  - eora: {rank: null, budget: 0.25}
"""


@FILES
def test_killed_between_files_of_passes_that_survey_their_layers_the_run_ends_bit_identical(
    files: int, tmp_path: Path
) -> None:
    whole, killed = prepare(tmp_path, SURVEYING)
    done = killed_again_and_again(whole, killed, files)
    assert {f"s{stage}-survey-b000{block}.json" for stage in ("00", "02") for block in (0, 1)} < done
    layers = report_of(whole)["layers"]
    assert 0 < sum("eora" in notes for notes in layers.values()) < len(layers), "the budget decides nothing"


EXPERTS = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - blockwise:
      - wanda: {sparsity: 0.5}
      - gptq: {scheme: w4g16}
  - eora: {rank: 2, exclude: ["*.experts.down_proj.1"]}
"""


def test_a_mixture_of_experts_killed_again_and_again_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, EXPERTS)
    make_mixture("Qwen3Moe", vocab_size=4096).save_pretrained(tmp_path / "model")
    assert run(whole, "model") == 0
    assert any("tokens, fewer than 16" in text for text in json.dumps(report_of(whole)["layers"]).split('"'))
    for _ in range(2):
        assert run(killed, "model", kill_after=2) == -signal.SIGKILL
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found
