"""Stopped before any change on the disk, by any signal, a command leaves the old or the new whole, and goes on."""

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import contents, end_command, start_command
from commands import files_of, make_changed, make_text_model, write_pipeline, write_text
from selection import only

import compress

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DATA = "{source: words.txt, samples: 2, length: 16}"
PIPELINES = {
    "old": "passes: [{rtn: {scheme: w8g32}}]\n",
    "quantize": f"calibration: {DATA}\nevaluate: {DATA}\nexport: [hf]\n"
    "passes: [gptq: {scheme: w4g32, rounds: 1, propagation: 0.5}]\n",
    "merge": "passes: [{compeft: {models: [tuned], density: 0.2}}, {average: {models: [tuned]}}, rtn: {bits: 4}]\n",
}


@dataclass(frozen=True)
class Scenario:
    """A command in a folder of its own, the same command's end, and how many changes it makes on the disk."""

    command: list[str]
    before: Path
    after: Path
    changes: int


COMMANDS = {
    "run": ["run", "quantize.yaml", "model", "-o", "fresh"],
    "merge": ["run", "merge.yaml", "model", "-o", "fresh"],
    "overwrite": ["run", "quantize.yaml", "model", "-o", "out", "--overwrite"],
    "export": ["export", "out", "--to", "hf"],
    "apply-delta": ["apply-delta", "model", "made/delta", "-o", "applied", "--overwrite"],
}


def output(command: list[str]) -> str:
    """The folder that a command writes."""
    return command[command.index("-o") + 1] if "-o" in command else command[1]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    base = tmp_path_factory.mktemp("kills")
    before = base / "before"
    before.mkdir()
    make_text_model(before / "model", hidden_size=32, intermediate_size=64, num_key_value_heads=4)
    make_changed(before / "tuned", before / "model", 1, size=1e-2)
    write_text(before / "words.txt", words=300)
    (before / "notes.txt").write_text("of the user")
    for name, text in PIPELINES.items():
        write_pipeline(before / f"{name}.yaml", text)
    delta = {"passes": [{"compeft": {"models": [str(before / "tuned")]}}]}
    compress.run(delta, before / "model", before / "made")
    compress.run(before / "old.yaml", before / "model", before / "out")
    compress.apply_delta(before / "model", before / "made" / "delta", before / "applied")
    found = {}
    for name, command in COMMANDS.items():
        after = Path(shutil.copytree(before, base / name))
        code = end_command(start_command(after, command))
        said = (after / "stderr.txt").read_text()
        assert code == 0, said
        found[name] = Scenario(command, before, after, int(said.rpartition("changes: ")[2]))
    return found


def kills(count: int) -> Iterator[tuple[str, int, float]]:
    """Scenario, signal, and when, as a share of all changes."""
    draws = random.Random(count)
    for number in range(count):
        # Every second one among the last changes, where results take their names.
        when = draws.random() if number % 2 else 1 - 0.3 * draws.random()
        yield list(COMMANDS)[number % len(COMMANDS)], draws.choice(SIGNALS), when


def assert_old_or_new(folder: Path, scenario: Scenario) -> None:
    """What has the name of a result is whole; an earlier one is there, perhaps set aside."""
    name = output(scenario.command)
    if (folder / name).exists():
        compress.verify(folder / name)
    elif (scenario.before / name).exists():
        (aside,) = folder.glob(f"{name}.old-*")
        assert files_of(aside) == files_of(scenario.before / name)


def stop_and_go_on(scenario: Scenario, folder: Path, sign: int, when: float) -> None:
    """Stop a command, look at what is there, and give it again."""
    shutil.copytree(scenario.before, folder)
    stop_at = max(1, round(when * scenario.changes))
    code = end_command(start_command(folder, scenario.command, stop_at, sign))
    said = (folder / "stderr.txt").read_text()
    assert code in ((-sign,) if sign == signal.SIGKILL else (0, 130, 143)), said
    assert "Traceback" not in said
    assert_old_or_new(folder, scenario)
    assert end_command(start_command(folder, scenario.command)) == 0, (folder / "stderr.txt").read_text()
    meant, found = contents(scenario.after), contents(folder)
    del meant["stderr.txt"], found["stderr.txt"]
    assert found == meant, f"{scenario.command} stopped at change {stop_at} by {sign}"


def test_stopped_anywhere_the_old_or_the_new_is_whole_and_the_same_command_ends_the_same(
    scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for number, (name, sign, when) in enumerate(kills(8)):
        stop_and_go_on(scenarios[name], tmp_path / str(number), sign, when)


@pytest.mark.real
def test_stopped_at_a_hundred_places(scenarios: dict[str, Scenario], tmp_path: Path) -> None:
    for number, (name, sign, when) in enumerate(kills(100)):
        stop_and_go_on(scenarios[name], tmp_path / str(number), sign, when)
        shutil.rmtree(tmp_path / str(number))


# --- two at once ------------------------------------------------------------------------------------------------------


def wait_until_stopped(pid: int) -> None:
    """Wait for a process that sends itself SIGSTOP."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at in /proc")
@pytest.mark.parametrize("name", only(["run"], ["run", "export", "apply-delta"]))
def test_a_second_process_is_refused_by_the_number_of_the_first(
    name: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    scenario, folder = scenarios[name], tmp_path / "here"
    shutil.copytree(scenario.before, folder)
    first = start_command(folder, scenario.command, scenario.changes // 2, signal.SIGSTOP)
    assert first.pid is not None
    wait_until_stopped(first.pid)
    before = files_of(folder)
    others = [scenario.command, ["run", "old.yaml", "model", "-o", output(scenario.command), "--overwrite"]]
    for command in others:
        shutil.copy(folder / "stderr.txt", folder.with_name("first.txt"))
        second = start_command(folder, command)
        assert end_command(second) == 2
        said = (folder / "stderr.txt").read_text()
        assert f"{output(command)}.work is in use by pid {first.pid} on host " in said
        assert {k: v for k, v in files_of(folder).items() if k != "stderr.txt"} == {
            k: v for k, v in before.items() if k != "stderr.txt"
        }
    first.kill()
    assert end_command(first) == -signal.SIGKILL
    assert end_command(start_command(folder, scenario.command)) == 0
    assert f"was left by pid {first_pid(said)} on host " in (folder / "stderr.txt").read_text()
    compress.verify(folder / output(scenario.command))


def first_pid(said: str) -> str:
    return said.partition("in use by pid ")[2].split()[0]


def test_of_two_that_start_together_one_wins_and_the_result_is_its_own(
    scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(scenarios["run"].before, tmp_path / "here"))
    pipelines = ["quantize.yaml", "old.yaml"]
    both = [start_command(folder, ["run", name, "model", "-o", "both"]) for name in pipelines]
    codes = [end_command(process) for process in both]
    assert sorted(code for code in codes if code is not None) == [0, 2]
    compress.verify(folder / "both")
    assert ("hf" in {p.name for p in (folder / "both").iterdir()}) == (codes[0] == 0)
    assert not (folder / "both.work").exists()
