"""The pipeline file: YAML to a typed pipeline and back, and every mistake with its place."""

import dataclasses
import math
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import compress_command, files_of, make_text_model, write_pipeline, write_text

import compress
from compress.config.lines import document, line_of
from compress.config.options import check_options, errors_in
from compress.config.pipeline import FORMATS, METHODS, Calibration, Evaluation, Pipeline
from compress.config.reading import load_pipeline, parse
from compress.config.schema import schema
from compress.config.writing import dump
from compress.errors import ConfigError, UsageError
from compress.passes import (
    PASSES,
    GlobalMagnitude,
    Gptq,
    Magnitude,
    Override,
    Pass,
    Pcb,
    Perp,
    Rtn,
    SparseGpt,
    Ties,
    Wanda,
)
from compress.passes.merge.schedules import Matched

SCHEMA = schema()
CLASSES: list[type[Any]] = [*METHODS.values(), *FORMATS.values()]
SHIPPED = sorted((Path(__file__).parent.parent / "compress" / "config" / "presets").glob("*.yaml"))

FULL = """\
description: everything at once
seed: 7
dtype: bfloat16
calibration: {source: demo, samples: 16, length: 64, field: body, subset: raw}
evaluate: {source: demo, samples: 8, after: end, max_increase: 10%}
export: [safetensors]
passes:
  - magnitude
  - global_magnitude: {sparsity: 0.25, min_keep: 0.001, exclude: ["*.down_proj"]}
  - wanda: {sparsity: "2:4"}
  - blockwise:
      - sparsegpt: {sparsity: 0.3, damping: 0.1, tile: 32}
      - gptq:
          scheme: w4g128
          act_order: true
          include: ["*.q_proj", lm_head]
          overrides:
            - {match: "*.down_proj", bits: 8, group_size: null}
            - {match: "*.0.*", scheme: w3g32}
  - rtn: {bits: 3, granularity: tensor, symmetric: true, scale_search: mse}
"""

VALID = {
    "everything": FULL,
    "one bare method": "passes: [rtn]",
    "options of null": "passes: [{rtn: }]",
    "no passes": "passes: []\nexport: [hf]",
    "a pattern without quotes": "passes: [{magnitude: {sparsity: 2:4}}]",
    "a long pattern": "passes: [{magnitude: {sparsity: 16:32}}]",
    "a very small number": "passes: [{global_magnitude: {min_keep: 0.000001}}]",
    "one wildcard instead of a list": "passes: [{rtn: {exclude: '*.o_proj'}}]",
    "a text that looks like a number": "description: '0123'\npasses: [rtn]",
    "a text with everything YAML minds": "description: \"yes: 'no' # {x} [y] \\n\\t é 2:4\"\npasses: [rtn]",
    "a text that another reader takes for a number": "description: '1e5'\npasses: [rtn]",
    "a fused stage of one": "passes: [{blockwise: [rtn]}]",
    "the same pass twice by reference": "passes: [&p {magnitude: {sparsity: 0.1}}, *p]",
}


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "p.yaml")
    return caught.value


def only_problem(text: str) -> tuple[str, str, int | None]:
    problems = refused(text).problems
    assert len(problems) == 1, problems
    return problems[0].path, problems[0].message, problems[0].line


# --- to types ---------------------------------------------------------------------------------------------------------


def test_a_file_becomes_typed_objects() -> None:
    pipeline = parse(FULL)
    assert pipeline == Pipeline(
        description="everything at once",
        seed=7,
        dtype="bfloat16",
        calibration=Calibration(source="demo", samples=16, length=64, field="body", subset="raw"),
        evaluate=Evaluation(source="demo", samples=8, after="end", max_increase=0.1),
        export=(),
        passes=(
            (Magnitude(),),
            (GlobalMagnitude(sparsity=0.25, min_keep=0.001, exclude=("*.down_proj",)),),
            (Wanda(sparsity="2:4"),),
            (
                SparseGpt(sparsity=0.3, damping=0.1, tile=32),
                Gptq(
                    bits=4,
                    group_size=128,
                    act_order=True,
                    include=("*.q_proj", "lm_head"),
                    overrides=(
                        Override("*.down_proj", {"bits": 8, "group_size": None}),
                        Override("*.0.*", {"bits": 3, "group_size": 32}),
                    ),
                ),
            ),
            (Rtn(bits=3, granularity="tensor", symmetric=True, scale_search="mse"),),
        ),
    )


def test_a_method_alone_means_its_defaults() -> None:
    assert parse("passes: [rtn]") == parse("passes: [{rtn: {}}]") == parse("passes:\n  - rtn:\n")


def test_passes_keep_the_order_of_the_file() -> None:
    keys = [stage[0].key for stage in parse("passes: [wanda, rtn, magnitude]\ncalibration: {source: demo}").passes]
    assert keys == ["wanda", "rtn", "magnitude"]


def test_a_mapping_reads_as_the_file_does() -> None:
    assert load_pipeline(yaml.safe_load(FULL)) == parse(FULL)


def test_a_pipeline_that_is_built_already_is_taken_as_it_is() -> None:
    pipeline = parse(FULL)
    assert load_pipeline(pipeline) is pipeline


def test_a_file_reads_as_its_text_does(tmp_path: Path) -> None:
    assert load_pipeline(write_pipeline(tmp_path / "p.yaml", FULL)) == parse(FULL)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "gone.yaml"))):
        load_pipeline(tmp_path / "gone.yaml")


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "10:20"])
def test_an_unquoted_pattern_is_a_pattern_and_no_number_in_base_sixty(pattern: str) -> None:
    pruner = parse(f"passes: [{{magnitude: {{sparsity: {pattern}}}}}]").passes[0][0]
    assert isinstance(pruner, Magnitude)
    assert pruner.sparsity == pattern


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "10:20"])
def test_a_written_pattern_stays_a_text_for_other_yaml_readers(pattern: str) -> None:
    written = dump(Pipeline(passes=((Magnitude(sparsity=pattern),),)))
    assert yaml.safe_load(written)["passes"][0]["magnitude"]["sparsity"] == pattern


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4", "2:", ":4", "2:4:8", "a:b", "50%"])
def test_an_impossible_pattern_is_refused(pattern: str) -> None:
    path, message, line = only_problem(f"passes:\n  - magnitude: {{sparsity: '{pattern}'}}")
    assert (path, line) == ("passes[0].magnitude.sparsity", 2)
    assert pattern in message


@pytest.mark.parametrize(
    ("scheme", "bits", "group_size"), [("w4g128", 4, 128), ("w3g32", 3, 32), ("w4", 4, None), ("w8", 8, None)]
)
def test_a_scheme_is_short_for_bits_and_group_size(scheme: str, bits: int, group_size: int | None) -> None:
    assert parse(f"passes: [{{rtn: {{scheme: {scheme}}}}}]").passes == ((Rtn(bits=bits, group_size=group_size),),)


@pytest.mark.parametrize("scheme", ["4", "g128", "w4a8", "w4g", "W4G128", "w4 g128", "int4"])
def test_a_mistaken_scheme_is_refused_with_an_example(scheme: str) -> None:
    path, message, line = only_problem(f"passes:\n  - rtn:\n      scheme: '{scheme}'")
    assert (path, line) == ("passes[0].rtn.scheme", 3)
    assert scheme in message
    assert "w4g128" in message


@pytest.mark.parametrize("scheme", ["w1", "w9g128", "w4g0"])
def test_a_scheme_with_impossible_numbers_is_refused(scheme: str) -> None:
    assert only_problem(f"passes: [{{rtn: {{scheme: {scheme}}}}}]")[0].startswith("passes[0].rtn.")


def test_a_pruner_has_no_scheme() -> None:
    path, message, _ = only_problem("passes: [{magnitude: {scheme: w4g128}}]")
    assert path == "passes[0].magnitude.scheme"
    assert "unknown option of magnitude" in message


def test_a_scheme_without_groups_means_one_scale_a_row_in_overrides_too() -> None:
    text = "passes: [{rtn: {scheme: w4g64, overrides: [{match: '*.down_proj', scheme: w8}]}}]"
    changed = parse(text).passes[0][0].at("model.layers.0.mlp.down_proj")
    assert isinstance(changed, Rtn)
    assert (changed.bits, changed.group_size) == (8, None)


def test_the_last_matching_override_wins_as_a_whole() -> None:
    text = """
passes:
  - rtn:
      scheme: w4g32
      overrides:
        - {match: "*.mlp.*", bits: 8, symmetric: true}
        - {match: "*.down_proj", bits: 2}
"""
    quantizer = parse(text).passes[0][0]
    assert quantizer.at("model.layers.0.self_attn.q_proj") == Rtn(bits=4, group_size=32)
    assert quantizer.at("model.layers.0.mlp.up_proj") == Rtn(bits=8, group_size=32, symmetric=True)
    assert quantizer.at("model.layers.0.mlp.down_proj") == Rtn(bits=2, group_size=32)


def test_overrides_reach_the_weights_they_match(tiny_llama: Any) -> None:
    text = "passes: [{rtn: {bits: 4, overrides: [{match: '*.mlp.*', bits: 8}, {match: '*.1.mlp.up_proj', bits: 3}]}}]"
    weights = compress.apply(tiny_llama, parse(text).passes).weights
    bits = {name: w.encoding.bits for name, w in weights.items() if w.encoding}
    assert len(bits) == 14
    for name, found in bits.items():
        assert found == (3 if name.endswith("1.mlp.up_proj") else 8 if ".mlp." in name else 4), name


def test_blockwise_is_one_stage_of_several_passes() -> None:
    pipeline = parse("calibration: {source: demo}\npasses:\n  - blockwise: [wanda, {gptq: {bits: 3}}]\n  - rtn\n")
    assert pipeline.passes == ((Wanda(), Gptq(bits=3)), (Rtn(),))


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_a_written_pipeline_reads_back_equal(text: str) -> None:
    pipeline = parse(text)
    assert parse(dump(pipeline)) == pipeline


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_writing_again_changes_nothing(text: str) -> None:
    written = dump(parse(text))
    assert dump(parse(written)) == written


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.name)
def test_a_shipped_pipeline_reads_back_equal(file: Path) -> None:
    pipeline = load_pipeline(file)
    assert pipeline.passes
    assert parse(dump(pipeline)) == pipeline


def test_the_written_file_states_every_option_that_changes_numbers() -> None:
    written = yaml.safe_load(dump(parse("passes: [rtn]")))
    assert {"seed", "dtype", "export"} <= set(written)
    assert written["passes"][0]["rtn"] == {
        "bits": 4,
        "embeddings": None,
        "group_size": None,
        "granularity": None,
        "fallback": None,
        "symmetric": False,
        "scale_search": "minmax",
        "activation_bits": None,
        "activation_scale": "token",
        "grid": "int",
        "activation_grid": "int",
    }


def test_the_resolved_file_runs_again_to_identical_bytes(tmp_path: Path) -> None:
    model, text = make_text_model(tmp_path / "model"), write_text(tmp_path / "words.txt")
    first = write_pipeline(
        tmp_path / "p.yaml",
        f"calibration: {{source: {text}, samples: 4, length: 32}}\n"
        f"evaluate: {{source: {text}, samples: 2, length: 32, max_increase: 900%}}\n"
        "passes:\n"
        "  - wanda: {sparsity: 2:4, include: '*.mlp.*'}\n"
        "  - blockwise: [{gptq: {scheme: w4g32, overrides: [{match: '*.v_proj', scheme: w8}]}}]\n",
    )
    assert compress_command("run", first, model, "-o", tmp_path / "one").code == 0
    assert compress_command("run", tmp_path / "one" / "pipeline.yaml", model, "-o", tmp_path / "two").code == 0
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {"compress.safetensors", "config.json", "pipeline.yaml", "README.md"} <= one.keys()
    differing = {name for name in one if one[name] != two[name]}
    assert differing <= {"report.json", "manifest.json"}, "only the report, which states seconds, and its digest"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_every_mistake_is_shown_at_once_with_file_line_and_path() -> None:
    error = refused(
        "calibraton: {source: demo}\n"  # 1 unknown key
        "evaluate: {sample: 4, length: 1}\n"  # 2 unknown key, impossible value
        "passes:\n"
        "  - gpqt: {bits: 4}\n"  # 4 unknown method
        "  - rtn:\n"
        "      bits: 40\n"  # 6 impossible value
        "      bit: 4\n"  # 7 unknown option
        "      symmetric: 3\n"  # 8 wrong type
        "  - wanda: {sparsity: 1.5}\n"  # 9 impossible value
        "  - magnitude: [1]\n"  # 10 no mapping
        "export: [onnxx]\n"  # 11 unknown format
        "seed: soon\n"  # 12 wrong type
    )
    found = {(p.line, p.path) for p in error.problems}
    assert found >= {
        (1, "calibraton"),
        (2, "evaluate.sample"),
        (2, "evaluate.length"),
        (4, "passes[0].gpqt"),
        (7, "passes[1].rtn.bit"),
        (8, "passes[1].rtn.symmetric"),
        (9, "passes[2].wanda.sparsity"),
        (10, "passes[3].magnitude"),
        (11, "export[0].onnxx"),
        (12, "seed"),
    }
    lines = str(error).splitlines()
    assert len(lines) == len(error.problems)
    assert all(re.match(r"p\.yaml:\d+: [\w.\[\]]+: .", line) for line in lines), lines


def test_a_wrong_type_does_not_hide_an_impossible_value_of_the_same_pass() -> None:
    found = {p.path for p in refused("passes: [{rtn: {bits: 40, symmetric: 3}}]").problems}
    assert found == {"passes[0].rtn.bits", "passes[0].rtn.symmetric"}


@pytest.mark.parametrize(
    ("text", "path", "meant"),
    [
        ("calibraton: {}\npasses: [rtn]", "calibraton", "calibration"),
        ("passes: [gpqt]", "passes[0].gpqt", "gptq"),
        ("passes: [{sparse_gpt: {}}]", "passes[0].sparse_gpt", "sparsegpt"),
        ("passes: [{rtn: {group_sze: 4}}]", "passes[0].rtn.group_sze", "group_size"),
        ("passes: [{rtn: {overrides: [{match: '*', bit: 4}]}}]", "passes[0].rtn.overrides[0].bit", "bits"),
        ("passes: [rtn]\nevaluate: {max_increse: 1%}", "evaluate.max_increse", "max_increase"),
        ("passes: [rtn]\nexport: safetensor", "export[0].safetensor", "safetensors"),
        ("passes: [{blockwise: [wnda]}]", "passes[0].blockwise[0].wnda", "wanda"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_known_one(text: str, path: str, meant: str) -> None:
    where, message, _ = only_problem(text)
    assert where == path
    assert f"did you mean {meant}?" in message


def test_an_unknown_word_is_answered_with_the_known_ones() -> None:
    message = only_problem("passes: [zzzzz]")[1]
    assert all(pass_.key in message for pass_ in PASSES)
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("seed: 1\npasses: [rtn]\nseed: 2\n", "seed", 3),
        ("passes:\n  - rtn:\n      bits: 4\n      bits: 4\n", "passes[0].rtn.bits", 4),
        ("passes: [rtn]\npasses: [wanda]\n", "passes", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, path: str, line: int) -> None:
    where, message, at = only_problem(text)
    assert (where, at) == (path, line)
    assert "twice" in message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("passes: [{rtn: {bits: four}}]", "passes[0].rtn.bits"),
        ("passes: [{rtn: {bits: 4.0}}]", "passes[0].rtn.bits"),
        ("passes: [{rtn: {bits: true}}]", "passes[0].rtn.bits"),
        ("passes: [{rtn: {bits: null}}]", "passes[0].rtn.bits"),
        ("passes: [{rtn: {bits: [4]}}]", "passes[0].rtn.bits"),
        ("passes: [{rtn: {symmetric: 1}}]", "passes[0].rtn.symmetric"),
        ("passes: [{rtn: {granularity: row}}]", "passes[0].rtn.granularity"),
        ("passes: [{rtn: {include: 3}}]", "passes[0].rtn.include"),
        ("passes: [{rtn: {include: [3]}}]", "passes[0].rtn.include"),
        ("passes: [{rtn: {overrides: {match: a}}}]", "passes[0].rtn.overrides"),
        ("passes: [{rtn: {overrides: [{bits: 4}]}}]", "passes[0].rtn.overrides[0]"),
        ("passes: [{rtn: {overrides: [{match: a, bits: x}]}}]", "passes[0].rtn.overrides[0].bits"),
        ("passes: [{rtn: {overrides: [{match: a, bits: 1}]}}]", "passes[0].rtn.overrides[0].bits"),
        ("passes: [{rtn: 4}]", "passes[0].rtn"),
        ("passes: [{rtn: {}, wanda: {}}]", "passes[0]"),
        ("passes: [3]", "passes[0]"),
        ("passes: rtn", "passes"),
        ("passes:", "passes"),
        ("passes: [{blockwise: rtn}]", "passes[0].blockwise"),
        ("passes: [{blockwise: []}]", "passes[0].blockwise"),
        ("seed: 1", ""),
        ("passes: [rtn]\nseed: 1.5", "seed"),
        ("passes: [rtn]\ndtype: float8", "dtype"),
        ("passes: [rtn]\ndescription: 3", "description"),
        ("passes: [rtn]\ncalibration: demo", "calibration"),
        ("passes: [rtn]\ncalibration: {samples: 0}", "calibration.samples"),
        ("passes: [rtn]\ncalibration: {samples: many}", "calibration.samples"),
        ("passes: [rtn]\ncalibration: {length: 1}", "calibration.length"),
        ("passes: [rtn]\ncalibration: {max_increase: 1%}", "calibration.max_increase"),
        ("passes: [rtn]\ncalibration: {source: gone.txt}", "calibration.source"),
        ("passes: [rtn]\ncalibration: {source: ./gone/}", "calibration.source"),
        ("passes: [rtn]\nevaluate: {after: never}", "evaluate.after"),
        ("passes: [rtn]\nevaluate: {max_increase: -0.1}", "evaluate.max_increase"),
        ("passes: [rtn]\nevaluate: {max_increase: lots}", "evaluate.max_increase"),
        ("passes: [rtn]\nevaluate: {max_increase: 1.2.3%}", "evaluate.max_increase"),
        ("passes: [rtn]\nevaluate: {max_increase: .nan}", "evaluate.max_increase"),
        ("passes: [{gptq: {damping: 0}}]", "passes[0].gptq.damping"),
        ("passes: [{gptq: {damping: .nan}}]", "passes[0].gptq.damping"),
        ("passes: [{gptq: {damping: .inf}}]", "passes[0].gptq.damping"),
        ("passes: [{gptq: {tile: 0}}]", "passes[0].gptq.tile"),
        ("passes: [{rtn: {group_size: 0}}]", "passes[0].rtn.group_size"),
        ("passes: [{rtn: {granularity: group}}]", "passes[0].rtn.granularity"),
        ("passes: [{rtn: {granularity: tensor, group_size: 32}}]", "passes[0].rtn.group_size"),
        ("passes: [{wanda: {free_rows: true, sparsity: 2:4}}]", "passes[0].wanda.free_rows"),
        ("passes: [{magnitude: {sparsity: 1}}]", "passes[0].magnitude.sparsity"),
        ("passes: [{magnitude: {sparsity: .nan}}]", "passes[0].magnitude.sparsity"),
        ("passes: [{global_magnitude: {sparsity: 2:4}}]", "passes[0].global_magnitude.sparsity"),
        ("passes: [{global_magnitude: {min_keep: -1}}]", "passes[0].global_magnitude.min_keep"),
        ("passes: [rtn]\nexport:", "export"),
        ("passes: [rtn]\nexport: []", "export"),
        ("passes: [rtn]\nexport: [gguf, 3]", "export[1]"),
        ("- rtn", ""),
        ("rtn", ""),
        ("", ""),
    ],
)
def test_an_impossible_value_is_refused_where_it_stands(text: str, path: str) -> None:
    assert path in {p.path for p in refused(text).problems}


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-2", 0.01), ("1E-2", 0.01), ("1.0e-2", 0.01), ("2", 2.0), (".5", 0.5), ("+0.5", 0.5)]
)
def test_a_number_may_be_written_in_any_usual_way(written: str, meant: float) -> None:
    quantizer = parse(f"calibration: {{source: demo}}\npasses: [{{gptq: {{damping: {written}}}}}]").passes[0][0]
    assert isinstance(quantizer, Gptq)
    assert quantizer.damping == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [("10%", 0.1), ("'2.5 %'", 0.025), ("0.1", 0.1), ("0", 0.0), ("1", 1.0), ("300%", 3.0), ("null", None)],
)
def test_the_gate_is_a_percentage_or_a_share(written: str, meant: float | None) -> None:
    section = parse(f"passes: [rtn]\nevaluate: {{max_increase: {written}}}").evaluate
    assert section is not None
    assert section.max_increase == pytest.approx(meant)
    written_again = parse(dump(parse(f"passes: [rtn]\nevaluate: {{max_increase: {written}}}"))).evaluate
    assert written_again == section, "above 1 too, where a plain number is refused"


IDLE = {
    "a gate above 1 that may mean per cent": (
        "evaluate: {max_increase: 10}\npasses: [rtn]",
        "evaluate.max_increase",
        "10%",
    ),
    "a fall of more than all": ("evaluate: {max_drop: 2}\npasses: [rtn]", "evaluate.max_drop", "2%"),
    "bits beside a scheme": ("passes: [{rtn: {scheme: w4g32, bits: 3}}]", "passes[0].rtn.bits", "scheme: w4g32"),
    "groups beside a scheme": (
        "passes: [{rtn: {scheme: w4, group_size: 64}}]",
        "passes[0].rtn.group_size",
        "one of the two",
    ),
    "both in an override": (
        "passes: [{rtn: {overrides: [{match: '*', scheme: w8, bits: 8}]}}]",
        "passes[0].rtn.overrides[0].bits",
        "scheme: w8",
    ),
    "nothing to do": ("passes: []", "passes", "nothing would be done"),
    "nothing to do but to write the packed folder": (
        "passes: []\nexport: [safetensors]",
        "passes",
        "nothing would be done",
    ),
}


@pytest.mark.parametrize(("text", "path", "words"), IDLE.values(), ids=IDLE.keys())
def test_a_setting_without_effect_is_refused(text: str, path: str, words: str) -> None:
    where, message, _ = only_problem(text)
    assert where == path
    assert words in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("passes: [rtn\nseed: 1\n", 2),
        ("passes:\n\t- rtn\n", 2),
        ("passes: 'rtn\n", None),
        ("passes: [*gone]\n", 1),
        ("passes: [rtn]\n---\npasses: [rtn]\n", 2),
        ("passes: [rtn]\0", None),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_at_its_line(text: str, line: int | None) -> None:
    error = refused(text)
    assert "not YAML" in str(error)
    if line is not None:
        assert error.problems[0].line == line


STRANGE = {
    "a template that was not filled in": "passes:\n  - rtn: {bits: {{bits}}}\n",
    "a list as a key": "? [a, b]\n: c\npasses: [rtn]\n",
    "a Python object": "passes: [rtn]\nseed: !!python/name:os.system ''\n",
    "an unknown tag": "passes: [rtn]\nseed: !mine 3\n",
    "a date that does not exist": "passes: [rtn]\ndescription: 2026-13-45\n",
    "an integer that is none": "passes: [rtn]\nseed: !!int abc\n",
    "bytes that are none": "passes: [rtn]\ndescription: !!binary abc%\n",
    "a list inside itself": "passes: &a [*a]\n",
    "a source with a name too long for a file": f"passes: [rtn]\ncalibration: {{source: {'a' * 5000}}}\n",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE.keys())
def test_strange_yaml_is_refused_in_words(text: str) -> None:
    assert refused(text).problems


HOSTILE = {
    "a name that ends with a dot": ("passes:\n  - gptq.\n", "passes[0].gptq.", 2),
    "a name with an index": ("passes:\n  - wanda[2:4]\n", "passes[0].wanda[2:4]", 2),
    "a name of dots and brackets": ("passes:\n  - '[..].[[0]'\n", "passes[0].[..].[[0]", 2),
    "an option that ends with a dot": ("passes:\n  - rtn: {bits.: 4}\n", "passes[0].rtn.bits.", 2),
    "an empty key": ("'': 1\npasses: [rtn]\n", "", 1),
    "aliases of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in pairwise("abcdefg"))
        + "passes: [rtn]\n",
        "",
        5,
    ),
    "mappings of aliases": (
        "a: &a {x: 1, y: 2}\n"
        + "".join(f"{n}: &{n} {{x: *{m}, y: *{m}}}\n" for m, n in pairwise("abcdefghijklmnopqrstu"))
        + "passes: [rtn]\n",
        "",
        15,
    ),
    "ten thousand brackets": ("passes: " + "[" * 10_000 + "]" * 10_000, "", None),
    "a number of many digits": ("passes:\n  - rtn: {bits: 0x" + "f" * 9_000 + "}\n", "passes[0].rtn.bits", 2),
    "an anchor inside itself": ("passes: &a\n  - *a\n", "", 1),
}


@pytest.mark.parametrize(("text", "path", "line"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_answered_at_once(text: str, path: str, line: int | None) -> None:
    began = time.process_time()
    error = refused(text)
    assert time.process_time() - began < 5
    assert (path, line) in {(p.path, p.line) for p in error.problems}
    assert len(str(error)) < 10_000


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("passes[0].rtn.bits", 3),
        ("passes[0].rtn.bits.deeper[4]", 3),
        ("passes[0].rtn.group_size", 2),
        ("passes[1].wanda", 1),
        ("passes[0].rtn.", 2),
        ("passes[0].rtn[2:4]", 2),
        ("seed", 1),
        ("...[[", 1),
        ("", 1),
    ],
)
def test_the_line_of_a_path_is_that_of_its_nearest_known_parent(path: str, line: int) -> None:
    lines = {"": 1, "passes": 1, "passes[0]": 2, "passes[0].rtn": 2, "passes[0].rtn.bits": 3}
    assert line_of(lines, path) == line
    assert line_of({}, path) is None


def test_problems_stand_in_the_order_of_the_file() -> None:
    lines = [p.line for p in refused("passes:\n  - rtn: {bits: 9}\n  - gpqt\nseed: x\nsed: 1\n").problems]
    assert lines == [2, 3, 4, 5]


def test_a_long_value_is_shortened() -> None:
    (problem,) = refused(f"passes: [{{rtn: {{bits: {'x' * 5000}}}}}]").problems
    assert len(problem.message) < 500
    assert problem.message.endswith("is not a whole number between 2 and 8")


def test_no_text_of_a_file_is_ever_run(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    text = f"passes: !!python/object/apply:os.mkdir ['{victim}']\n"
    refused(text)
    assert not victim.exists()


# --- schema -----------------------------------------------------------------------------------------------------------


ANNOTATIONS = {"examples", "$schema", "$defs", "title", "description", "default"}


def fits(value: Any, rule: dict[str, Any], whole: dict[str, Any]) -> bool:
    """As much of JSON Schema as the schema uses."""
    unknown = set(rule) - ANNOTATIONS - {
        "$ref", "anyOf", "enum", "const", "type", "pattern", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "properties", "required", "additionalProperties", "propertyNames", "items", "minItems",
        "minLength",
    }  # fmt: skip
    assert not unknown, f"this check does not know {unknown}"
    if "$ref" in rule:
        return fits(value, resolved(rule, whole), whole)
    if "anyOf" in rule and not any(fits(value, option, whole) for option in rule["anyOf"]):
        return False
    if "enum" in rule and not any(value == option and type(value) is type(option) for option in rule["enum"]):
        return False
    if "const" in rule and value != rule["const"]:
        return False
    kinds = rule.get("type", [])
    if kinds and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, str):
        matches = "pattern" not in rule or re.search(rule["pattern"], value) is not None
        return matches and len(value) >= rule.get("minLength", 0)
    if isinstance(value, dict):
        return _fits_mapping(value, rule, whole)
    if isinstance(value, list):
        return len(value) >= rule.get("minItems", 0) and all(fits(v, rule.get("items", {}), whole) for v in value)
    return not isinstance(value, int | float) or _within(value, rule)


def _fits_mapping(value: dict[str, Any], rule: dict[str, Any], whole: dict[str, Any]) -> bool:
    known, other = rule.get("properties", {}), rule.get("additionalProperties", {})
    if any(key not in value for key in rule.get("required", [])):
        return False
    if not all(fits(key, rule.get("propertyNames", {}), whole) for key in value):
        return False
    further = [part for key, part in value.items() if key not in known]
    if further and other is False:
        return False
    return all(fits(value[key], known[key], whole) for key in known if key in value) and all(
        fits(part, other, whole) for part in further
    )


def _within(value: float, rule: dict[str, Any]) -> bool:
    least, most = rule.get("minimum", -math.inf), rule.get("maximum", math.inf)
    above, below = rule.get("exclusiveMinimum", -math.inf), rule.get("exclusiveMaximum", math.inf)
    return bool(least <= value <= most and above < value < below)


def resolved(rule: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` refers to."""
    found: Any = whole
    for part in rule["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    assert isinstance(found, dict)
    return found


def accepted(text: str) -> bool:
    return fits(document(text, "p.yaml").values, SCHEMA, SCHEMA)


def _is(value: Any, kind: str) -> bool:
    kinds: dict[str, Any] = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None),
             "array": list, "object": dict}  # fmt: skip
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, kinds[kind])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.name)
def test_the_schema_accepts_the_shipped_pipelines(file: Path) -> None:
    assert accepted(file.read_text())


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_the_schema_accepts_what_the_reader_accepts(text: str) -> None:
    assert accepted(text)


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_the_schema_accepts_the_resolved_file(text: str) -> None:
    assert accepted(dump(parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1",
        "passes: rtn",
        "passes: [gpqt]",
        "passes: [{rtn: {bit: 4}}]",
        "passes: [{rtn: {bits: four}}]",
        "passes: [{rtn: {scheme: int4}}]",
        "passes: [{rtn: {}, wanda: {}}]",
        "passes: [{blockwise: []}]",
        "passes: [rtn]\ncalibraton: {}",
        "passes: [rtn]\ncalibration: {sample: 3}",
        "passes: [rtn]\nexport: [gif]",
        "passes: [rtn]\nlines: {}",
        "passes: [{rtn: {bits: 9}}]",
        "passes: [{rtn: {bits: 1}}]",
        "passes: [{rtn: {scheme: w9g128}}]",
        "passes: [{rtn: {scheme: w4g0}}]",
        "passes: [{olive: {bits: 5}}]",
        "passes: [{gptq: {damping: 0}}]",
        "passes: [{gptq: {include: [3]}}]",
        "passes: [{wanda: {sparsity: 1.0}}]",
        "passes: [{rtn: {overrides: [{bits: 4}]}}]",
        "passes: [{rtn: {overrides: [{match: a, bits: 9}]}}]",
        "passes: [{rtn: {overrides: [{match: a, include: b}]}}]",
        "passes: [{perp: {train: [nothing]}}]",
        "passes: [{ties: {models: [a], density: [{match: a, vale: 1}]}}]",
        "passes: [rtn]\nevaluate: {max_drop: -1}",
        "passes: [rtn]\nevaluate: {max_drop: 1.2.3%}",
        "passes: [rtn]\ncalibration: {source: {'': demo}}",
        "passes: [rtn]\ncalibration: {length: 1}",
        "passes: [rtn]\nexport: []",
        "passes: [rtn]\nexport: [{onnx: {accuracy_level: 2}}]",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    assert not accepted(text)
    refused(text)


METHODS_OF_SCHEMA = [name for option in SCHEMA["$defs"]["method"]["anyOf"] for name in option.get("properties", {})]


def options_of(cls: type[Any]) -> dict[str, Any]:
    """The rules for the options of a method or format."""
    rules = SCHEMA["$defs"][cls.__name__]["properties"]
    assert isinstance(rules, dict)
    return rules


def test_the_schema_knows_every_method_and_every_option() -> None:
    assert [pass_.key for pass_ in PASSES] == METHODS_OF_SCHEMA
    for pass_ in PASSES:
        names = {f.name for f in dataclasses.fields(pass_)}
        names |= {"scheme"} if "bits" in names else set()
        assert set(options_of(pass_)) == names


def test_the_schema_says_of_every_option_what_it_is_and_what_it_is_by_default() -> None:
    for cls in CLASSES:
        rules, name = options_of(cls), cls.__name__
        for f in dataclasses.fields(cls):
            assert rules[f.name]["description"], f"{name}.{f.name}"
            if f.name != "overrides":
                default = list(f.default) if isinstance(f.default, tuple) else f.default
                assert rules[f.name]["default"] == default, f"{name}.{f.name}"
    for name, section in SCHEMA["properties"].items():
        assert section["description"], name
        for option, rule in section.get("properties", {}).items():
            assert rule["description"], f"{name}.{option}"
            assert "default" in rule, f"{name}.{option}"


def test_a_format_that_is_called_like_a_method_has_options_of_its_own() -> None:
    assert accepted("passes: [{gptq: {bits: 3}}]\nexport: [{gptq: {checkpoint_format: gptq_v2}}]")
    assert not accepted("passes: [gptq]\nexport: [{gptq: {bits: 3}}]")
    assert not accepted("passes: [{gptq: {checkpoint_format: gptq_v2}}]")


def test_the_schema_states_ranges_and_allowed_values() -> None:
    gptq, eora = options_of(METHODS["gptq"]), options_of(METHODS["eora"])
    assert (gptq["bits"]["minimum"], gptq["bits"]["maximum"]) == (2, 8)
    assert gptq["damping"]["exclusiveMinimum"] == 0
    assert gptq["scale_search"]["enum"] == ["minmax", "mse", "weighted"]
    assert {"exclusiveMinimum": 0, "maximum": 1, "type": "number"} in eora["energy"]["anyOf"]
    assert {"enum": [4, 8], "type": "integer"} in eora["adapter_bits"]["anyOf"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_default_is_out_of_its_range(cls: type[Any]) -> None:
    made = cls()
    checked = check_options(cls, {f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
    assert not checked.mistyped
    assert not checked.outside


# --- quick to read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import compress, compress.cli", {"pydantic", "torch", "transformers", "numpy"}),
        (
            "from compress.config.reading import load_pipeline; load_pipeline('gptq-w4')",
            {"torch", "transformers", "numpy"},
        ),
        ("from compress.config.schema import schema; schema()", {"torch", "transformers", "numpy"}),
    ],
    ids=["the package", "a pipeline", "the schema"],
)
def test_what_only_reads_imports_nothing_heavy(code: str, modules: set[str]) -> None:
    asked = f"{code}; import sys; print(sorted({modules} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


# --- made in Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "option", "said"),
    [
        (Gptq(bits=9), "bits", "9 is not between 2 and 8"),
        (Gptq(bits="4"), "bits", "'4' is not a whole number between 2 and 8"),  # type: ignore[arg-type]
        (Gptq(damping="1e-2"), "damping", "'1e-2' is not a number above 0"),  # type: ignore[arg-type]
        (Gptq(damping=math.nan), "damping", "nan is not a number above 0"),
        (Gptq(include="*.q_proj"), "include", "'*.q_proj' is not a list"),  # type: ignore[arg-type]
        (Perp(train=("all",)), "train", "['all'] is not a list of some of bias, norm, head"),  # type: ignore[arg-type]
        (Gptq(overrides=(Override("*", {"bits": 1}),)), "overrides[0].bits", "1 is not between 2 and 8"),
        (Gptq(overrides=(Override("*", {"bist": 3}),)), "overrides[0].bist", "did you mean bits?"),
        (Gptq(overrides=(Override("*", {"include": ()}),)), "overrides[0].include", "unknown option of gptq"),
        (Gptq(overrides=("*",)), "overrides", "is not a list"),  # type: ignore[arg-type]
        (Gptq(embeddings=True), "embeddings", "True is not"),  # type: ignore[arg-type]
        (Gptq(embeddings={"bits": 9}), "embeddings.bits", "9 is not between 2 and 8"),
        (Ties(models=("a",), scale=(Matched("*", "x"),)), "scale", "is not a number or"),  # type: ignore[arg-type]
        (Pcb(models=("a",), choose={"clip": (0.1, 0.7)}), "clip", "0.7 is not from 0 to below 0.5"),
    ],
)
def test_a_pass_made_in_python_is_answered_as_a_file_is(made: Pass, option: str, said: str) -> None:
    (error,) = errors_in(made)
    assert error.option == option
    assert said in error.message
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_pipeline(Pipeline(passes=((made,),)))


def test_lists_and_whole_numbers_may_stand_for_tuples_and_numbers_in_python() -> None:
    assert not errors_in(Gptq(include=["*.q_proj"], damping=1))  # type: ignore[arg-type]
    assert not errors_in(Ties(models=["a"], scale=[1, 2]))  # type: ignore[arg-type]
