"""A killed run continues and ends bit-identical: real processes, really killed."""

import json
import signal
import time
from pathlib import Path

import pytest
from children import contents, prepare, run, start, unfinished

PIPELINE = """\
calibration: {source: demo, samples: 4, length: 64}
evaluate: {source: demo, samples: 2, length: 64}
passes:
  - wanda: {sparsity: "2:4"}
  - blockwise:
      - gptq: {scheme: w3g64, include: ["*.mlp.*"]}
      - rtn: {scheme: w4g64, include: ["*.self_attn.*"]}
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    assert run(folder) == 0
    return contents(folder / "out")


def test_killed_after_every_file_it_finishes_the_run_ends_bit_identical(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    kills = 0
    while True:
        if run(tmp_path, kill_after=1 if kills < 3 else 5) == 0:  # every file at first, then several at a time
            break
        assert not (tmp_path / "out").exists(), "a half result looks finished"
        kills += 1
        assert kills < 30, "no progress from kill to kill"
    assert kills >= 6
    assert contents(tmp_path / "out") == uninterrupted
    assert not (tmp_path / "out.work").exists()


def test_killed_during_the_final_write_the_run_ends_bit_identical(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    partial = tmp_path / "out.work" / "out"
    process = start(tmp_path)
    while process.is_alive() and not partial.exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    if (tmp_path / "out").exists():
        pytest.skip("the write was over before the kill")
    assert run(tmp_path) == 0
    assert contents(tmp_path / "out") == uninterrupted


def test_a_changed_later_pass_keeps_the_work_before_it(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    assert run(tmp_path, kill_after=9) == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.work").glob("s00-*")}
    assert len(before) == 6
    (tmp_path / "pipeline.yaml").write_text(PIPELINE.replace("w3g64", "w2g64"))
    assert run(tmp_path, kill_after=3) == -signal.SIGKILL
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.work").glob("s00-*")} == before


def test_a_damaged_or_foreign_unit_is_done_again(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    assert run(tmp_path, kill_after=5) == -signal.SIGKILL
    units = sorted((tmp_path / "out.work").glob("s00-*.safetensors"))
    units[0].write_bytes(units[0].read_bytes()[:100])
    units[1].write_bytes(units[2].read_bytes())
    assert run(tmp_path) == 0
    assert contents(tmp_path / "out") == uninterrupted


SURVEYING = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - wanda: {sparsity: 0.6, allocate: owl}
  - rtn: {scheme: w3g32}
  - eora: {rank: null, budget: 0.25}
"""


def test_killed_after_every_file_of_passes_that_survey_their_layers_the_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, SURVEYING)
    assert run(whole, "model") == 0
    layers = json.loads((whole / "out" / "report.json").read_text())["layers"]
    assert 0 < sum("eora" in notes for notes in layers.values()) < len(layers), "the budget decides nothing"
    done: dict[str, int] = {}
    while True:
        assert run(killed, "model", kill_after=1) == -signal.SIGKILL
        assert not (killed / "out").exists()
        found = unfinished(killed)
        assert found.items() >= done.items(), "what was finished is done again"
        (new,) = found.keys() - done.keys()
        if new == "out":  # the final write, which begins anew every time
            break
        done = found
    assert {f"s{stage}-survey-b000{block}.json" for stage in ("00", "02") for block in (0, 1)} < done.keys()
    assert run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")
