"""The plan: everything that can be known before work, known before work; and no weight is read for it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
from commands import compress_command, write_pipeline
from rich.console import Console
from selection import only
from torch import Tensor, nn

import compress
from compress.checkpoint import opening
from compress.checkpoint.sources import FolderSource
from compress.config.reading import parse
from compress.encodings import Spec
from compress.errors import ConfigError
from compress.models import graph
from compress.passes import PASSES, Average, LayerDrop, MergePass, Pass, Perp, Rtn
from compress.passes.base import Reach
from compress.planning import plan
from compress.planning.plan import PLANNERS, Plan
from compress.planning.state import initial
from compress.report import plan as plan_report

CALIBRATION = "calibration: {source: demo, samples: 2, length: 32}\n"


def planned(model: nn.Module, text: str) -> Plan:
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    return plan.make(parse(text, "p.yaml"), graph.find(model), dtypes, "p.yaml")


def refused(model: nn.Module, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        planned(model, text)
    return caught.value


def only_problem(model: nn.Module, text: str) -> tuple[str, str, int | None]:
    problems = refused(model, text).problems
    assert len(problems) == 1, problems
    return problems[0].path, problems[0].message, problems[0].line


@pytest.fixture
def garbage(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model whose weights file has a valid header and nothing but NaN behind it."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    return tmp_path


# --- no weight is read ------------------------------------------------------------------------------------------------


def test_check_and_plan_work_on_a_file_full_of_garbage_behind_its_header(garbage: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", CALIBRATION + "passes: [{gptq: {scheme: w4g32}}]")
    assert compress_command("check", pipeline, garbage).code == 0
    shown = compress_command("plan", pipeline, garbage, "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["passes"][0]["layers"] == 14


def test_check_and_plan_never_ask_for_a_value(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: FolderSource, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(FolderSource, "read", read)
    pipeline = write_pipeline(tmp_path / "p.yaml", "passes: [{magnitude: {sparsity: 2:4}}, {rtn: {scheme: w4g32}}]")
    assert compress_command("check", pipeline, tiny_folder).code == 0
    assert compress_command("plan", pipeline, tiny_folder).code == 0


def test_planning_leaves_no_parameter_in_memory(tiny_folder: Path) -> None:
    assert all(p.is_meta for p in opening.open_model(tiny_folder).artifact.graph.model.parameters())


# --- what a plan says -------------------------------------------------------------------------------------------------


def test_every_layer_inside_the_blocks_is_worked_on_and_the_head_is_not(tiny_llama: nn.Module) -> None:
    sites = {s.name for s in planned(tiny_llama, "passes: [rtn]").stages[0][0].sites}
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    leaves += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sites == {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in leaves}


def test_include_and_exclude_choose_the_layers(tiny_llama: nn.Module) -> None:
    text = "passes: [{rtn: {include: ['*.mlp.*', lm_head], exclude: ['*.0.*', '*.up_proj']}}]"
    sites = {s.name for s in planned(tiny_llama, text).stages[0][0].sites}
    assert sites == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head"}


IDLE = {
    "{include: ['*.mlp.*'], overrides: [{match: '*.q_proj', bits: 8}]}": (
        "overrides[0]",
        "only layers that rtn leaves alone",
    ),
    "{exclude: ['*.q_proj'], overrides: [{match: '*', bits: 8}, {match: '*.q_proj', bits: 3}]}": (
        "overrides[1]",
        "leaves",
    ),
    "{overrides: [{match: 'lm_head', bits: 8}]}": ("overrides[0]", "it works on layers like model.layers.0"),
    "{overrides: [{match: '*.q_proj', bits: 8}, {match: '*_proj', bits: 3}]}": ("overrides[0]", "the last one wins"),
    "{include: ['*.q_proj', '*.k_proj'], exclude: ['*.k_proj']}": ("include", "`exclude` leaves alone"),
}


@pytest.mark.parametrize(("options", "where", "words"), [(o, *said) for o, said in IDLE.items()], ids=IDLE.keys())
def test_a_pattern_that_changes_nothing_is_refused(options: str, where: str, words: str, tiny_llama: nn.Module) -> None:
    (problem,) = refused(tiny_llama, f"passes: [{{rtn: {options}}}]").problems
    assert problem.path == f"passes[0].rtn.{where}"
    assert words in problem.message


def test_an_override_that_wins_somewhere_is_fine(tiny_llama: nn.Module) -> None:
    planned(tiny_llama, "passes: [{rtn: {overrides: [{match: '*_proj', bits: 8}, {match: '*.q_proj', bits: 3}]}}]")


def test_fused_passes_are_one_stage(tiny_llama: nn.Module) -> None:
    made = planned(tiny_llama, CALIBRATION + "passes: [{blockwise: [wanda, gptq]}, {rtn: {include: [lm_head]}}]")
    assert [[p.path for p in stage] for stage in made.stages] == [
        ["passes[0].blockwise[0].wanda", "passes[0].blockwise[1].gptq"],
        ["passes[1].rtn"],
    ]


ESTIMATED = {
    "rtn in groups": "{rtn: {scheme: w4g32}}",
    "rtn by channel, 3 bits": "{rtn: {bits: 3}}",
    "rtn by tensor, symmetric": "{rtn: {bits: 8, granularity: tensor, symmetric: true}}",
    "overrides": "{rtn: {scheme: w4g32, overrides: [{match: '*.mlp.*', bits: 2, group_size: 64}]}}",
    "the head": "{rtn: {scheme: w4g32, include: ['*']}}",
    "magnitude": "{magnitude: {sparsity: 0.5}}",
    "a pattern": "{magnitude: {sparsity: 1:4}}",
    "global magnitude": "{global_magnitude: {sparsity: 0.7}}",
    "pruned and quantized": "{magnitude: {sparsity: 0.6}}, {rtn: {scheme: w4g32}}",
    "pruned twice": "{magnitude: {sparsity: 0.3}}, {magnitude: {sparsity: 0.6, include: ['*.mlp.*']}}",
    "fused": "{blockwise: [{magnitude: {sparsity: 2:4}}, {rtn: {bits: 4}}]}",
    "low rank": "{low_rank: {ratio: 0.4, steps: 0, method: svd, overrides: [{match: '*.mlp.*', ratio: 0.7}]}}",
    "sparse and thin": "{oats: {iterations: 2, scaling: none, sparsity: 0.6, ratio: 0.3}}",
    "a pattern and thin": "{oats: {iterations: 2, scaling: none, sparsity: 2:4, ratio: 0.3}}",
}


@pytest.mark.parametrize("entries", only(list(ESTIMATED.values())[::3], ESTIMATED.values()), ids=ESTIMATED.keys())
def test_the_size_estimate_is_within_two_percent_of_the_written_size(
    entries: str, tiny_folder: Path, tmp_path: Path
) -> None:
    pipeline = parse(f"passes: [{entries}]")
    opened = opening.open_model(tiny_folder)
    expected = plan.make(pipeline, opened.artifact.graph, opened.dtypes)
    compress.run(pipeline, tiny_folder, tmp_path / "out")
    data = (tmp_path / "out" / "compress.safetensors").read_bytes()
    written = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert expected.final_bytes == pytest.approx(written, rel=0.02)
    assert expected.original_bytes == pytest.approx((tiny_folder / "model.safetensors").stat().st_size, rel=0.02)


PATTERNED = {  # passes on 64 and 128 columns -> the pattern masks are stored with, or None
    "{magnitude: {sparsity: 2:4}}": "2:4",
    "{magnitude: {sparsity: 4:8}}": "4:8",
    "{magnitude: {sparsity: 1:2}}": "2:4",
    "{magnitude: {sparsity: 8:16}}": None,
    "{magnitude: {sparsity: 0.5}}": None,
    "{magnitude: {sparsity: 1:4}}, {rtn: {scheme: w4g32}}": "1:4",
    "{magnitude: {sparsity: 2:4}}, {magnitude: {sparsity: 1:4}}": "1:4",
    "{magnitude: {sparsity: 2:4}}, {magnitude: {sparsity: 3:4}}": "2:4",
    "{magnitude: {sparsity: 2:4}}, {magnitude: {sparsity: 3:8}}": "3:8",
    "{magnitude: {sparsity: 2:4}}, {magnitude: {sparsity: 0.5}}": "2:4",
    "{magnitude: {sparsity: 2:4}}, {magnitude: {sparsity: 0.625}}": None,
}


Specs = dict[str, Spec]


def planned_and_written(entries: str, model: Path, out: Path) -> tuple[Specs, Specs]:
    pipeline, opened = parse(f"passes: [{entries}]"), opening.open_model(model)
    expected = plan.make(pipeline, opened.artifact.graph, opened.dtypes).stages[-1][-1].specs
    compress.run(pipeline, model, out)
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    return expected, {name: Spec.from_json(data) for name, data in modules.items()}


@pytest.mark.parametrize("entries", only(list(PATTERNED)[::3], PATTERNED))
def test_the_pattern_of_a_mask_and_its_bytes_are_planned_as_they_are_written(
    entries: str, tiny_folder: Path, tmp_path: Path
) -> None:
    expected, written = planned_and_written(entries, tiny_folder, tmp_path / "out")
    assert {s.pattern and str(s.pattern) for s in written.values()} == {PATTERNED[entries]}
    assert expected == written


@pytest.mark.parametrize("first", ["4:8", "0.3"])
def test_zeros_by_two_rules_that_do_not_nest_are_planned_and_written_as_a_bitmap(
    first: str, tiny_folder: Path, tmp_path: Path
) -> None:
    entries = f"{{magnitude: {{sparsity: {first}}}}}, {{magnitude: {{sparsity: 2:4}}}}"
    expected, written = planned_and_written(entries, tiny_folder, tmp_path / "out")
    assert {s.pattern for s in (*expected.values(), *written.values())} == {None}


def test_peak_memory_does_not_grow_with_the_number_of_blocks(llama_maker: Callable[..., nn.Module]) -> None:
    text = CALIBRATION + "passes: [gptq]"
    few, many = (planned(llama_maker(num_hidden_layers=n), text) for n in (2, 6))
    assert many.memory.total == few.memory.total
    assert many.original_bytes > few.original_bytes


def test_peak_memory_grows_with_the_calibration_data(tiny_llama: nn.Module) -> None:
    texts = [f"calibration: {{samples: {n}, length: 128}}\npasses: [gptq]" for n in (8, 800)]
    few, many = (planned(tiny_llama, text).memory.parts for text in texts)
    assert many["activations"] - few["activations"] == 792 * 128 * 64 * 4
    assert many["data"] - few["data"] == 792 * 128 * 8


# --- where sparsity goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (
            "{magnitude: {allocate: farms}}",
            "in blocks whose spectra .*; decided from the weights alone; --shares shows how",
        ),
        (
            "{magnitude: {allocate: global, allocate_by: site}}",
            "50% zeros in all, more in layers whose scores are small",
        ),
        ("{magnitude: {allocate: owl}}", "with few outliers; decided from calibration data while running"),
        (
            "{wanda: {allocate: global, sparsity: 0.655}}",
            "65.5% zeros .* calibration data .* shown by `compress inspect`",
        ),
        ("reorder, {magnitude: {allocate: farms}}", "the passes before it leave are not known yet"),
        ("{blockwise: [{magnitude: {allocate: farms}}, rtn]}", "blockwise.0..magnitude: .* from the weights alone"),
        ("global_magnitude", "layers whose weights are small beside the others'; decided from the weights alone"),
    ],
)
def test_plan_says_what_decides_where_sparsity_goes_and_reads_no_weight_for_it(
    passes: str, said: str, garbage: Path, tmp_path: Path
) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{CALIBRATION}passes: [{passes}]")
    shown = compress_command("plan", pipeline, garbage)
    assert shown.code == 0, shown.err
    assert re.search(said, shown.out)
    assert "█" not in shown.out


@pytest.mark.parametrize(
    "entry",
    [
        "magnitude: {sparsity: 0.6, allocate: global}",
        "magnitude: {sparsity: 0.6, allocate: farms}",
        "wanda: {sparsity: 0.6, allocate: alphapruning, allocate_by: site, exclude: ['*.up_proj']}",
        "global_magnitude: {sparsity: 0.6}",
    ],
)
def test_the_shares_that_plan_shows_are_those_of_the_run(
    entry: str, tiny_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    text = f"{CALIBRATION}passes: [{{{entry}}}]"
    shown = compress_command("plan", write_pipeline(tmp_path / "p.yaml", text), tiny_folder, "--shares", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)["passes"][0]["shares"]
    compress.run(parse(text), tiny_folder, tmp_path / "out", calibration=tokens)
    rows = json.loads(compress_command("inspect", tmp_path / "out", "--json").out)
    assert found.keys() == {row["layer"] for row in rows}
    assert len(set(found.values())) > 1
    for row in rows:
        assert row["sparsity"] == pytest.approx(found[row["layer"]], abs=1e-6)


def test_shares_are_drawn_by_block_and_those_not_known_are_told_apart(tiny_folder: Path, tmp_path: Path) -> None:
    passes = "{magnitude: {allocate: farms}}, {wanda: {sparsity: 0.7, allocate: owl}}, {magnitude: {allocate: farms}}"
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{CALIBRATION}passes: [{passes}]")
    lines = compress_command("plan", pipeline, tiny_folder, "--shares").out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("passes[0].magnitude: "))
    assert lines[first].endswith("decided from the weights alone")
    assert [line.split()[0] for line in lines[first + 1 : first + 4]] == ["model.layers.0", "model.layers.1", "in"]
    assert all("█" in line and "%" in line for line in lines[first + 1 : first + 4])
    assert [line.partition(":")[0] for line in lines[first + 4 :]] == ["passes[1].wanda", "passes[2].magnitude"]
    rows = json.loads(compress_command("plan", pipeline, tiny_folder, "--shares", "--json").out)["passes"]
    assert [row["shares"] is None for row in rows] == [False, True, True]


def test_asked_for_shares_where_all_are_the_same_plan_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", "passes: [magnitude]")
    assert "no pass gives layers different shares" in compress_command("plan", pipeline, tiny_folder, "--shares").out


def test_a_weight_that_is_not_finite_is_refused_when_shares_are_asked_for(garbage: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", "passes: [{magnitude: {allocate: farms}}]")
    ended = compress_command("plan", pipeline, garbage, "--shares")
    assert (ended.code, ended.out) == (1, "")
    assert "NaN or infinite" in ended.err


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_names_the_layers_and_what_would(tiny_llama: nn.Module) -> None:
    problems = refused(tiny_llama, "passes:\n  - rtn: {scheme: w4g48}\n").problems
    assert [p.path for p in problems] == ["passes[0].rtn"] * 2
    by_width = {64 if "64 columns" in p.message else 128: p for p in problems}
    assert "model.layers.0.self_attn.q_proj" in by_width[64].message
    assert "and 9 more" in by_width[64].message
    assert "16, 32, 64 would" in by_width[64].message
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj:" in by_width[128].message
    assert "16, 32, 64, 128 would" in by_width[128].message
    assert all("48" in p.message and "overrides" in p.message and p.line == 2 for p in problems)


def test_a_width_that_no_usual_group_divides_is_told_to_go_by_channel(llama_maker: Callable[..., nn.Module]) -> None:
    message = only_problem(llama_maker(intermediate_size=101), "passes: [{rtn: {scheme: w4g32}}]")[1]
    assert "101 columns" in message
    assert "per channel" in message


def test_a_group_size_that_fits_after_overrides_is_fine(tiny_llama: nn.Module) -> None:
    text = "passes: [{rtn: {scheme: w4g128, exclude: ['*.q_proj'], overrides: [{match: '*j', group_size: 64}]}}]"
    assert planned(tiny_llama, text).stages


def test_a_pattern_that_does_not_fit_the_columns_names_the_layers(llama_maker: Callable[..., nn.Module]) -> None:
    message = only_problem(llama_maker(intermediate_size=102), "passes: [{magnitude: {sparsity: 2:4}}]")[1]
    assert "mlp.down_proj" in message
    assert "102" in message


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ("include: ['*.q_prj']", "include"),
        ("exclude: ['lm-head']", "exclude"),
        ("overrides: [{match: '*.q_prj', bits: 8}]", "overrides"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist(
    options: str, option: str, tiny_llama: nn.Module
) -> None:
    problems = {p.path: p for p in refused(tiny_llama, f"passes:\n  - rtn: {{{options}}}\n").problems}
    problem = problems[f"passes[0].rtn.{option}"]
    assert "matches no layer" in problem.message
    assert "model.layers.0.self_attn.q_proj" in problem.message
    assert problem.line == 2


def test_a_pass_left_with_no_layer_is_refused(tiny_llama: nn.Module) -> None:
    path, message, _ = only_problem(tiny_llama, "passes: [{rtn: {exclude: ['*']}}]")
    assert path == "passes[0].rtn"
    assert "no layer at all" in message


@pytest.mark.parametrize("pruner", ["magnitude", "global_magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_pruner_after_a_quantizer_is_refused(pruner: str, quantizer: str, tiny_llama: nn.Module) -> None:
    path, message, line = only_problem(tiny_llama, f"{CALIBRATION}passes:\n  - {quantizer}\n  - {pruner}\n")
    assert (path, line) == (f"passes[1].{pruner}", 4)
    assert "quantized weights" in message
    assert "model.layers.0.self_attn.q_proj" in message
    assert f"Put {pruner} before the quantizer" in message


def test_quantizing_twice_is_refused_and_quantizing_different_layers_is_not(tiny_llama: nn.Module) -> None:
    assert only_problem(tiny_llama, "passes: [rtn, {rtn: {include: ['*.q_proj']}}]")[0] == "passes[1].rtn"
    assert planned(tiny_llama, "passes: [{rtn: {exclude: ['*.q_proj']}}, {magnitude: {include: ['*.q_proj']}}]").stages


def test_a_pruner_before_a_quantizer_inside_a_fused_stage_is_fine_and_the_other_way_is_refused(
    tiny_llama: nn.Module,
) -> None:
    assert planned(tiny_llama, "passes: [{blockwise: [magnitude, rtn]}]").stages
    path, _, _ = only_problem(tiny_llama, "passes: [{blockwise: [rtn, magnitude]}]")
    assert path == "passes[0].blockwise[1].magnitude"


def test_a_mistake_in_a_fused_stage_of_one_has_the_path_of_the_file(tiny_llama: nn.Module) -> None:
    path, _, line = only_problem(tiny_llama, "passes:\n  - blockwise:\n      - rtn: {exclude: ['*']}\n")
    assert (path, line) == ("passes[0].blockwise[0].rtn", 3)


def test_a_pass_that_needs_the_whole_model_cannot_be_fused(tiny_llama: nn.Module) -> None:
    path, message, _ = only_problem(tiny_llama, "passes: [{blockwise: [global_magnitude, rtn]}]")
    assert path == "passes[0].blockwise[0].global_magnitude"
    assert "whole model" in message


@pytest.mark.parametrize("method", ["rtn", "magnitude"])
def test_a_pattern_that_matches_whatever_there_is_names_no_embedding(
    method: str, llama_maker: Callable[..., nn.Module]
) -> None:
    text = f"passes: [{{{method}: {{include: ['*']}}}}]"
    for tied, outside in ((True, []), (False, ["lm_head"])):
        (part,) = planned(llama_maker(tie_word_embeddings=tied), text).stages[0]
        assert [site.name for site in part.sites if site.block is None] == outside


@pytest.mark.parametrize("method", ["adaround", "flexround", "nupes", "perp_reconstruct"])
def test_a_head_is_refused_for_a_pass_that_learns_blocks(method: str, tiny_llama: nn.Module) -> None:
    path, message, _ = only_problem(tiny_llama, CALIBRATION + f"passes: [{{{method}: {{include: [lm_head, '*j']}}}}]")
    assert path == f"passes[0].{method}"
    assert "lm_head is outside the blocks" in message
    assert "rtn" in message


@pytest.mark.parametrize("method", ["gptq", "wanda", "sparsegpt"])
def test_missing_calibration_is_refused_with_an_example(method: str, tiny_llama: nn.Module) -> None:
    path, message, line = only_problem(tiny_llama, f"passes:\n  - magnitude\n  - {method}\n")
    assert (path, line) == (f"passes[1].{method}", 3)
    assert f"{method} learns from data" in message
    assert "calibration: {source: demo, samples: 128, length: 512}" in message


@pytest.mark.parametrize("method", ["rtn", "magnitude", "global_magnitude"])
def test_a_data_free_pass_needs_no_calibration(method: str, tiny_llama: nn.Module) -> None:
    assert planned(tiny_llama, f"passes: [{method}]").stages


@pytest.mark.parametrize("section", ["calibration", "evaluate"])
def test_windows_longer_than_the_models_positions_are_refused(section: str, tiny_llama: nn.Module) -> None:
    path, message, line = only_problem(tiny_llama, f"passes: [rtn]\n{section}: {{source: demo, length: 129}}\n")
    assert (path, line) == (f"{section}.length", 2)
    assert "129" in message
    assert "128 positions" in message
    assert planned(tiny_llama, f"passes: [rtn]\n{section}: {{source: demo, length: 128}}\n").stages


def test_a_global_sparsity_that_the_minimum_makes_impossible_is_refused_with_the_most_that_is_possible(
    tiny_llama: nn.Module,
) -> None:
    path, message, _ = only_problem(tiny_llama, "passes: [{global_magnitude: {sparsity: 0.9, min_keep: 0.02}}]")
    assert path == "passes[0].global_magnitude.sparsity"
    # Weights: 2 x (2 x 64 x 64 + 2 x 32 x 64 + 3 x 128 x 64) = 73728, of which each of 14 layers keeps 1474.
    assert f"at most {1 - 14 * 1474 / 73728:.4f}" in message
    assert planned(tiny_llama, "passes: [{global_magnitude: {sparsity: 0.72, min_keep: 0.02}}]").stages


def test_global_magnitude_does_not_ignore_overrides_in_silence(tiny_llama: nn.Module) -> None:
    text = "passes: [{global_magnitude: {sparsity: 0.5, overrides: [{match: '*.mlp.*', sparsity: 0.9}]}}]"
    assert refused(tiny_llama, text).problems


def test_everything_impossible_is_shown_at_once(tiny_llama: nn.Module) -> None:
    error = refused(
        tiny_llama,
        "evaluate: {source: demo, length: 999}\n"
        "passes:\n"
        "  - rtn: {scheme: w4g48, exclude: ['*.gone']}\n"
        "  - gptq\n"
        "  - global_magnitude: {sparsity: 0.99, min_keep: 0.05}\n",
    )
    paths = {(p.line, p.path) for p in error.problems}
    assert paths >= {
        (1, "evaluate.length"),
        (3, "passes[0].rtn"),
        (3, "passes[0].rtn.exclude"),
        (4, "passes[1].gptq"),
        (5, "passes[2].global_magnitude"),
        (5, "passes[2].global_magnitude.sparsity"),
    }
    assert all(line.startswith("p.yaml:") for line in str(error).splitlines())


def test_a_model_without_language_is_planned_too() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    assert {s.name for s in planned(model, "passes: [rtn]").stages[0][0].sites} == {"0", "2"}


# --- how it plans -----------------------------------------------------------------------------------------------------


def test_every_reach_has_a_planner_and_every_pass_a_reach() -> None:
    assert PLANNERS.keys() == set(get_args(Reach))
    assert {p.reach for p in PASSES} == PLANNERS.keys()


@pytest.mark.parametrize(
    "pass_", [Rtn(bits=4), Perp(), LayerDrop(blocks=1), Average(models=("other",))], ids=lambda p: p.key
)
def test_planning_a_pass_leaves_the_state_before_it_as_it_was(pass_: Pass, tiny_llama: nn.Module) -> None:
    dtypes = {name: p.dtype for name, p in tiny_llama.named_parameters(remove_duplicate=False)}
    before, same = initial(graph.find(tiny_llama), dtypes), initial(graph.find(tiny_llama), dtypes)
    planned = PLANNERS[pass_.reach](before, "passes[0].x", pass_, fused=False, first=True)
    assert replace(before, graph=same.graph) == same
    assert planned.state.merges == isinstance(pass_, MergePass)
    assert planned.state.shorter == isinstance(pass_, LayerDrop)


# --- how it is shown --------------------------------------------------------------------------------------------------


def test_a_pass_that_trains_vectors_only_is_shown_without_bits_per_weight(tiny_llama: nn.Module) -> None:
    text = CALIBRATION + "passes: [{magnitude: {sparsity: 0.5}}, {perp: {exclude: ['*_proj', lm_head]}}]"
    (_, row) = plan_report.rows(plan_report.Shown(planned(tiny_llama, text)))
    assert (row["layers"], row["weights"], row["bits_per_weight"]) == (0, 0, None)


def test_what_looks_like_markup_in_a_name_is_shown_as_it_is(tiny_llama: nn.Module) -> None:
    made = planned(tiny_llama, "passes: [{average: {models: ['a[/x]']}}]")
    console = Console(width=160, file=StringIO())
    console.print(plan_report.table(plan_report.Shown(made, title="[/y] on [z]")))
    assert isinstance(console.file, StringIO)
    assert "merged with a[/x]" in console.file.getvalue()
    assert "[/y] on [z]" in console.file.getvalue()
