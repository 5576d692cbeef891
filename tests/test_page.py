"""`compress inspect --csv` and `--html`: the same rows for a spreadsheet, and a page that needs nothing but itself."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
from commands import compress_command, files_of, make_text_model, write_pipeline, write_text


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    make_text_model(folder / "a <b> & $c$")
    write_text(folder / "words.txt")
    text = "evaluate: {source: WORDS, samples: 1, length: 32}\npasses: [{magnitude: {}}, {rtn: {scheme: w4g32}}]"
    write_pipeline(folder / "p.yaml", text.replace("WORDS", str(folder / "words.txt")))
    assert compress_command("run", folder / "p.yaml", folder / "a <b> & $c$", "-o", folder / "out").code == 0
    before = files_of(folder / "out")
    ended = compress_command(
        "inspect", folder / "out", "--csv", folder / "l.csv", "--html", folder / "r.html", "--json"
    )
    assert ended.code == 0, ended.err
    assert files_of(folder / "out") == before
    (folder / "layers.json").write_text(ended.out)
    return folder


def test_the_spreadsheet_has_a_line_for_every_layer_with_its_numbers_in_full(here: Path) -> None:
    with (here / "l.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    layers = json.loads((here / "layers.json").read_text())
    assert [row["layer"] for row in rows] == [layer["layer"] for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        assert float(row["error"]) == layer["error"]["rtn"]
        assert [int(row[name]) for name in ("rows", "columns", "bits", "bytes")] == [
            *layer["shape"], layer["bits"], layer["bytes"]
        ]  # fmt: skip
        assert row["passes"] == "magnitude+rtn"


def test_the_page_fetches_nothing_follows_the_reader_and_holds_names_as_text(here: Path) -> None:
    page = (here / "r.html").read_text()
    addresses = set(re.findall(r"https?://[^\"' <]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of namespaces"
    assert not re.findall(r"<(script|link|img|iframe)", page)
    assert 'content="light dark"' in page
    assert "currentColor" in page
    assert "#123456" not in page
    assert "a &lt;b&gt; &amp; $c$" in page
    assert "<b>" not in page
    report = json.loads((here / "out" / "report.json").read_text())
    for row in report["rows"]:
        assert f"<td>{row['perplexity']:.3f}</td>" in page
    assert page.count("<svg") == 3, "perplexity, KL and the heat map"
    assert ">self_attn.q_proj<" in page


def test_files_are_not_written_over_others_or_into_the_result(here: Path) -> None:
    for file, said in (
        (here / "l.csv", "exists; give another name"),
        (here / "out" / "l.csv", "write it elsewhere"),
        (here / "nowhere" / "l.csv", "no such folder"),
    ):
        ended = compress_command("inspect", here / "out", "--csv", file)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err


def test_without_the_library_it_is_said_how_to_install_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    ended = compress_command("inspect", here / "out", "--html", here / "other.html")
    assert ended.code == 2
    assert "pip install 'compress-pipeline[page]'" in ended.err
    assert not (here / "other.html").exists()
