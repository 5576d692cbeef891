"""What is left of a run when the power fails: a disk image is copied while a run writes to it, and mounted again."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import PROCESSES, child, contents, prepare, run

from compress.io import manifest

MEGABYTES = 64
PIPELINE = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
passes:
  - wanda: {sparsity: "2:4"}
  - gptq: {scheme: w4g32}
export: [hf]
"""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a disk image"),
    pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is not installed"),
]


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """A disk image as a folder."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop,commit=1", image, at], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk image cannot be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def test_after_a_power_cut_a_result_is_whole_or_not_there_and_the_same_command_ends_the_same(tmp_path: Path) -> None:
    whole, _ = prepare(tmp_path, PIPELINE)
    assert run(whole, "model") == 0
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    cuts: list[Path] = []
    with mounted(image, tmp_path / "mounted") as disk:
        shutil.copytree(whole, disk / "run", symlinks=True, ignore=shutil.ignore_patterns("out"))
        os.sync()
        process = PROCESSES.Process(target=child, args=(disk / "run", "model", 0))
        process.start()
        alive = True
        while alive:  # and once more right after its end, before the system has written anything by itself
            alive = process.is_alive()
            cuts.append(tmp_path / f"cut-{len(cuts)}")
            shutil.copyfile(image, cuts[-1])
            time.sleep(0.02)
        process.join()
        assert process.exitcode == 0
    finished = 0
    for cut in cuts[-12:]:
        with mounted(cut, tmp_path / "mounted") as disk:
            folder = disk / "run"
            if (folder / "out").exists():
                finished += 1
                assert manifest.verify_folder(folder / "out", everything=True) is not None
            assert run(folder, "model") == 0
            assert contents(folder / "out") == contents(whole / "out")
    assert finished, "the run ended, and nothing was written"
