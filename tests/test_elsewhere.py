"""Names and files of other tools where a pipeline is expected are answered with what to write."""

from pathlib import Path

import pytest
from commands import compress_command

from compress.config.elsewhere import of_file, of_name
from compress.config.pipeline import METHODS, PRESETS
from compress.config.reading import load_pipeline, parse
from compress.errors import UsageError

READY = sorted(file.stem for file in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("W4A16", "w4a16", "int4", "4bit", "INT4"), "write `gptq-w4`"),
        (("W8A8", "INT8_W8A8"), "write `rtn-w8a8`"),
        (("W4A8",), "write `flexround-w4a8`"),
        (("W2A16G32",), "write `compress quantize MODEL --bits 2 --group-size 32`"),
        (("W8A16", "int8"), "write `compress quantize MODEL --bits 8`"),
        (("Q4_K_M", "GGUF:Q4_K_M", "q4_k"), "write `compress quantize MODEL --type q4_k_m --for llama.cpp`"),
        (("Q2_K",), "write `compress quantize MODEL --type q2_k --for llama.cpp`"),
        (("IQ4_XS", "Q4_0"), "write `compress quantize MODEL --bits 4 --for llama.cpp`"),
        (("vllm", "marlin"), "write `compress quantize MODEL --bits 4 --for vllm`"),
        (("SGLang",), "write `compress quantize MODEL --bits 4 --for sglang`"),
        (("MLX",), "write `compress quantize MODEL --bits 4 --for mlx`"),
        (("auto-round", "AutoRound"), "flexround learns how to round, too: write `flexround-w2`"),
        (("AWQ", "awq"), "is called scale here; write `scale-rtn-w3` or `scale-gptq-w3`"),
        (("SmoothQuant",), "is called smooth here; write `smooth-rtn-w8a8`"),
        (("QuaRot",), "is called rotate here; write `rotate-gptq-w4a4`"),
        (("FP8", "fp8_dynamic", "FP8-BLOCK"), "is a grid, and a pipeline is expected; write `rtn-fp8`"),
        (("NVFP4", "nvfp4a16"), "write `gptq-nvfp4`"),
        (("MXFP4",), "write `gptq-mxfp4`"),
        (("nf4", "bnb-4bit"), "is not among the floats here (fp8, mxfp4, nvfp4); write `gptq-w4`"),
        (("onnx",), "give it `--set export=onnx`"),
        (("gptq", "GPTQ"), "is a method, and a pipeline is expected; write `gptq-w2`"),
        (("ties",), "write `compress merge BASE MODEL MODEL --method ties`"),
        (("expert_prune",), "write a file with `passes: [expert_prune]`"),
    ],
)
def test_a_name_of_another_tool_is_answered_with_what_to_write(names: tuple[str, ...], said: str) -> None:
    for name in names:
        with pytest.raises(UsageError) as caught:
            load_pipeline(name)
        assert str(caught.value).startswith(name)
        assert said in str(caught.value), name


@pytest.mark.parametrize("name", ["nf4", "hqq", "spinquant", "aqlm", "bnb-4bit"])
def test_names_of_methods_that_are_not_here_are_known_all_the_same(name: str) -> None:
    assert "write `" in str(of_name(name, READY))


def test_every_method_given_as_a_pipeline_is_answered_and_names_nobody_knows_are_not() -> None:
    assert all(of_name(key, READY) for key in METHODS)
    assert not any(of_name(name, READY) for name in ("pipeline", "gptq-w5", "my_model", "w", "q", ""))


RECIPE = """
DEFAULT_stage:
  DEFAULT_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    SpinQuantModifier: {rotations: [R1, R2]}
    SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4'}
    GPTQModifier: {targets: Linear, ignore: [lm_head, 're:.*gate'], scheme: W4A16}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RECIPE, '[{smooth: {strength: 0.8}}, {sparsegpt: {sparsity: "2:4"}}, {gptq: {scheme: w4g128}}]` (SpinQuantM'),
        (RECIPE, "what `ignore` names goes into `exclude`"),
        ("s: {m: {QuantizationModifier: {scheme: W8A8, ignore: [lm_head]}}}", "{scheme: w8, activation_bits: 8}"),
        ("s: {m: {AWQModifier: {scheme: W4A16_ASYM}}}", "[{scale: {scheme: w4g128}}, {rtn: {scheme: w4g128}}]"),
        (
            "s: {m: {QuantizationModifier: {scheme: FP8_DYNAMIC}}}",
            "{scheme: fp8, activation_bits: 8, activation_grid: f",
        ),
        ("s: {m: {QuantizationModifier: {scheme: NVFP4A16}}}", "`passes: [{rtn: {scheme: nvfp4}}]`"),
        ("s: {m: {LogarithmicEqualizationModifier: {}}}", "none of LogarithmicEqualizationModifier has a method here"),
        ("merge_method: ties", "`compress init pipeline.yaml --from-mergekit theirs.yaml` writes it as a pipeline"),
        ("{bits: 4, group_size: 128, quant_method: awq}", "write `compress quantize MODEL --bits 4 --group-size 128`"),
    ],
)
def test_a_file_of_another_tool_is_answered_with_what_to_do(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, "theirs.yaml")
    assert said in str(caught.value)


def test_passes_that_are_proposed_for_a_recipe_are_a_pipeline() -> None:
    with pytest.raises(UsageError) as caught:
        parse(RECIPE)
    proposed = str(caught.value).partition("`")[2].partition("`")[0]
    assert [stage[0].key for stage in parse(proposed).passes] == ["smooth", "sparsegpt", "gptq"]


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4"])
def test_every_scheme_of_a_recipe_is_proposed_as_options_that_are_possible(scheme: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"s: {{m: {{QuantizationModifier: {{scheme: {scheme}}}}}}}")
    (stage,) = parse(str(caught.value).partition("`")[2].partition("`")[0]).passes
    assert stage[0].bits == (4 if "4" in scheme else 8)


@pytest.mark.parametrize("values", [None, 3, [], {}, {"passes": []}, {"a": {"b": 1}}, {"bits": "4"}, {"bits": 99}])
def test_what_no_tool_wrote_is_left_to_the_reader_of_pipelines(values: object) -> None:
    assert of_file(values, "file") is None


def test_the_answer_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name in ("W4A16", tmp_path / "recipe.yaml"):
        ended = compress_command("run", name, "demo", "-o", tmp_path / "out")
        assert ended.code == 2
        assert ended.err.count("\n") == 1, ended.err
