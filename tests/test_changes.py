"""`--set`: values of a pipeline changed on the command line."""

import contextlib
import random
from pathlib import Path

import pytest
from commands import compress_command

import compress
from compress.config.reading import load_pipeline
from compress.errors import ConfigError
from compress.passes import Pass

FUSED = {"passes": [{"blockwise": [{"wanda": {"sparsity": "2:4"}}, "rtn"]}], "calibration": {"source": "demo"}}


def only(*changes: str) -> Pass:
    ((pass_,),) = load_pipeline("gptq-w4", changes).passes
    return pass_


def test_a_value_takes_the_place_of_the_pipelines_and_the_last_wins() -> None:
    assert only("passes[0].gptq.damping=0.1", "passes[0].gptq.damping=0.2") == compress.Gptq(
        bits=4, group_size=64, damping=0.2
    )


def test_bits_and_group_size_are_changed_where_the_pipeline_has_a_scheme_and_the_other_way_round() -> None:
    assert only("passes[0].gptq.bits=3") == compress.Gptq(bits=3, group_size=64)
    assert only("passes[0].gptq.bits=3", "passes[0].gptq.scheme=w2g32") == compress.Gptq(bits=2, group_size=32)
    assert only("passes[0].gptq.group_size=null") == compress.Gptq(bits=4)


def test_sections_options_of_short_entries_and_entries_behind_the_last_may_be_new() -> None:
    made = load_pipeline(FUSED, ["passes[0].blockwise[1].rtn.bits=8", "passes[1]=eora", "evaluate.max_increase=5%"])
    assert made.passes == ((compress.Wanda(sparsity="2:4"), compress.Rtn(bits=8)), (compress.Eora(),))
    assert made.evaluate is not None
    assert made.evaluate.max_increase == 0.05
    assert FUSED["passes"] == [{"blockwise": [{"wanda": {"sparsity": "2:4"}}, "rtn"]}], "what was given is changed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("passes[0].rtn.bits=3", "--set: passes[0].rtn.bits: passes[0] is gptq, not rtn"),
        ("passes[2].gptq.bits=3", "--set: passes[2].gptq.bits: the last entry is passes[0]"),
        ("passes.gptq.bits=3", "--set: passes.gptq.bits: passes is [{'gptq'"),
        ("seed[0]=3", "--set: seed[0]: seed is no list"),
        (
            "calibration.samples.more=3",
            "--set: calibration.samples.more: calibration.samples is 128, which has no keys",
        ),
        ("passes[0].gptq.bits", "--set: 'passes[0].gptq.bits' is not KEY=VALUE, such as"),
        ("=3", "--set: '=3' is not KEY=VALUE"),
        ("passes[0].gptq.bits=[3", "--set:1: not YAML"),
        ("passes[0].gptq.bits=30", "gptq-w4.yaml with --set: passes[0].gptq.bits: 30 is not between 2 and 8"),
        ("passes[0].gptq.bitz=3", "passes[0].gptq.bitz: unknown option of gptq; did you mean bits?"),
        ("calibraton.samples=3", "calibraton: unknown key; did you mean calibration?"),
    ],
)
def test_a_key_that_leads_nowhere_and_an_impossible_value_are_errors_that_name_the_key(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline("gptq-w4", [change])
    assert said in str(caught.value)


def test_whatever_is_given_is_a_pipeline_or_an_error_in_a_sentence() -> None:
    draw = random.Random(0)
    words = ["passes", "[0]", "[1]", "[99999999999999999999]", ".", "gptq", "rtn", "bits", "scheme", "=", "3", "w4g"]
    words += [
        "[",
        "{",
        ": ",
        "null",
        "é",
        "-",
        "overrides",
        "blockwise",
        "export",
        "seed",
        "\n",
        "&a *a",
        "!!python/none",
    ]
    for _ in range(400):
        change = "".join(draw.choices(words, k=draw.randint(1, 7)))
        with contextlib.suppress(ConfigError):
            load_pipeline(draw.choice(["gptq-w4", FUSED]), [change])


def test_check_and_plan_take_changes_too() -> None:
    assert compress_command("check", "gptq-w4", "--set", "passes[0].gptq.bits=9").code == 2
    planned = compress_command("plan", "rtn-w4", "demo", "--set", "passes[0].rtn.bits=8", "--set", "evaluate=null")
    assert "8.375" in planned.out, planned.err


def test_a_changed_pipeline_is_not_written_over_the_folder_that_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "out" / "pipeline.yaml"
    file.parent.mkdir()
    file.write_text("passes: [rtn]")
    ended = compress_command("run", file, "demo", "-o", file.parent, "--overwrite", "--set", "seed=3")
    assert ended.code == 2
    assert "holds or lies in the pipeline" in ended.err
