"""What a run says while it works: lines with time left, rows as they come, where it goes on, and how it ends early."""

import io
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import prepare, run, unfinished
from commands import PIPELINE, compress_command, make_text_model, write_pipeline, write_text
from rich.console import Console
from selection import only

from compress import logs, progress
from compress.config import measured
from compress.engine.resume import Resume
from compress.progress import Bars, duration
from compress.report import layers
from compress.report.report import Report, Row
from compress.report.run_table import RunTable


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(progress, "time", made)
    return made


def go(bars: Bars, clock: Time, seconds: list[float], label: str, lines: progress.Lines | None = None) -> None:
    for took in bars.over(seconds, len(seconds), label, lines):
        clock.now += took


# --- lines ------------------------------------------------------------------------------------------------------------


def test_every_block_is_a_line_with_the_time_it_took_and_the_time_left(
    clock: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "compress"):
        go(Bars(), clock, [10, 20, 30], "gptq: block", "each")
    assert caplog.messages == [
        "gptq: block 1 of 3, 10 s, 20 s left",
        "gptq: block 2 of 3, 30 s, 15 s left",
        "gptq: block 3 of 3, 1 min 0 s",
    ]


def test_blocks_that_were_found_done_do_not_make_the_time_left_look_short(
    clock: Time, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "compress"):
        go(Bars(), clock, [0.1, 0.1, 20, 20, 20, 20], "gptq: block", "each")
    assert caplog.messages[2] == "gptq: block 3 of 6, 20 s, 1 min 0 s left"
    assert caplog.messages[3] == "gptq: block 4 of 6, 40 s, 40 s left"


def test_batches_are_one_line_when_all_are_done_or_none(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    bars = Bars()
    with caplog.at_level(logging.INFO, "compress"):
        go(bars, clock, [1] * 8, "evaluate: batches", "end")
        go(bars, clock, [1] * 8, "collect: batches")
    assert caplog.messages == ["evaluate: batches 8 of 8, 8 s"]


def test_a_long_loop_breaks_its_silence_every_half_minute(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "compress"):
        go(Bars(), clock, [5] * 16, "train: steps, loss 2.5")
    assert caplog.messages == [
        "train: steps 7 of 16, loss 2.5, 35 s, 45 s left",
        "train: steps 14 of 16, loss 2.5, 1 min 10 s, 10 s left",
    ]


def test_how_many_there_are_may_be_unknown(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "compress"):
        assert list(Bars().over(iter("ab"), None, "read: texts", "end")) == ["a", "b"]
    assert caplog.messages == ["read: texts 2, 0 s"]


def test_durations_are_written_for_people() -> None:
    assert [duration(s) for s in (0.4, 59.4, 125, 12000)] == ["0 s", "59 s", "2 min 5 s", "3 h 20 min"]


# --- the log file -----------------------------------------------------------------------------------------------------


def test_the_log_file_has_everything_and_elsewhere_no_more_is_said_than_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("compress.anything")
    for level, wanted in ((logging.WARNING, ["loud"]), (logging.INFO, ["plain", "loud"])):
        caplog.clear()
        with caplog.at_level(level, "compress"), logs.kept_in(tmp_path / "log.txt"):
            for each, text in ((logging.DEBUG, "detail"), (logging.INFO, "plain"), (logging.WARNING, "loud")):
                logger.log(each, text)
        assert caplog.messages == wanted
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["DEBUG detail", "INFO plain", "WARNING loud"] * 2
    assert not logs.LOGGER.handlers
    assert logs.LOGGER.propagate


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and a pipeline, to be read only."""
    folder = tmp_path_factory.mktemp("here")
    make_text_model(folder / "model")
    text = write_text(folder / "words.txt")
    entry = "magnitude: {sparsity: 0.5}\n  - gptq: {scheme: w2g32}"
    write_pipeline(folder / "p.yaml", PIPELINE.format(text=text, entry=entry))
    return folder


def test_verbose_says_more_and_quiet_says_nothing(here: Path, tmp_path: Path) -> None:
    arguments = ["run", here / "p.yaml", here / "model", "-o"]
    said = [
        compress_command(*arguments, tmp_path / name, *more, level=logging.INFO).err
        for name, more in (("plain", []), ("verbose", ["-v"]), ("quiet", ["-q"]))
    ]
    assert "gptq: block 2 of 2, " in said[0]
    assert "collect: batches" not in said[0]
    plain, verbose = ({line.split(",")[0] for line in text.splitlines()} for text in said[:2])
    assert plain < verbose
    assert "collect: batches 1 of 1, " in said[1]
    assert said[2] == ""


def test_eval_says_how_far_it_is(here: Path) -> None:
    data = ["--source", here / "words.txt", "--samples", 2, "--length", 32]
    arguments = ["eval", here / "model", *data]
    assert compress_command(*arguments, level=logging.INFO).err.startswith("evaluate: batches 1 of 1, ")
    assert compress_command(*arguments, "-q", level=logging.INFO).err == ""


# --- resuming ---------------------------------------------------------------------------------------------------------

TWO_PASSES = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - wanda: {sparsity: "2:4"}
  - gptq: {scheme: w3g32}
"""


@pytest.mark.parametrize(
    ("kill_after", "said"),
    [
        (2, "original measured, wanda block 0 of 2 done, going on with wanda block 1"),
        (3, "original measured, wanda blocks 0 to 1 of 2 done, going on with measuring after wanda"),
        (5, "original measured, wanda done, gptq block 0 of 2 done, going on with gptq block 1"),
        (7, "original measured, wanda done, gptq done, going on with writing the result"),
    ],
)
def test_a_run_that_goes_on_says_what_is_done_and_where_it_goes_on(kill_after: int, said: str, tmp_path: Path) -> None:
    _, killed = prepare(tmp_path, TWO_PASSES)
    assert run(killed, "model", kill_after=kill_after) == -signal.SIGKILL
    assert len(unfinished(killed)) >= kill_after
    log = killed / "out.work" / "log.txt"
    assert "resuming" not in log.read_text()
    before = len(log.read_text())
    assert run(killed, "model", kill_after=1) == -signal.SIGKILL
    resumed = [line for line in log.read_text()[before:].splitlines() if "resuming" in line]
    assert [line.partition("resuming: ")[2] for line in resumed] == [said]


def test_what_is_done_is_said_of_surveys_single_layers_and_other_steps_too() -> None:
    def said(stages: list[str], *units: str, missing: str) -> str:
        resume = Resume(stages, 12)
        for unit in units:
            resume.loaded(unit, True)
        return resume.text(resume.place(missing))

    assert said(["gptq"], *(f"s00-b{i:04d}" for i in range(8)), missing="s00-b0008") == (
        "gptq blocks 0 to 7 of 12 done, going on with gptq block 8"
    )
    assert said(["wanda"], "original", "s00-survey-b0000", missing="s00-survey-b0001") == (
        "original measured, wanda survey of block 0 of 12 done, going on with wanda survey of block 1"
    )
    assert said(["ties", "perp"], "original", "s00-parent-0", "s00", "s01-00000", "s01-00001", missing="s01-00002") == (
        "original measured, ties done, 2 layers of perp done, going on with perp"
    )
    assert said(["ties"], "original", "s00-try-000", missing="s00-try-001") == (
        "original measured, 1 step of ties done, going on with ties"
    )


# --- ending early -----------------------------------------------------------------------------------------------------

BROKEN = """
import signal, sys
from compress import cli
import importlib.abc

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            signal.raise_signal(signal.{name})
        return None

sys.meta_path.insert(0, Finder())
cli.main()
"""


@pytest.mark.parametrize(("name", "code"), only([("SIGINT", 130)], [("SIGINT", 130), ("SIGTERM", 143)]))
def test_an_interrupt_during_the_imports_ends_with_one_line(name: str, code: int, here: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN.format(name=name), "run", here / "p.yaml", here / "model", "-o", tmp_path / "o"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("run the same command again\n")
    assert ended.stdout == ""


def test_an_unexpected_exception_is_one_sentence_and_its_traceback_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows() -> None:
        raise KeyError("x\ny")

    monkeypatch.setattr(measured, "rows", rows)
    ended = compress_command("list", unexpected=True)
    assert (ended.code, ended.out) == (70, "")
    assert ended.err.startswith("error: unexpected KeyError: 'x\\ny'; ")
    assert "`compress -v COMMAND` shows the traceback" in ended.err
    ended = compress_command("-v", "list", unexpected=True)
    assert ended.code == 70
    assert "Traceback (most recent call last)" in ended.err
    assert "the traceback is above" in ended.err


# --- names with brackets ----------------------------------------------------------------------------------------------


def test_brackets_in_names_are_printed_as_they_are(here: Path, tmp_path: Path) -> None:
    (tmp_path / "[" / "x]").parent.mkdir()
    model, out = tmp_path / "[" / "x]", tmp_path / "[red]out"
    model.symlink_to(here / "model")
    ended = compress_command("run", here / "p.yaml", model, "-o", out)
    assert ended.code == 0, ended.err
    assert str(model) in ended.out
    assert f"{out}: " in ended.out
    assert compress_command("inspect", out).code == 0


def test_markup_in_the_names_of_rows_layers_and_bars_is_not_interpreted() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160)
    table = RunTable(console, "[/x]")
    facts = dict.fromkeys(("accuracy", "change", "kl", "negative_flips")) | {"perplexity": 2.0}
    table.add(Row("[/y]", 25.4, None, None, 10**7, 3.25, 0.7, 12.3, 512.0, sources={"[/z]": facts}))
    table.finish(Report("[/x]"))
    for name in ("[/x]", "[/y]", "[/z]"):
        assert name in out.getvalue()
    row = layers.Layer("[/l]", [2, 2], None, None, None, 0.0, 8, None, None, None, 16.0, [], {"[/p]": 0.5}, [])
    console.print(layers.table([row]))
    assert "[/l]" in out.getvalue()
    assert "[/p] 0.5000" in out.getvalue()
