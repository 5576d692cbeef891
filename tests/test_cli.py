"""The commands: results on stdout and nothing else there, JSON for machines, and a finished run is finished."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import PIPELINE, compress_command, files_of, make_text_model, write_pipeline, write_text
from rich.console import Console
from selection import only
from torch import Tensor

import compress
from compress import cli
from compress.cli import commands
from compress.config import schema
from compress.engine import manager
from compress.errors import UsageError
from compress.io import lock
from compress.passes import PASSES
from compress.report import bars as draw
from compress.report import report
from compress.report.run_table import RunTable

SHIPPED = sorted((Path(__file__).parent.parent / "compress" / "config" / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a pipeline and its result, to be read only."""
    folder = tmp_path_factory.mktemp("here")
    make_text_model(folder / "model")
    write_text(folder / "words.txt")
    entry = "wanda: {sparsity: 2:4, include: ['*.mlp.*']}\n  - gptq: {scheme: w4g32}"
    write_pipeline(folder / "p.yaml", PIPELINE.format(text=folder / "words.txt", entry=entry))
    ended = compress_command("run", folder / "p.yaml", folder / "model", "-o", folder / "out")
    assert ended.code == 0, ended.err
    (folder / "shown.txt").write_text(ended.out)
    return folder


@pytest.fixture
def rtn(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "rtn.yaml", "passes: [{rtn: {scheme: w4g32}}]")


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_prints_one_row_for_the_original_and_one_for_every_pass(here: Path) -> None:
    shown = (here / "shown.txt").read_text()
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == ["original", "wanda", "gptq"]
    assert "2 windows of 32" in shown
    assert f"{here / 'out'}: " in shown
    assert "read back equal" in shown


def test_run_writes_a_folder_with_everything_that_is_needed(here: Path) -> None:
    assert {f.name for f in (here / "out").iterdir()} == {
        "README.md", "compress.safetensors", "config.json", "generation_config.json", "manifest.json", "pipeline.yaml",
        "report.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not (here / "out.work").exists()


def test_run_prints_the_report_as_json_where_it_is_asked_to(here: Path) -> None:
    ended = compress_command("run", here / "p.yaml", here / "model", "-o", here / "out", "--json")
    assert ended.code == 0
    assert json.loads(ended.out) == json.loads((here / "out" / "report.json").read_text())


def test_the_real_command_keeps_stdout_for_results_and_draws_no_bar_where_stderr_is_no_terminal(
    here: Path, tmp_path: Path
) -> None:
    command: list[str | Path] = [Path(sys.executable).with_name("compress"), "run", here / "p.yaml", here / "model"]
    ended = subprocess.run([*command, "-o", tmp_path / "out", "--json"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["rows"][2]["name"] == "gptq"
    written, expected = files_of(tmp_path / "out"), files_of(here / "out")
    assert written["compress.safetensors"] == expected["compress.safetensors"]
    assert ended.stderr.isascii()
    assert "\x1b" not in ended.stderr
    assert "\r" not in ended.stderr
    lines = ended.stderr.splitlines()
    assert [line.partition(", ")[0] for line in lines] == [
        "evaluate original: batches 1 of 1", "wanda: block 1 of 2", "wanda: block 2 of 2", "evaluate: batches 1 of 1",
        "pass 1 of 2", "gptq: block 1 of 2", "gptq: block 2 of 2", "evaluate: batches 1 of 1", "pass 2 of 2",
        "write: weights 21 of 21",
    ]  # fmt: skip
    assert re.fullmatch(r"gptq: block 1 of 2, \d+ s, \d+ s left", lines[5])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_stderr_where_it_is_a_terminal(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    err, out = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", out)
    arguments = ["run", str(here / "p.yaml"), str(here / "model"), "-o", str(tmp_path / "out"), "--json"]
    code = cli.guarded(lambda: commands.app(arguments, standalone_mode=False))
    assert code == 0
    assert json.loads(out.getvalue())["rows"]
    assert "gptq: block" in err.getvalue()
    assert "gptq: block 1 of 2," not in err.getvalue(), "lines that stand for bars beside them"


def test_an_error_goes_to_stderr_and_nothing_to_stdout(here: Path, tmp_path: Path) -> None:
    ended = compress_command("run", tmp_path / "gone.yaml", here / "model", "-o", tmp_path / "out", "--json")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1


def test_fresh_starts_over(here: Path, tmp_path: Path, rtn: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"
    leave_work(work, "s00-b0000.safetensors", b"old")
    assert compress_command("run", rtn, here / "model", "-o", out, "--fresh").code == 0
    assert not work.exists()


def test_damaged_unfinished_work_is_done_again(here: Path, tmp_path: Path, rtn: Path) -> None:
    assert compress_command("run", rtn, here / "model", "-o", tmp_path / "one").code == 0
    work = tmp_path / "two.work"
    leave_work(work, "s00-b0000.safetensors", b"old")
    leave_work(work, "original.json", b"{")
    assert compress_command("run", rtn, here / "model", "-o", tmp_path / "two").code == 0
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one["compress.safetensors"] == two["compress.safetensors"]


def leave_work(work: Path, name: str, data: bytes) -> None:
    """A file as an interrupted run leaves it."""
    with lock.held(work):
        (work / name).write_bytes(data)


def draw_table(found: report.Report, console: Console) -> None:
    table = RunTable(console, found.model, [row.name for row in found.rows])
    for row in found.rows:
        table.add(row)
    table.finish(found)


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_on_a_terminal_of_any_width_no_number_and_no_heading_is_cut_off(width: int, here: Path) -> None:
    data = json.loads((here / "out" / "report.json").read_text())
    found = report.Report(rows=[report.Row(**row) for row in data.pop("rows")], **data)
    out = io.StringIO()
    draw_table(found, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    # Every table repeats the names in its first column; the others together are the whole row.
    shown = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    assert (len(shown) == 1 + len(found.rows)) == (width == 200)
    for row, wanted in enumerate([report.headings(found), *map(report.cells, found.rows)]):
        parts = shown[row :: 1 + len(found.rows)]
        assert [parts[0][0], *(cell for part in parts for cell in part[1:])] == list(wanted)


def test_a_name_too_long_for_the_terminal_is_folded_and_numbers_stay_whole() -> None:
    row = report.Row("global_magnitude + " * 5, 25.4321, 0.5, 0.1234, 10**7, 3.25, 0.7, 12.3, 512.0)
    out = io.StringIO()
    draw_table(report.Report("model", [row]), Console(file=out, width=50))
    assert max(map(len, out.getvalue().splitlines())) <= 50
    for number in report.cells(row)[1:]:
        assert number in out.getvalue()
    assert "…" not in out.getvalue()


# --- a finished run ---------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_done_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(*_: object) -> None:
        raise AssertionError("the run was done again")

    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (here / "out").iterdir()}
    monkeypatch.setattr(manager, "execute", execute)
    ended = compress_command("run", here / "p.yaml", here / "model", "-o", here / "out")
    assert ended.code == 0
    assert ended.out == (here / "shown.txt").read_text()
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in (here / "out").iterdir()} == before


def test_overwriting_a_finished_run_gives_the_same_bytes(here: Path, tmp_path: Path, rtn: Path) -> None:
    out = tmp_path / "out"
    assert compress_command("run", rtn, here / "model", "-o", out).code == 0
    before = files_of(out)
    assert compress_command("run", rtn, here / "model", "-o", out, "--overwrite").code == 0
    after = files_of(out)
    assert before.keys() == after.keys()
    assert {n for n in after if after[n] != before[n]} <= {"report.json", "manifest.json"}


def test_a_run_on_a_changed_model_is_another_run(tmp_path: Path, rtn: Path) -> None:
    model, out = make_text_model(tmp_path / "model"), tmp_path / "out"
    assert compress_command("run", rtn, model, "-o", out).code == 0
    make_text_model(model, initializer_range=0.2)
    assert compress_command("run", rtn, model, "-o", out).code == 2


def test_a_run_on_changed_calibration_text_is_another_run(here: Path, tmp_path: Path) -> None:
    text, out = write_text(tmp_path / "words.txt"), tmp_path / "out"
    pipeline = write_pipeline(tmp_path / "p.yaml", PIPELINE.format(text=text, entry="gptq"))
    assert compress_command("run", pipeline, here / "model", "-o", out).code == 0
    write_text(text, seed=1)
    assert compress_command("run", pipeline, here / "model", "-o", out).code == 2


def test_a_run_on_other_tokens_from_python_is_another_run(here: Path, tmp_path: Path, tokens: Tensor) -> None:
    out = tmp_path / "out"
    compress.run({"passes": ["gptq"]}, here / "model", out, calibration=tokens)
    compress.run({"passes": ["gptq"]}, here / "model", out, calibration=tokens.clone())
    with pytest.raises(UsageError, match="is not the result of this run"):
        compress.run({"passes": ["gptq"]}, here / "model", out, calibration=tokens.flip(0).add(1).clamp(max=255))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"verified": 3}', '{"verified": {}, "rows": 3}'])
def test_a_damaged_report_is_not_taken_for_a_finished_run(content: str, here: Path, tmp_path: Path, rtn: Path) -> None:
    out = tmp_path / "out"
    assert compress_command("run", rtn, here / "model", "-o", out).code == 0
    (out / "report.json").write_text(content)
    ended = compress_command("run", rtn, here / "model", "-o", out)
    assert ended.code == 2
    assert "--overwrite" in ended.err


@pytest.mark.parametrize("name", ["compress.safetensors", "config.json"])
def test_a_folder_that_lost_a_file_is_not_taken_for_a_finished_run(
    name: str, here: Path, tmp_path: Path, rtn: Path
) -> None:
    out = tmp_path / "out"
    assert compress_command("run", rtn, here / "model", "-o", out).code == 0
    (out / name).unlink()
    ended = compress_command("run", rtn, here / "model", "-o", out)
    assert ended.code == 2 or (out / name).is_file()


# --- check, plan ------------------------------------------------------------------------------------------------------


def test_check_says_that_a_pipeline_is_fine(here: Path) -> None:
    assert compress_command("check", here / "p.yaml").out == f"{here / 'p.yaml'}: fine\n"
    found = compress_command("check", here / "p.yaml", here / "model")
    assert (found.code, found.out, found.err) == (0, f"{here / 'p.yaml'}: fine for {here / 'model'}\n", "")


@pytest.mark.parametrize("file", only(SHIPPED[::8], SHIPPED), ids=lambda f: f.name)
def test_every_shipped_pipeline_is_fine_for_the_bundled_model(file: Path) -> None:
    ended = compress_command("check", file, "demo")
    assert ended.code == 0, ended.err


def test_plan_shows_what_every_pass_touches_and_what_the_run_needs(here: Path) -> None:
    ended = compress_command("plan", here / "p.yaml", here / "model")
    assert (ended.code, ended.err) == (0, "")
    assert "passes[0].wanda" in ended.out
    assert "passes[1].gptq" in ended.out
    assert "peak memory about" in ended.out


def test_plan_as_json_states_layers_weights_and_bits(here: Path) -> None:
    found = json.loads(compress_command("plan", here / "p.yaml", here / "model", "--json").out)
    wanda, gptq = found["passes"]
    mlp = 2 * 3 * 64 * 128
    assert (wanda["pass"], wanda["layers"], wanda["weights"]) == ("passes[0].wanda", 6, mlp)
    assert (gptq["pass"], gptq["layers"], gptq["weights"]) == ("passes[1].gptq", 14, 73728)
    pattern = (2 * 128 * 6 + 64 * 11) * 8 / (3 * 64 * 128)  # a byte for 12 columns: 6 per row of 64, 11 of 128
    assert wanda["bits_per_weight"] == round(pattern + 32 / 2, 3)
    # w4g32: 4 bits, and a 16-bit scale and a 4-bit zero point for 32; half of the mlp weights have the pattern instead.
    overhead = 20 / 32
    expected = (4 + overhead) * (73728 - mlp) + (pattern + 2 + overhead) * mlp
    assert gptq["bits_per_weight"] == pytest.approx(expected / 73728, rel=0.01)
    assert found["final_bytes"] < found["original_bytes"]
    assert found["peak_memory"] > 0
    assert found["disk"] >= found["final_bytes"]


def test_plan_says_what_kind_the_weights_become_after_the_passes_before(here: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", "passes: [magnitude, rtn]")
    rows = json.loads(compress_command("plan", pipeline, here / "model", "--json").out)["passes"]
    assert [r["becomes"] for r in rows] == ["sparse", "sparse-quantized"]


# --- eval, inspect ----------------------------------------------------------------------------------------------------


def test_eval_of_the_folder_gives_what_the_report_says(here: Path) -> None:
    row = json.loads((here / "out" / "report.json").read_text())["rows"][-1]
    data = ["--source", here / "words.txt", "--samples", 2, "--length", 32]
    ended = compress_command("eval", here / "out", *data, "--against", here / "model", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["perplexity"] == row["perplexity"]
    assert found["kl"] == pytest.approx(row["kl"], rel=1e-6)
    assert found["tokens"] == 62
    assert found["bytes"] == (here / "out" / "compress.safetensors").stat().st_size
    shown = compress_command("eval", here / "out", *data).out
    assert f"perplexity {row['perplexity']:.3f}" in shown


def test_eval_of_the_original_gives_row_zero(here: Path) -> None:
    row = json.loads((here / "out" / "report.json").read_text())["rows"][0]
    data = ["--source", here / "words.txt", "--samples", 2, "--length", 32]
    found = json.loads(compress_command("eval", here / "model", *data, "--json").out)
    assert found["perplexity"] == row["perplexity"]
    assert found["kl"] is None


def test_inspect_lists_every_stored_weight(here: Path) -> None:
    ended = compress_command("inspect", here / "out", "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = {r["layer"]: r for r in json.loads(ended.out)}
    assert len(rows) == 14
    down = rows["model.layers.1.mlp.down_proj"]
    assert (down["shape"], down["bits"], down["group_size"], down["sparsity"]) == ([64, 128], 4, 32, 0.5)
    assert down["passes"] == ["wanda", "gptq"]
    assert all(0 < error < 1 for error in down["error"].values())
    # a byte for 12 columns; half the codes 4 bits; scale 16 bits and zero point 4 bits for 32 columns
    assert down["bytes"] == 64 * (11 + 128 * (4 / 2 + 20 / 32) / 8)
    q = rows["model.layers.0.self_attn.q_proj"]
    assert (q["sparsity"], q["passes"]) == (0.0, ["gptq"])
    shown = compress_command("inspect", here / "out").out
    assert all(name in shown for name in rows)


def test_inspect_draws_the_zeros_of_every_block_where_layers_differ(here: Path, tmp_path: Path, rtn: Path) -> None:
    lines = compress_command("inspect", here / "out").out.splitlines()
    start = lines.index("zeros by block")
    # Half of the mlp's 24576 weights of 36864.
    for line, name in zip(lines[start + 1 :], ("model.layers.0", "model.layers.1", "in all"), strict=True):
        assert line.startswith(f"{name} ")
        assert line.endswith("33.3%  0.0% to 50.0%")
        assert line.count("█") == 13
    assert compress_command("run", rtn, here / "model", "-o", tmp_path / "out").code == 0
    assert "zeros by block" not in compress_command("inspect", tmp_path / "out").out


def test_inspect_shows_the_rank_of_corrections_where_there_are_any(here: Path, tmp_path: Path) -> None:
    assert "rank" not in compress_command("inspect", here / "out").out
    entry = "rtn: {bits: 2}\n  - eora: {rank: 3, adapter_bits: 4, include: ['*.up_proj']}"
    pipeline = write_pipeline(tmp_path / "p.yaml", PIPELINE.format(text=here / "words.txt", entry=entry))
    assert compress_command("run", pipeline, here / "model", "-o", tmp_path / "out").code == 0
    shown = compress_command("inspect", tmp_path / "out").out
    assert " rank " in shown
    assert shown.count(" 3 x 4 bit ") == 2
    rows = {r["layer"]: r for r in json.loads(compress_command("inspect", tmp_path / "out", "--json").out)}
    assert [rows[f"model.layers.0.mlp.{leaf}"]["rank"] for leaf in ("up_proj", "down_proj")] == [3, None]
    assert [rows[f"model.layers.0.mlp.{leaf}"]["adapter_bits"] for leaf in ("up_proj", "down_proj")] == [4, None]


# --- bars -------------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_shares_are_large_and_blocks_come_in_their_order() -> None:
    found = {f"layers.{i}.a": (100, i / 10) for i in (10, 2, 0, 1)} | {"head": (600, 0.0)}
    lines = draw.zeros(found, 80).splitlines()
    assert [line[:9].strip() for line in lines] == ["head", "layers.0", "layers.1", "layers.2", "layers.10", "in all"]
    assert [line.count("█") for line in lines] == [0, 0, 4, 8, 40, 5]
    assert lines[-1].endswith("13.0%  0.0% to 100.0%")
    assert draw.zeros({"a": (1, 0.0125)}, 80).splitlines()[0].split() == ["a", "▌", "1.2%"]


@pytest.mark.parametrize("width", [200, 80, 40])
def test_bars_fit_the_terminal_and_can_do_without_unicode(width: int) -> None:
    found = {f"layers.{i}.{leaf}": (10, (i + j) / 20) for i in range(12) for j, leaf in enumerate("ab")}
    plain = draw.zeros(found, width, ascii_only=True)
    assert plain.isascii()
    assert "#" in plain
    assert max(len(line) for line in draw.zeros(found, width).splitlines()) <= width


def test_shares_that_differ_by_the_rounding_to_columns_are_even() -> None:
    assert not draw.uneven({"a": (256, 179 / 256), "b": (768, 537 / 768)})
    assert draw.uneven({"a": (256, 0.68), "b": (768, 0.7)})
    assert not draw.uneven({})


# --- list, init, schema -----------------------------------------------------------------------------------------------


def test_list_names_every_method_option_and_format() -> None:
    ended = compress_command("list", "methods")
    assert (ended.code, ended.err) == (0, "")
    for pass_ in PASSES:
        assert re.search(rf"^{pass_.key} ", ended.out, re.MULTILINE)
    for word in ("bits=4", "sparsity=0.5", "damping=0.01", "safetensors", "overrides"):
        assert word in ended.out


def test_list_names_the_ready_made_pipelines() -> None:
    shown = compress_command("list").out
    assert SHIPPED
    assert all(file.stem in shown for file in SHIPPED)


def test_what_init_writes_passes_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compress_command("init").out == "pipeline.yaml\n"
    assert compress_command("check", "pipeline.yaml", "demo").code == 0
    text = (tmp_path / "pipeline.yaml").read_text()
    assert text.count("#") >= 3, "it explains itself"
    assert yaml.safe_load(text)["passes"]


def test_what_init_writes_names_the_schema_beside_it(tmp_path: Path) -> None:
    assert compress_command("init", tmp_path / "p.yaml").code == 0
    first, *_ = (tmp_path / "p.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=compress.schema.json"
    written = json.loads((tmp_path / "compress.schema.json").read_text())
    assert written == json.loads(compress_command("schema").out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compress.schema.json", "p.yaml"]


def test_init_does_not_replace_a_file_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("mine")
    ended = compress_command("init", path)
    assert ended.code == 2
    assert str(path) in ended.err
    assert "--force" in ended.err
    assert path.read_text() == "mine"
    assert compress_command("init", path, "--force").code == 0
    assert path.read_text() != "mine"


def test_schema_prints_the_schema() -> None:
    ended = compress_command("schema")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == json.loads(json.dumps(schema.schema()))


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "inspect", "run"])
def test_no_color_is_honoured(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = {
        "plan": ["plan", here / "p.yaml", here / "model"],
        "inspect": ["inspect", here / "out"],
        "run": ["run", here / "p.yaml", here / "model", "-o", here / "out"],
    }[command]
    out = compress_command(*arguments).out
    assert out
    assert not re.search(r"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])[;m]", out)


def test_nothing_is_coloured_where_stdout_is_no_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in compress_command("plan", here / "p.yaml", here / "model").out


@pytest.mark.parametrize("command", [[], ["run"], ["eval"], ["inspect"]], ids=lambda c: " ".join(c) or "compress")
def test_help_is_a_result(command: list[str]) -> None:
    ended = compress_command(*command, "--help")
    assert ended.code == 0
    assert "Usage: compress" in ended.out
    assert ended.err == ""


def test_the_command_line_gives_the_numbers_of_python(here: Path, tokens: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(here / "model").eval()
    result = compress.apply(model, [compress.Gptq(bits=3)], tokens)
    compress.run({"passes": [{"gptq": {"bits": 3}}]}, here / "model", tmp_path / "out", calibration=tokens)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(written(tokens).logits, result.model(tokens).logits)


@pytest.mark.parametrize(("name", "said"), [("gptq-w5", "did you mean gptq-w"), ("nothing-like-it", "compress list")])
def test_a_pipeline_that_is_neither_a_file_nor_ready_made_is_answered(name: str, said: str) -> None:
    ended = compress_command("check", name)
    assert ended.code == 2
    assert f"no file and no ready-made pipeline is called {name}" in ended.err
    assert said in ended.err


def test_a_ready_made_pipeline_is_checked_by_its_name() -> None:
    assert compress_command("check", "gptq-w4").out == "gptq-w4: fine\n"
