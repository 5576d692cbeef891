"""Every ready-made pipeline is parsed, planned and run on the demo model."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from commands import make_changed
from conftest import VOCABULARY, make_llama
from selection import only
from torch import Tensor

import compress
from compress.checkpoint import opening
from compress.config.reading import load_pipeline, parse
from compress.config.writing import dump
from compress.demo import MODEL_DIR
from compress.export.packed import packed_layers
from compress.passes import MergePass, Pass
from compress.planning import plan
from compress.report import layers
from compress.report.finished import read_report

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress" / "config" / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of three blocks that every pass takes in no time; `make real` takes the demo, which predicts."""
    folder = tmp_path_factory.mktemp("small") / "model"
    make_llama(num_hidden_layers=3, max_position_embeddings=1024).save_pretrained(folder)
    return folder


def changed(folder: Path, source: Path) -> list[str]:
    """Two models a little different from one: what stands in for the models that a user would name."""
    return [str(make_changed(folder / str(seed), source, seed, size=2e-3)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def small_fine_tunes(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return changed(tmp_path_factory.mktemp("small_fine_tunes"), small)


@pytest.fixture(scope="module")
def fine_tunes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return changed(tmp_path_factory.mktemp("fine_tunes"), MODEL_DIR)


def quick(pass_: Pass, fine_tunes: list[str]) -> Pass:
    """With fewer steps, if it learns; with other models, if it merges."""
    if isinstance(pass_, MergePass):
        assert set(pass_.models) == {"demo"}, "no model but the demo is everywhere"
        pass_ = replace(pass_, models=tuple(fine_tunes[: len(pass_.models)]))
    learns = pass_.calibrated and "steps" in {f.name for f in fields(pass_)}
    return replace(pass_, steps=5) if learns else pass_


def check(file: Path, model: str, out: Path, fine_tunes: list[str], samples: int, **given: Tensor) -> None:
    """Run a pipeline with little data: it keeps its promises of size, of exactness and, roughly, of quality."""
    steps = load_pipeline(file)
    assert parse(dump(steps)) == steps
    opened = opening.open_model(model)
    made = plan.make(steps, opened.artifact.graph, opened.dtypes)
    small = replace(
        steps,
        passes=tuple(tuple(quick(p, fine_tunes) for p in stage) for stage in steps.passes),
        calibration=steps.calibration and replace(steps.calibration, samples=samples, length=128),
        evaluate=steps.evaluate and replace(steps.evaluate, samples=4, length=256),
    )
    report = compress.run(small, model, out, **given)
    last = report.rows[-1]
    assert last.perplexity is not None
    assert report.rows[0].perplexity is not None
    assert last.perplexity < 4 * report.rows[0].perplexity
    assert last.bytes == pytest.approx(made.final_bytes, rel=0.02)
    assert report.verified["max_logit_difference"] == 0
    told = read_report(out)
    assert told.rows == report.rows
    kept = layers.layers(packed_layers(out), layers.notes_of(out))
    assert sum(layer.bytes for layer in kept) < last.bytes
    merges = [p for stage in small.passes for p in stage if isinstance(p, MergePass)]
    assert [set(m["models"]) <= set(fine_tunes) for m in report.merged] == [True] * len(merges)
    if merges:
        assert report.rows[1].kl is not None
        assert 0 < report.rows[1].kl < 1


def code_path(file: Path) -> list[tuple[str, list[str]]]:
    """Every pass with its grid and the options that it sets: what differs in numbers only runs the same code."""
    passes = [p for stage in load_pipeline(file).passes for p in stage]
    grids = [str(p.options().get("grid", "")) for p in passes]
    numbers = {"bits", "group_size", "granularity"}
    return [(p.key + grid, sorted(p.options().keys() - numbers)) for p, grid in zip(passes, grids, strict=True)]


# One of every reach and kind; what else is here is run by the tests of its passes.
QUICK = {
    "gptq-nvfp4", "gptq-w4-kv-fp8", "layer-drop-1-perp", "low-rank-50", "merge-bitdelta",
    "merge-wanda-2of4-perp-flexround-w4-eora", "merge-weight-matching", "rotate-gptq-w4a4", "scale-gptq-w3",
    "wanda-70-owl", "width-prune-40-perp",
}  # fmt: skip
DIFFERENT = list({repr(code_path(f)): f for f in FILES}.values())


def test_the_quick_ones_cover_every_reach() -> None:
    run = {p.reach for f in FILES if f.stem in QUICK for stage in load_pipeline(f).passes for p in stage}
    assert run == {p.reach for f in FILES for stage in load_pipeline(f).passes for p in stage}
    assert {f.stem for f in DIFFERENT} >= QUICK


@pytest.mark.parametrize("file", only([f for f in FILES if f.stem in QUICK], DIFFERENT), ids=lambda f: f.stem)
def test_ready_made_pipeline_runs(file: Path, tmp_path: Path, small: Path, small_fine_tunes: list[str]) -> None:
    given = {"evaluation": torch.randint(VOCABULARY, (4, 64))}
    if load_pipeline(file).calibration:
        given["calibration"] = torch.randint(VOCABULARY, (8, 64))
    check(file, str(small), tmp_path / "out", small_fine_tunes, samples=8, **given)


@pytest.mark.real
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_ready_made_pipeline_runs_on_the_demo_model_and_still_predicts(
    file: Path, tmp_path: Path, fine_tunes: list[str]
) -> None:
    check(file, "demo", tmp_path / "out", fine_tunes, samples=16)


def test_every_method_has_a_ready_made_pipeline() -> None:
    used = {p.key for f in FILES for stage in load_pipeline(f).passes for p in stage}
    # Each is run on the demo, which has neither experts nor batch norms.
    others = {"expert_merge", "expert_prune", "recalibrate_norms"}
    assert {p.key for p in compress.passes.PASSES} - others <= used


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
