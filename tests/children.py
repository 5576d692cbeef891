"""The command line in processes of its own, which can be killed, and what its finished folders hold."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import make_text_model, write_text

# Children are forked from a server that has the imports done: real processes, quick to start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["warm", "compress.cli.commands", "compress.api.run", "compress.api.export", "compress.api.apply_delta",
     "compress.report.run_table", "transformers.models.llama.modeling_llama"]
)  # fmt: skip


def prepare(folder: Path, pipeline: str, **changes: object) -> tuple[Path, Path]:
    """Two folders to run the same in, one of them uninterrupted: a pipeline, calibration.txt and a tiny `model`."""
    model = make_text_model(folder / "model", **changes)
    text = write_text(folder / "calibration.txt").read_text()
    for name in ("whole", "killed"):
        (folder / name).mkdir()
        (folder / name / "model").symlink_to(model)  # not a copy: a run is known by its source's modification time too
        (folder / name / "calibration.txt").write_text(text)
        (folder / name / "pipeline.yaml").write_text(pipeline)
    return folder / "whole", folder / "killed"


def child(folder: Path, model: str, kill_after: int) -> None:
    """The command line, which kills itself right after the n-th file has got its final name."""
    import torch

    from compress import cli
    from compress.api import cards
    from compress.api import run as api
    from compress.engine import ledger

    torch.set_num_threads(1)
    os.chdir(folder)
    left = kill_after

    def counted(finish: Callable[..., None]) -> Callable[..., None]:
        def finish_and_count(*arguments: object) -> None:
            nonlocal left
            finish(*arguments)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return finish_and_count

    ledger.publish = counted(ledger.publish)
    ledger.write_text = api.write_text = cards.write_text = counted(ledger.write_text)
    sys.argv = ["compress", "run", "pipeline.yaml", model, "-o", "out"]
    cli.main()


def start(folder: Path, model: str = "demo", kill_after: int = 0) -> multiprocessing.process.BaseProcess:
    """`compress run pipeline.yaml MODEL -o out` in a folder."""
    process = PROCESSES.Process(target=child, args=(folder, model, kill_after))
    with pytest.MonkeyPatch.context() as patched:  # the server looks for `warm` where Python looks by itself only
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


def run(folder: Path, model: str = "demo", kill_after: int = 0) -> int | None:
    """Exit code of a run that kills itself after so many finished files, or of a whole one."""
    process = start(folder, model, kill_after)
    process.join(200)
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL)
    return code


def unfinished(folder: Path) -> dict[str, int]:
    """What `out.work` holds and when it was written; what every run writes anew is left out."""
    anew = ("log.txt", "lock.json", "dependencies.json")
    found = (path for path in (folder / "out.work").iterdir() if path.name not in anew)
    return {path.name: path.stat().st_mtime_ns for path in found}


FILES = pytest.mark.parametrize("files", [3, pytest.param(1, marks=pytest.mark.real)])


def killed_again_and_again(whole: Path, killed: Path, files: int) -> set[str]:
    """Run in two folders, in one killed whenever so many files are finished; both end alike, nothing made twice.

    Returns:
        Names of what was finished before the final write, which begins anew every time.
    """
    assert run(whole, "model") == 0
    done: dict[str, int] = {}
    while run(killed, "model", kill_after=files) == -signal.SIGKILL:
        assert not (killed / "out").exists()
        found = unfinished(killed)
        assert found.items() >= done.items(), "what was finished is done again"
        new = found.keys() - done.keys()
        assert files > 1 or len(new) == 1
        done = {name: at for name, at in found.items() if name != "out"}
        if "out" in new:
            assert run(killed, "model") == 0
            break
    assert contents(killed / "out") == contents(whole / "out")
    return set(done)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a finished folder; of the report, and its digest, only what does not measure time or memory."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "report.json":
            report = json.loads(data)
            for row in report["rows"]:
                del row["seconds"], row["peak_mb"]
            for layer in report["layers"].values():
                for notes in layer.values():
                    notes.pop("seconds", None)  # what trains the whole model has none
            data = json.dumps(report).encode()
        if path.name == "manifest.json":
            manifest = json.loads(data)
            del manifest["sha256"]
            manifest["files"].pop("report.json", None)
            data = json.dumps(manifest).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


# --- stopped anywhere -------------------------------------------------------------------------------------------------

CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


def count_changes(at_change: Callable[[int], None]) -> None:
    """Call back before every change to a file or folder of this process: its number, from 1."""
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened and not str(arguments[0]).startswith("/dev/")) or event in CHANGING:
            number += 1
            at_change(number)

    sys.addaudithook(hook)


def enter(folder: Path) -> int:
    """Work in a folder and say everything into its stderr.txt, which is given back."""
    os.chdir(folder)
    said = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    os.dup2(said, 1)
    return said


def interrupted_child(folder: Path, arguments: list[str], sign: int) -> None:
    """A command, which is sent a signal when its first block is kept."""
    import torch

    from compress import cli
    from compress.engine import ledger

    torch.set_num_threads(1)
    enter(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commit = ledger.FolderLedger.commit

    def commit_and_be_interrupted(*arguments: Any) -> Any:
        done = commit(*arguments)
        os.kill(os.getpid(), sign)
        return done

    ledger.FolderLedger.commit = commit_and_be_interrupted  # type: ignore[method-assign, assignment]
    sys.argv = ["compress", *arguments]
    cli.main()


def command_child(folder: Path, arguments: list[str], stop_at: int, sign: int) -> None:
    """A command, which sends itself a signal before its n-th change on the disk, and notes how many there were."""
    import torch

    from compress import cli

    torch.set_num_threads(1)
    said = enter(folder)
    last = 0

    def at_change(number: int) -> None:
        nonlocal last
        last = number
        if number == stop_at:
            os.kill(os.getpid(), sign)

    count_changes(at_change)
    sys.argv = ["compress", *arguments]
    try:
        cli.main()
    finally:
        os.write(said, f"\nchanges: {last}\n".encode())


def start_command(
    folder: Path, arguments: list[str], stop_at: int = 0, sign: int = signal.SIGKILL
) -> multiprocessing.process.BaseProcess:
    """`compress ARGUMENTS` in a folder, all that it says in stderr.txt."""
    process = PROCESSES.Process(target=command_child, args=(folder, arguments, stop_at, sign))
    process.start()
    return process


def end_command(process: multiprocessing.process.BaseProcess) -> int | None:
    """The exit code of a command, once it has ended."""
    process.join(100)
    code = process.exitcode
    process.close()
    return code
