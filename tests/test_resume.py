"""A killed run continues and ends bit-identical: real processes, really killed, on the demo model."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

PIPELINE = """\
calibration: {source: demo, samples: 4, length: 64}
evaluate: {source: demo, samples: 2, length: 64}
passes:
  - wanda: {sparsity: "2:4"}
  - blockwise:
      - gptq: {scheme: w3g64, include: ["*.mlp.*"]}
      - rtn: {scheme: w4g64, include: ["*.self_attn.*"]}
"""
# Children are forked from a server that has the imports done: real processes, quick to start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["compress.cli", "compress.api", "transformers.models.llama.modeling_llama"])


def child(folder: Path, kill_after: int) -> None:
    """The command line, which kills itself right after the n-th file has got its final name."""
    import torch

    from compress import api, cli, ledger

    torch.set_num_threads(1)
    os.chdir(folder)
    publish, left = ledger.publish, kill_after

    def counted(temporary: Path, name: Path) -> None:
        nonlocal left
        publish(temporary, name)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger.publish = api.publish = counted
    sys.argv = ["compress", "run", "pipeline.yaml", "demo", "-o", "out"]
    cli.main()


def start(folder: Path, kill_after: int = 0) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=child, args=(folder, kill_after))
    process.start()
    return process


def run(folder: Path, kill_after: int = 0) -> int | None:
    """Exit code of a run that kills itself after so many finished files, or of a whole one."""
    process = start(folder, kill_after)
    process.join(200)
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL)
    return code


def contents(folder: Path) -> dict[str, str]:
    """Every file of a finished folder; of the report only what does not measure time or memory."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(data)
            for row in report["rows"]:
                del row["seconds"], row["peak_mb"]
            for layer in report["layers"].values():
                for notes in layer.values():
                    del notes["seconds"]
            data = json.dumps(report).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


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
