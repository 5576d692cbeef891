"""`compress compare`: results beside each other, what cannot be compared, and what each writes; `eval` by own data."""

import json
import re
from pathlib import Path
from shutil import copytree

import pytest
from commands import compress_command, make_text_model, write_pipeline, write_text

from compress.report.comparison import front
from compress.report.finished import Finished, read_report

PIPELINE = "evaluate: {source: WORDS, samples: 2, length: 32}\npasses: [PASSES]"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a model by name; to be read only."""
    folder = tmp_path_factory.mktemp("compare")
    make_text_model(folder / "model")
    write_text(folder / "words.txt")
    (folder / "others.txt").write_text("other words of no sense at all, " * 200)
    for name, words, passes in (
        ("coarse", "words", "{rtn: {scheme: w3g32}}"),
        ("fine", "words", "{rtn: {scheme: w3g32, overrides: [{match: '*.0.*', bits: 4}]}}"),
        ("zeros", "words", "{magnitude: {sparsity: 0.6}}, {rtn: {scheme: w8g32}}"),
        ("elsewhere", "others", "{rtn: {scheme: w4g32}}"),
    ):
        text = PIPELINE.replace("WORDS", str(folder / f"{words}.txt")).replace("PASSES", passes)
        ended = compress_command("run", write_pipeline(folder / "p.yaml", text), folder / "model", "-o", folder / name)
        assert ended.code == 0, ended.err
    return folder


def compared(here: Path, *arguments: str) -> dict[str, object]:
    ended = compress_command("compare", *(here / a if (here / a).exists() else a for a in arguments), "--json")
    assert ended.code == 0, ended.err
    found: dict[str, object] = json.loads(ended.out)
    return found


def test_each_result_has_a_row_of_its_report_and_the_original_stands_above(here: Path) -> None:
    report = json.loads((here / "fine" / "report.json").read_text())
    found = compared(here, "fine", "coarse")["results"]
    assert isinstance(found, list)
    assert found[0]["found"] == report["rows"][-1]
    assert found[0]["original"] == report["rows"][0]
    shown = compress_command("compare", here / "fine", here / "coarse").out
    rows = [re.split(r"\s*│\s*", line)[1] for line in shown.splitlines() if line.startswith("│")]
    assert rows[:3] == ["original", "fine", "coarse"]
    assert f"{report['rows'][-1]['perplexity']:.3f}" in shown


def test_layers_that_are_stored_otherwise_are_listed_and_no_others(here: Path) -> None:
    layers = compared(here, "coarse", "fine", "--layers", "100")["layers"]
    assert isinstance(layers, list)
    assert {layer["layer"].split(".")[2] for layer in layers} == {"0"}
    assert {(layer["found"][0]["bits"], layer["found"][1]["bits"]) for layer in layers} == {(3, 4)}
    ratios = [layer["found"][0]["error"] / layer["found"][1]["error"] for layer in layers]
    assert ratios == sorted(ratios, reverse=True)
    assert len(compared(here, "coarse", "fine", "--layers", "2")["layers"]) == 2  # type: ignore[arg-type]


def test_a_result_that_is_worse_and_no_smaller_is_named(here: Path) -> None:
    assert compared(here, "coarse", "fine")["notes"] == []
    assert compared(here, "fine", "zeros", "coarse")["notes"] == [
        "zeros is no better than fine or coarse, and no smaller"
    ]
    found = [Finished(name, read_report(here / name), []) for name in ("fine", "zeros", "coarse")]
    assert [each.name for each in front(found)] == ["coarse", "fine"]
    assert front([*found, Finished("elsewhere", read_report(here / "elsewhere"), [])]) == [], "of other data"


def test_figures_of_different_data_or_models_are_not_set_beside_each_other_without_a_word(here: Path) -> None:
    assert "measured on different data" in str(compared(here, "fine", "elsewhere")["notes"])
    make_text_model(here / "larger", hidden_size=128)
    text = PIPELINE.replace("WORDS", str(here / "words.txt")).replace("PASSES", "{rtn: {scheme: w4g32}}")
    run = ("run", write_pipeline(here / "l.yaml", text), here / "larger", "-o", here / "of-larger")
    assert compress_command(*run).code == 0
    ended = compress_command("compare", here / "fine", here / "of-larger")
    assert "they began as different models: fine as " in ended.out
    assert "original" not in ended.out


def test_each_goes_on_with_a_prompt_and_the_original_does_too(here: Path) -> None:
    found = compared(here, "fine", "coarse", "--prompt", "a word", "--against", str(here / "model"), "--tokens", "5")
    written = found["written"]
    assert isinstance(written, dict)
    assert list(written) == ["a word"]
    assert list(written["a word"]) == [str(here / "model"), "fine", "coarse"]
    again = compared(here, "fine", "--prompt", "a word", "--tokens", "5")["written"]
    assert again == {"a word": {"fine": written["a word"]["fine"]}}


def test_the_page_holds_the_same_and_fetches_nothing(here: Path, tmp_path: Path) -> None:
    options = ("--html", tmp_path / "c.html", "--prompt", "<b>a word</b>", "--tokens", "4")
    ended = compress_command("compare", here / "fine", here / "coarse", here / "zeros", *options)
    assert ended.code == 0, ended.err
    page = (tmp_path / "c.html").read_text()
    assert set(re.findall(r"https?://[^\"' <]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"<(script|link|img|iframe|b)>", page)
    assert page.count("<svg") == 2, "sizes, and errors by block"
    for name in ("fine", "coarse", "zeros"):
        assert f"<td>{name}</td>" in page
        assert f"<h3>{name}</h3>" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fine", "nowhere"), "no such folder: nowhere"),
        (("fine", "fine"), "is named twice; compare takes different results"),
        (
            ("fine", "model"),
            r"is no result of `compress run`: it has no report\.json; `compress eval` measures any model",
        ),
        (("fine", "--against", "model"), "--against is the original that goes on with prompts; give one with --prompt"),
        (("fine", "--prompt", ""), "a prompt of no token; write some text"),
        (("fine", "--prompt", "a word", "--tokens", "200"), "are over the 128 that the model takes; write less"),
        (("fine", "--html", "words.txt"), "exists; give another name"),
    ],
)
def test_what_cannot_be_compared_is_refused(here: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = compress_command("compare", *(here / a if (here / a).exists() and a else a for a in arguments))
    assert (ended.code, ended.out) == (2, "")
    assert re.search(said, ended.err), ended.err


def test_a_damaged_report_is_named_with_what_is_wrong(here: Path, tmp_path: Path) -> None:
    copytree(here / "fine", tmp_path / "fine")
    (tmp_path / "fine" / "manifest.json").unlink()
    for damage, said in (
        ({"rows": []}, "rows"),
        ({"model": 3}, "model"),
        ({"rows": [{"name": "x"}]}, "rows.0.perplexity"),
    ):
        report = json.loads((here / "fine" / "report.json").read_text())
        (tmp_path / "fine" / "report.json").write_text(json.dumps(report | damage))
        ended = compress_command("compare", tmp_path / "fine")
        assert ended.code == 2
        assert f"is not what a run wrote: its `{said}` is damaged" in ended.err


def test_eval_measures_a_result_on_the_data_of_its_own_run_unless_told_otherwise(here: Path) -> None:
    report = json.loads((here / "fine" / "report.json").read_text())
    found = json.loads(compress_command("eval", here / "fine", "--json").out)
    assert found["source"] == str(here / "words.txt")
    assert found["perplexity"] == pytest.approx(report["rows"][-1]["perplexity"], rel=1e-4)
    fewer = json.loads(compress_command("eval", here / "fine", "--samples", 1, "--json").out)
    assert (fewer["source"], fewer["windows"], fewer["length"]) == (str(here / "words.txt"), 1, 32)
    inside = json.loads(compress_command("export", here / "fine", "--to", "hf", "--json").out)
    assert inside["hf"]
    assert json.loads(compress_command("eval", here / "fine" / "hf", "--json").out)["source"] == str(here / "words.txt")
    other = ("--source", here / "others.txt", "--length", 16, "--samples", 3, "--json")
    found = json.loads(compress_command("eval", here / "fine", *other).out)
    assert (found["source"], found["windows"], found["length"]) == (str(here / "others.txt"), 3, 16)


def test_eval_tells_several_sources_apart(here: Path) -> None:
    each = {}
    for name in ("words", "others"):
        options = ("--source", here / f"{name}.txt", "--length", 32, "--samples", 2, "--against", here / "model")
        each[name] = json.loads(compress_command("eval", here / "fine", *options, "--json").out)
    both = [f"--source={name}={here / f'{name}.txt'}" for name in each]
    together = ("--length", 32, "--samples", 2, "--against", here / "model")
    found = json.loads(compress_command("eval", here / "fine", *both, *together, "--json").out)
    for name, alone in each.items():
        assert found["sources"][name]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
        assert found["sources"][name]["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    shown = compress_command("eval", here / "fine", *both, *together).out
    assert re.search(r"\n  words: perplexity [\d.]+, KL to \S+ [\d.]+ on 62 tokens\n  others: perplexity", shown)
    ended = compress_command("eval", here / "fine", "--source", "a=b.txt", "--source", "c.txt")
    assert ended.code == 2
    assert "of several, each has a name of its own" in ended.err
