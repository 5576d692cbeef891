"""Every ready-made pipeline is parsed, planned and run on the demo model."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from commands import make_changed

import compress
from compress.checkpoint import opening
from compress.config.reading import load, parse
from compress.config.writing import dump
from compress.demo import MODEL_DIR
from compress.passes import MergePass, Pass
from compress.planning import plan

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress" / "config" / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models like the demo, a little different: what stands in for the models that a user would name."""
    folder = tmp_path_factory.mktemp("fine_tunes")
    return [str(make_changed(folder / str(seed), MODEL_DIR, seed, size=2e-3)) for seed in (1, 2)]


def quick(pass_: Pass, fine_tunes: list[str]) -> Pass:
    """With fewer steps, if it learns; with other models, if it merges."""
    if isinstance(pass_, MergePass):
        assert set(pass_.models) == {"demo"}, "no model but the demo is everywhere"
        pass_ = replace(pass_, models=tuple(fine_tunes[: len(pass_.models)]))
    learns = pass_.calibrated and "steps" in {f.name for f in fields(pass_)}
    return replace(pass_, steps=5) if learns else pass_


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_ready_made_pipeline_runs_on_the_demo_model_and_still_predicts(
    file: Path, tmp_path: Path, fine_tunes: list[str]
) -> None:
    steps = load(file)
    assert parse(dump(steps)) == steps
    opened = opening.open_model("demo")
    made = plan.make(steps, opened.artifact.graph, opened.dtypes)
    small = replace(
        steps,
        passes=tuple(tuple(quick(p, fine_tunes) for p in stage) for stage in steps.passes),
        calibration=steps.calibration and replace(steps.calibration, samples=16, length=128),
        evaluate=steps.evaluate and replace(steps.evaluate, samples=4, length=256),
    )
    report = compress.run(small, "demo", tmp_path / "out")
    last = report.rows[-1]
    assert last.perplexity is not None
    assert report.rows[0].perplexity is not None
    assert last.perplexity < 4 * report.rows[0].perplexity
    assert last.bytes == pytest.approx(made.final_bytes, rel=0.02)
    assert report.verified["max_logit_difference"] == 0
    merges = [p for stage in small.passes for p in stage if isinstance(p, MergePass)]
    assert [set(m["models"]) <= set(fine_tunes) for m in report.merged] == [True] * len(merges)
    if merges:
        assert report.rows[1].kl is not None
        assert 0 < report.rows[1].kl < 1


def test_every_method_has_a_ready_made_pipeline() -> None:
    used = {p.key for f in FILES for stage in load(f).passes for p in stage}
    assert {p.key for p in compress.passes.PASSES} <= used


def test_every_method_has_a_page_that_names_all_its_options() -> None:
    for pass_ in compress.passes.PASSES:
        page = (ROOT / "docs" / "methods" / f"{pass_.key}.md").read_text()
        if "](../activations.md)" in page:  # what quantized inputs are stands in one place for all
            page += (ROOT / "docs" / "activations.md").read_text()
        shared_with_rtn = {f.name for f in fields(compress.Rtn)} if pass_.key == "gptq" else set()
        options = {f.name for f in fields(pass_)} - {"include", "exclude", "overrides"} - shared_with_rtn
        assert [o for o in options if f"`{o}`" not in page] == []
        assert "Source:" in page
        assert "**Choose it**" in page
