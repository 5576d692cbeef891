"""What is learned of whole models before they are merged: greedy soups, chosen options, learned coefficients.

Shapes as in `textbook.Wholes`, unless whole runs are made.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import textbook
import torch
from children import FILES, contents, prepare, run
from commands import compress_command, make_changed, make_text_model, write_pipeline, write_text
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, ResNetConfig, ResNetForImageClassification

import compress
from compress import AdaMerging, Average, GreedySoup, Interpolate, TaskArithmetic, Ties
from compress.calibration.data import Dataset
from compress.config.reading import load_pipeline, parse
from compress.config.writing import dump
from compress.engine import block_stage
from compress.errors import ConfigError, DataError
from compress.passes.merge.entropy import Coefficients, judged, loss, sureness
from compress.passes.merge.models import Running

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"first.weight": (6, 4), "blocks.0.bias": (3,), "last.weight": (5, 6)}


def some(count: int, spread: float = 0.5, seed: int = 0) -> list[dict[str, Tensor]]:
    """A base and others like it."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return [
        base,
        *({n: v + spread * torch.randn(v.shape, generator=generator) for n, v in base.items()} for _ in range(count)),
    ]


def named(count: int) -> tuple[str, ...]:
    return tuple(f"./model-{k}" for k in range(count))


def score(wholes: textbook.Wholes, members: tuple[int, ...]) -> float:
    weights = tuple(float(k in members) for k in range(len(wholes.models)))
    return wholes.tried(Average(models=named(len(wholes.models) - 1), weights=weights))[""].score


# --- greedy soups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_soup_is_what_the_recipe_says(seed: int) -> None:
    wholes = textbook.Wholes(some(4, seed=seed))
    order = sorted(range(5), key=lambda k: -score(wholes, (k,)))
    soup: tuple[int, ...] = (order[0],)
    for k in order[1:]:
        if score(wholes, (*soup, k)) >= score(wholes, soup):
            soup = (*soup, k)
    assert GreedySoup(models=named(4)).learn(wholes) == soup


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_soup_is_never_worse_than_the_best_model_alone(seed: int) -> None:
    wholes = textbook.Wholes(some(3, seed=seed))
    pass_ = GreedySoup(models=named(3))
    made = wholes.rated(textbook.merged(pass_, wholes.models))[""].score
    assert made >= max(score(wholes, (k,)) for k in range(4)) - 1e-5


def test_a_soup_of_one_model_twice_is_that_model() -> None:
    base, other = some(1)
    near = {name: 0.3 * value for name, value in other.items()}
    made = textbook.merged(GreedySoup(models=named(2)), [base, near, near])
    assert all(torch.allclose(value, near[name]) for name, value in made.items())


def test_without_the_base_the_base_is_no_candidate() -> None:
    far, near = some(1)
    best = {name: 0 * value for name, value in far.items()}
    wholes = textbook.Wholes([best, far, near])
    assert GreedySoup(models=named(2)).learn(wholes)[0] == 0
    assert 0 not in GreedySoup(models=named(2), base=False).learn(wholes)


# --- options chosen by trying -----------------------------------------------------------------------------------------


def test_the_best_of_all_combinations_is_chosen(tmp_path: Path) -> None:
    base, other, text = trio(tmp_path)
    grid = {"scale": [0.5, -0.5], "density": [0.2, 1.0]}
    merge = {"ties": {"models": [str(other)], "choose": grid}}
    data = {"source": str(text), "samples": 4, "length": 32}
    report = compress.run({"passes": [merge], "calibration": data}, base, tmp_path / "out")
    notes = report.merged[0]["notes"]
    assert len(notes["tried"]) == 4
    losses = {}
    for scale, density in itertools.product(*grid.values()):
        single = {"ties": {"models": [str(other)], "scale": scale, "density": density}}
        tokens = compress.load_tokens(str(text), AutoTokenizer.from_pretrained(base), samples=4, length=32)
        row = compress.run({"passes": [single]}, base, tmp_path / "one", evaluation=tokens, overwrite=True).rows[-1]
        losses[scale, density] = row.perplexity
    best = min(losses, key=losses.__getitem__)
    assert notes["chosen"] == {"scale": best[0], "density": best[1]}
    plain = {"ties": {"models": [str(other)], **notes["chosen"]}}
    compress.run({"passes": [plain]}, base, tmp_path / "plain")
    found, expected = (load_file(tmp_path / out / "compress.safetensors") for out in ("out", "plain"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_by_negative_flips_the_fewest_of_those_that_are_not_worse_than_the_new_model() -> None:
    from compress.passes.merge.grid_search import chosen

    old, new = some(1)
    new = {name: 0.5 * value for name, value in old.items()}  # nearer to the goal, so better
    wholes = textbook.Wholes([old, new], goal=0.0)
    pass_ = Interpolate(models=("./new",), choose={"alpha": (0.5, 1.0, 0.9)}, by="negative_flips")
    assert chosen(pass_, wholes).alpha == 1.0, "all others are worse than the new model"
    worse = textbook.Wholes([new, old], goal=0.0)
    assert chosen(pass_, worse).alpha == 0.5, "all are better than the other, and the nearest flips the least"


def test_by_negative_flips_several_new_models_are_compared_as_their_mean() -> None:
    from compress.passes.merge.grid_search import chosen

    old, _ = some(1)
    new = [{name: share * value for name, value in old.items()} for share in (0.3, 0.7)]
    wholes = textbook.Wholes([old, *new], goal=0.0)
    pass_ = Interpolate(models=("./a", "./b"), choose={"alpha": (0.5, 1.0, 0.9)}, by="negative_flips")
    assert chosen(pass_, wholes).alpha == 1.0, "all others are worse than the mean of the new ones"
    assert [getattr(each, "alpha", None) for each in wholes.tries] == [0.5, 1.0, 0.9, 1.0]


@pytest.mark.parametrize("merge", ["adamerging", "bitdelta"])
def test_a_merge_that_learns_anew_for_each_value_is_not_tried(merge: str) -> None:
    with pytest.raises(ConfigError, match=rf"choose: tries merges, and {merge} would have to learn for each"):
        load_pipeline({"passes": [{merge: {"models": ["a"], "choose": {"learning_rate": [0.1, 0.2]}}}]})


def test_negative_flips_are_what_was_right_and_is_wrong_now(tmp_path: Path) -> None:
    base, other, text = trio(tmp_path)
    tokens = compress.load_tokens(str(text), AutoTokenizer.from_pretrained(base), samples=4, length=32)
    from transformers import AutoModelForCausalLM

    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, other))
    with torch.no_grad():
        right = [(m(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]) for m in (old, new)]
    expected = float((right[0] & ~right[1]).float().mean())
    assert compress.evaluate(new, tokens, against=old).negative_flips == pytest.approx(expected)
    assert compress.evaluate(old, tokens, against=old).negative_flips == 0
    assert compress.evaluate(old, tokens).negative_flips is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"choose": {"scal": [1.0]}},
            "scal: is not a number of task_arithmetic that can be tried; known: scale, weights",
        ),
        ({"choose": {"combine": [1.0]}}, "combine: is not a number of task_arithmetic"),
        ({"choose": {"scale": []}}, "no value to try"),
        ({"choose": {"models": [1.0]}}, "models: is not a number of task_arithmetic"),
        ({"choose": {"scale": ["much"]}}, "is not several by name"),
        ({"by": "negative_flips", "choose": {"scale": [1.0]}}, "task_arithmetic merges several"),
        ({"by": "often"}, "is not one of score, negative_flips"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_pipeline({"passes": [{"task_arithmetic": {"models": ["a"], **options}}]})


@pytest.mark.parametrize(
    ("merge", "option"), [("greedy_soup", "base"), ("adamerging", "steps"), ("bitdelta", "bits"), ("dare", "merge")]
)
def test_only_numbers_that_a_merge_can_be_tried_with_are_chosen(merge: str, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"choose\.{option}: is not a number of {merge} that can be tried"):
        load_pipeline({"passes": [{merge: {"models": ["a"], "choose": {option: [1, 2]}}}]})


def test_an_option_out_of_range_is_found_before_anything_is_tried() -> None:
    with pytest.raises(ConfigError, match=r"1\.5 is not between 0 and 1"):
        load_pipeline({"passes": [{"interpolate": {"models": ["a"], "choose": {"alpha": [0.5, 1.5]}}}]})
    with pytest.raises(ConfigError, match="changes nothing without choose"):
        load_pipeline({"passes": [{"interpolate": {"models": ["a"], "by": "negative_flips"}}]})


def test_choosing_needs_calibration_data(tmp_path: Path) -> None:
    base, other, _ = trio(tmp_path)
    passes = [{"task_arithmetic": {"models": [str(other)], "choose": {"scale": [0.1, 1.0]}}}]
    with pytest.raises(ConfigError, match="`calibration:` is missing"):
        compress.run({"passes": passes}, base, tmp_path / "out")


# --- learned coefficients ---------------------------------------------------------------------------------------------


def coefficients(wholes: textbook.Wholes, running: Running, level: str) -> Coefficients:
    def parts(name: str) -> tuple[Tensor, list[Tensor]]:
        base = wholes.value(0, name)
        return base, [model[name] - base for model in wholes.models[1:]]

    start = {name: (0.3,) * (len(wholes.models) - 1) for name in running.names}
    return Coefficients(start, level, 1e-2, parts)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_inner_products_are_the_derivatives(level: str) -> None:
    wholes = textbook.Wholes([{n: v.double() for n, v in model.items()} for model in some(3)])
    with wholes.running() as running:
        running = replace(running, logits=lambda make, numbers: double_logits(make, numbers))
        learned = coefficients(wholes, running, level)
        learned.values = learned.values.detach().double().requires_grad_()
        numbers = torch.arange(8)
        value = loss(running, 0.3, learned.make, numbers)
        value.backward()
        found, step = learned.values.grad, 1e-6
        for row, task in itertools.product(range(found.shape[0]), range(3)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    learned.values[row, task] += sign * step
                    ends.append(float(loss(running, 0.3, learned.make, numbers)))
                    learned.values[row, task] -= sign * step
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(found[row, task]), rel=1e-4, abs=1e-8)


def double_logits(make: object, numbers: Tensor) -> Tensor:
    values = make(["first.weight", "last.weight"])  # type: ignore[operator]
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.tanh(x[numbers] @ values["first.weight"].T) @ values["last.weight"].T


def test_no_steps_are_task_arithmetic() -> None:
    models = some(3)
    made = textbook.merged(AdaMerging(models=named(3), steps=0), models)
    plain = textbook.merged(TaskArithmetic(models=named(3), scale=0.3), models)
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in made.items())


def test_with_trimming_no_steps_are_ties_with_a_sum() -> None:
    models = some(3)
    made = textbook.merged(AdaMerging(models=named(3), steps=0, trim=0.2), models)
    plain = textbook.merged(Ties(models=named(3), density=0.2, scope="model", combine="sum", scale=0.3), models)
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in made.items())


@pytest.mark.parametrize("level", ["task", "layer"])
def test_learning_makes_the_merged_model_surer_with_coefficients_from_0_to_1(level: str) -> None:
    wholes = textbook.Wholes(some(3))
    pass_ = AdaMerging(models=named(3), level=level, steps=60, learning_rate=2e-2, batch_size=16)
    found = pass_.learn(wholes)
    assert wholes.notes["loss"] < wholes.notes["loss_start"]
    assert all(0 <= c <= 1 for each in found.coefficients.values() for c in each)
    trained = {found.coefficients[name] for name in ("first.weight", "last.weight")}
    assert len(trained) == (1 if level == "task" else 2)
    assert found.coefficients["blocks.0.bias"] == (0.3, 0.3, 0.3), "no gradient reaches it"


def test_an_iterate_that_answers_always_the_same_is_never_kept() -> None:
    def always(make: object, numbers: Tensor) -> Tensor:
        made = make(["first.weight"])["first.weight"]  # type: ignore[operator]
        x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))[numbers]
        return x + made.mean() * torch.tensor([100.0, 0, 0, 0, 0])

    running = Running(always, 64, textbook.TrainingStore(), ("first.weight",), torch.arange(64) % 2)
    plain = {"first.weight": torch.zeros(2, 2)}
    numbers = torch.arange(64)
    before = sureness(running, lambda names: plain, numbers, 16)
    collapsed = {"first.weight": torch.ones(2, 2)}
    after = sureness(running, lambda names: collapsed, numbers, 16)
    least = {source: float(each.spread) / 2 for source, each in before.items()}
    for source in (0, 1):
        assert after[source].entropy < before[source].entropy, "it is surer"
        assert after[source].spread < least[source], "of one answer"
    assert judged(running, numbers, 16, 0.0, least, lambda names: collapsed) == float("inf")
    expected = (before[0].entropy + before[1].entropy) / 2
    assert judged(running, numbers, 16, 0.0, least, lambda names: plain) == pytest.approx(float(expected))
    assert judged(running, numbers, 64, 0.0, least, lambda names: plain) == pytest.approx(float(expected))


def test_running_means_keep_the_first_coefficient_and_tied_tensors_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    base = ResNetForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    other = make_changed(tmp_path / "other", tmp_path / "base", 1, size=0.1)
    images = torch.randn(16, 1, 16, 16)
    merge = {
        "adamerging": {"models": [str(other)], "steps": 10, "batch_size": 8, "learning_rate": 0.05, "diversity": 0.0}
    }
    report = compress.run({"passes": [merge]}, tmp_path / "base", tmp_path / "out", calibration=images)
    found = report.merged[0]["notes"]["coefficients"]
    assert found["resnet.embedder.embedder.normalization.running_mean"] == [0.3]
    assert found["resnet.embedder.embedder.convolution.weight"] != [0.3]
    tied = make_text_model(tmp_path / "tied", tie_word_embeddings=True)
    second = make_changed(tmp_path / "second", tied, 2)
    tokens = torch.randint(200, (4, 16), generator=torch.Generator().manual_seed(0))
    merge = {"adamerging": {"models": [str(second)], "steps": 3, "batch_size": 2}}
    report = compress.run({"passes": [merge]}, tied, tmp_path / "tied-out", calibration=tokens)
    assert "lm_head.weight" not in report.merged[0]["notes"]["coefficients"]
    assert "model.embed_tokens.weight" in report.merged[0]["notes"]["coefficients"]


def test_in_memory_and_from_files_the_same_is_learned(tmp_path: Path) -> None:
    base, other, _ = trio(tmp_path)
    tokens = torch.randint(200, (8, 16), generator=torch.Generator().manual_seed(0))
    from transformers import LlamaForCausalLM

    for pass_ in (
        AdaMerging(models=(str(other),), steps=4, batch_size=2),
        GreedySoup(models=(str(other),)),
        TaskArithmetic(models=(str(other),), choose={"scale": (0.5, 1.0)}),
    ):
        options = {k: v for k, v in pass_.options().items() if v}
        run_ = compress.run(
            {"passes": [{pass_.key: options}]}, base, tmp_path / "out", calibration=tokens, overwrite=True
        )
        model = LlamaForCausalLM.from_pretrained(base)
        result = compress.apply(model, [pass_], tokens, evaluation=tokens)
        assert result.report.merged[0]["notes"] == run_.merged[0]["notes"]
        stored = load_file(tmp_path / "out" / "compress.safetensors")
        made = result.model.state_dict()
        assert all(torch.equal(value, made[name]) for name, value in stored.items() if name in made)
        assert [row.name for row in result.report.rows] == ["original", str(other), pass_.key]


# --- several sources --------------------------------------------------------------------------------------------------


def trio(folder: Path) -> tuple[Path, Path, Path]:
    """A model, another like it, and a text."""
    base = make_text_model(folder / "base")
    return base, make_changed(folder / "other", base, 1, size=3e-2), write_text(folder / "words.txt")


def test_quality_is_that_of_every_source_and_of_all_of_them_together(tmp_path: Path) -> None:
    base, other, text = trio(tmp_path)
    second = write_text(tmp_path / "more.txt", seed=9)
    tokenizer = AutoTokenizer.from_pretrained(base)
    section = {"source": {"words": str(text), "more": str(second)}, "samples": 4, "length": 32}
    merge = {"average": {"models": [str(other)]}}
    report = compress.run({"passes": [merge], "evaluate": section}, base, tmp_path / "out")
    parts = {
        name: compress.load_tokens(str(file), tokenizer, samples=4, length=32, split="evaluation")
        for name, file in (("words", text), ("more", second))
    }
    assert [row.name for row in report.rows] == ["original", str(other), "average"]
    whole = compress.run({"passes": [merge]}, base, tmp_path / "whole", evaluation=torch.cat(list(parts.values())))
    for row, together in zip(report.rows, whole.rows, strict=True):
        assert row.perplexity == pytest.approx(together.perplexity)
        assert row.kl == pytest.approx(together.kl) if row.kl is not None else together.kl is None
        assert row.negative_flips == together.negative_flips
    for name, tokens in parts.items():
        alone = compress.run({"passes": [merge]}, base, tmp_path / name, evaluation=tokens)
        for row, single in zip(report.rows, alone.rows, strict=True):
            facts = {"perplexity", "kl", "change", "negative_flips"}
            assert {k: row.sources[name][k] for k in facts} == {k: getattr(single, k) for k in facts}
    against = report.merged[0]["against"][str(other)]
    assert set(against) == {"", "words", "more"}
    before, now = (row.sources["words"]["perplexity"] for row in report.rows[1:])
    assert against["words"] == pytest.approx(now / before - 1)
    given = compress.run({"passes": [merge]}, base, tmp_path / "given", evaluation=parts)
    assert [r.sources for r in given.rows] == [r.sources for r in report.rows]


def test_a_model_called_as_a_method_is_has_a_row_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other, text = trio(tmp_path)
    other.rename(tmp_path / "average")
    monkeypatch.chdir(tmp_path)
    merges = [{"average": {"models": [str(base)]}}, {"average": {"models": ["average"]}}]
    section = {"source": str(text), "samples": 2, "length": 32}
    report = compress.run({"passes": merges, "evaluate": section}, base, tmp_path / "out")
    assert [row.name for row in report.rows] == ["original", str(base), "average", "average", "average"]
    changes = report.merged[1]["against"]["average"]
    assert changes[""] == pytest.approx(report.rows[4].perplexity / report.rows[3].perplexity - 1)
    assert changes[""] != 0


def test_a_changed_base_changes_what_is_said_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other, text = trio(tmp_path)
    section = {"source": str(text), "samples": 2, "length": 32}
    pipeline = {"passes": [{"average": {"models": [str(other)]}}, {"rtn": {"bits": 4}}], "evaluate": section}

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(block_stage, "run_passes", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run(pipeline, base, tmp_path / "out")
    changed = make_changed(tmp_path / "changed", base, 7, size=3e-2)
    (base / "model.safetensors").write_bytes((changed / "model.safetensors").read_bytes())
    resumed = compress.run(pipeline, base, tmp_path / "out").rows[1]
    afresh = compress.run(pipeline, base, tmp_path / "afresh").rows[1]
    assert (resumed.kl, resumed.change, resumed.negative_flips) == (afresh.kl, afresh.change, afresh.negative_flips)


def test_the_table_has_a_column_for_every_source(tmp_path: Path) -> None:
    base, other, text = trio(tmp_path)
    pipeline = write_pipeline(
        tmp_path / "p.yaml",
        f"evaluate: {{source: {{words: {text}, again: {text}}}, samples: 2, length: 32}}\n"
        f"passes: [{{average: {{models: [{other}]}}}}]\n",
    )
    assert parse(dump(parse(pipeline.read_text()))) == parse(pipeline.read_text())
    ended = compress_command("run", pipeline, base, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "words" in ended.out
    assert "again" in ended.out
    assert "| words | again |" in (tmp_path / "out" / "README.md").read_text()
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert set(rows[2]["sources"]) == {"words", "again"}


def test_what_was_tried_is_shown(tmp_path: Path) -> None:
    base, other, text = trio(tmp_path)
    pipeline = write_pipeline(
        tmp_path / "p.yaml",
        f"calibration: {{source: {{words: {text}}}, samples: 2, length: 32}}\n"
        f"passes: [{{interpolate: {{models: [{other}], choose: {{alpha: [0, 0.25, 1]}}}}}}]\n",
    )
    ended = compress_command("run", pipeline, base, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["merged"][0]["notes"]
    assert "tried by interpolate" in ended.out
    assert f"(alpha {notes['chosen']['alpha']:g}, chosen of 3)" in " ".join(ended.out.split())
    first = notes["tried"][0]["found"]["words"]
    assert first["negative_flips"] == 0, "alpha 0 is the model itself"
    assert f"{torch.tensor(first['loss'], dtype=torch.float64).exp():.3f}" in ended.out


def test_every_wrong_source_is_named(tmp_path: Path) -> None:
    text = write_text(tmp_path / "words.txt")
    with pytest.raises(ConfigError, match=r"evaluate\.source\.b: no such file"):
        parse(f"evaluate: {{source: {{a: {text}, b: ./missing.txt}}}}\npasses: []\n")
    with pytest.raises(ConfigError, match="names no source"):
        parse("evaluate: {source: {}}\npasses: []\n")
    with pytest.raises(ConfigError, match="is not a text or several by name"):
        parse("evaluate: {source: {a: 3}}\npasses: []\n")


def test_sources_must_fit_together() -> None:
    with pytest.raises(DataError, match="one shape"):
        Dataset.joined({"a": Dataset(torch.zeros(2, 8)), "b": Dataset(torch.zeros(2, 9))})
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(DataError, match="b has no labels"):
        Dataset.joined({"a": Dataset(torch.zeros(2, 8), labels), "b": Dataset(torch.zeros(2, 8))})


def test_a_classifier_is_chosen_for_its_accuracy_and_needs_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    other = make_changed(tmp_path / "other", tmp_path / "base", 1, size=0.1)
    images, labels = torch.randn(12, 1, 16, 16), torch.randint(3, (12,))
    save_file({"images": images, "labels": labels}, tmp_path / "labelled.safetensors")
    save_file({"images": images}, tmp_path / "bare.safetensors")
    merge = {"greedy_soup": {"models": [str(other)]}}
    sections = {n: {"source": str(tmp_path / f"{n}.safetensors"), "samples": 12} for n in ("labelled", "bare")}
    report = compress.run({"passes": [merge], "calibration": sections["labelled"]}, tmp_path / "base", tmp_path / "out")
    alone = report.merged[0]["notes"]["alone"]
    assert all(each[""]["accuracy"] is not None for each in alone.values())
    with pytest.raises(DataError, match="which has no labels"):
        compress.run({"passes": [merge], "calibration": sections["bare"]}, tmp_path / "base", tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- interrupted ------------------------------------------------------------------------------------------------------


@FILES
@pytest.mark.parametrize(
    "merge",
    [
        "adamerging: {models: [./other, ./third], steps: 6, batch_size: 2}",
        pytest.param("greedy_soup: {models: [./other, ./third]}", marks=pytest.mark.real),
        pytest.param(
            "ties: {models: [./other, ./third], choose: {scale: [0.5, 1], density: [0.2, 0.5]}}",
            marks=pytest.mark.real,
        ),
    ],
    ids=["adamerging", "greedy_soup", "choose"],
)
def test_killed_between_files_the_end_is_the_same_and_nothing_is_learned_twice(
    merge: str, files: int, tmp_path: Path
) -> None:
    text = "calibration: {source: calibration.txt, samples: 6, length: 32}\npasses:\n  - "
    whole, killed = prepare(tmp_path, f"{text}{merge}\n  - rtn: {{bits: 4}}\n")
    for seed, name in enumerate(("other", "third")):
        other = make_changed(tmp_path / f"{name}-model", tmp_path / "model", seed, size=2e-2)
        for folder in (whole, killed):
            (folder / name).symlink_to(other)
    assert run(whole, "model") == 0
    done: dict[str, int] = {}
    for _ in range(40):
        code = run(killed, "model", kill_after=files)
        if code == 0:
            break
        assert not (killed / "out").exists()
        kept = [path for path in (killed / "out.work").iterdir() if "-try-" in path.name or "-facts" in path.name]
        found = {path.name: path.stat().st_mtime_ns for path in kept}
        assert found.items() >= done.items(), "what was finished is done again"
        if found == done and "s01-b0001.safetensors" in {path.name for path in (killed / "out.work").iterdir()}:
            break  # from here on the same files are published again: the end, and what is copied
        done = found
    assert code == 0 or run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


CHAIN = """\
calibration: {source: {first: calibration.txt, second: calibration.txt}, samples: 3, length: 32}
evaluate: {source: {first: calibration.txt, second: calibration.txt}, samples: 2, length: 32}
passes:
  - task_arithmetic: {models: [./other, ./third], choose: {scale: [0.3, 0.6]}}
  - wanda: {sparsity: "2:4", update: exact}
  - perp: {steps: 5, rank: 2}
  - flexround: {scheme: w4g32, steps: 5}
  - eora: {rank: 2}
"""


def test_merged_pruned_retrained_quantized_and_corrected_in_one_file_killed_again_and_again(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, CHAIN)
    for seed, name in enumerate(("other", "third")):
        other = make_changed(tmp_path / f"{name}-model", tmp_path / "model", seed, size=2e-2)
        for folder in (whole, killed):
            (folder / name).symlink_to(other)
    assert run(whole, "model") == 0
    kills = 0
    while run(killed, "model", kill_after=3 + 4 * kills) != 0:  # more every time: its end is written in one go
        kills += 1
    assert kills > 1
    assert contents(killed / "out") == contents(whole / "out")
    rows = json.loads((killed / "out" / "report.json").read_text())["rows"]
    steps = ["task_arithmetic", "wanda", "perp", "flexround", "eora"]
    assert [row["name"] for row in rows] == ["original", "./other", "./third", *steps]
