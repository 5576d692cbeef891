"""`compress quantize`, `prune` and `merge`: ordinary pipelines, from a line."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import yaml
from commands import compress_command, files_of, make_changed, make_text_model

import compress
from compress.config import shortcuts
from compress.config.mixtures import MOST, blocks_of, more_bits
from compress.config.reading import load_pipeline, parse
from compress.config.runtimes import LLAMA_CPP, RUNTIMES
from compress.encodings import UniformForm
from compress.encodings.weight import Spec
from compress.errors import UsageError
from compress.export.gguf.blocks import largest_bytes

DATA = shortcuts.sections("demo", 128, "demo")
NO_DATA = shortcuts.sections("none", 128, "none")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here")
    make_changed(folder / "tuned", make_text_model(folder / "model"), 1)
    return folder


def test_one_line_writes_a_folder_named_after_model_and_scheme_whose_pipeline_makes_the_same_again(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["quantize", here / "model", "--bits", "3", "--group-size", "32", "--data", "none", "--evaluate", "none"]
    ended = compress_command(*line)
    assert ended.code == 0, ended.err
    out = tmp_path / "model-w3g32"
    again = compress_command("run", out / "pipeline.yaml", here / "model", "-o", "again")
    assert again.code == 0, again.err
    assert files_of(out)["compress.safetensors"] == files_of(tmp_path / "again")["compress.safetensors"]
    assert "holds this very run already" in compress_command(*line).err
    other = compress_command(*line, "--set", "passes[0].rtn.symmetric=true")
    assert other.code == 2
    assert "exists and is not the result of this run" in other.err


def test_run_names_its_folder_after_model_and_pipeline_and_replaces_none_that_nobody_named(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("passes: [rtn]")
    assert compress_command("run", "mine.yaml", here / "model").code == 0
    assert (tmp_path / "model-mine" / "compress.safetensors").is_file()
    refused = compress_command("run", "mine.yaml", here / "model", "--overwrite")
    assert refused.code == 2
    assert "give it with -o" in refused.err


def test_merge_takes_models_and_their_weights(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = [here / "model", here / "tuned", here / "tuned"]
    ended = compress_command("merge", *models, "--evaluate", "none", "--weights", "0.7,0.3")
    assert ended.code == 0, ended.err
    written = yaml.safe_load((tmp_path / "model-ties" / "pipeline.yaml").read_text())
    assert written["passes"][0]["ties"]["weights"] == [0.7, 0.3]


def test_a_dry_run_prints_a_pipeline_that_can_be_read_and_its_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = compress_command("prune", "demo", "--sparsity", "2:4", "--recover", "--dry-run")
    assert ended.code == 0, ended.err
    text, _, plan = ended.out.partition("\n\n")
    recovering = compress.PerpReconstruct(learning_rate=2e-3, steps=100)
    assert parse(text).passes == ((compress.Wanda(sparsity="2:4", update="exact"),), (recovering,))
    assert "peak memory about" in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_for_chooses_is_a_pipeline_that_the_demo_can_be_written_with(runtime: str, bits: int) -> None:
    _, values = shortcuts.quantizing(bits, None, "rtn", runtime, NO_DATA)
    made = load_pipeline(values)
    assert [exporter.key for exporter in made.export] == [key for key in [RUNTIMES[runtime].format] if key]
    planned = compress_command("quantize", "demo", "--bits", bits, "--method", "rtn", "--for", runtime, "--dry-run")
    assert planned.code == 0, planned.err


def test_a_mixture_gives_more_bits_to_the_layers_that_llama_cpp_gives_more(tmp_path: Path) -> None:
    assert [i for i in range(32) if more_bits(i, 32)] == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    gguf = pytest.importorskip("gguf")
    name, values = shortcuts.mixing("q4_k_m", "auto", "llama.cpp", lambda: blocks_of("demo"), NO_DATA)
    assert name == "q4-k-m"
    compress.run(values, "demo", tmp_path / "out")
    file = gguf.GGUFReader(tmp_path / "out" / "gguf" / "model.gguf")
    assert file.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    types = {tensor.name.removesuffix(".weight"): tensor.tensor_type.name for tensor in file.tensors}
    more = {f"blk.{i}.{part}" for i in (2, 5) for part in ("attn_v", "ffn_down")}
    assert {name for name, kind in types.items() if kind == "Q6_K"} == {"token_embd", *more}
    assert {kind for name, kind in types.items() if "norm" not in name} == {"Q4_K", "Q6_K"}


def test_every_mixture_is_a_pipeline_whose_names_match_each_layer_once() -> None:
    for kind, blocks in product(MOST, (1, 6, 40)):
        _, values = shortcuts.mixing(kind, "rtn", "llama.cpp", partial(int, blocks), NO_DATA)
        (made,) = load_pipeline(values).passes[0]
        schemes = {
            leaf: [made.at(f"model.layers.{i}.x.{leaf}").grid for i in range(blocks)]  # type: ignore[attr-defined]
            for leaf in ("q_proj", "v_proj", "down_proj", "o_proj")
        }
        assert set(schemes["q_proj"]) == {MOST[kind]}
        if kind == "q3_k_m":
            assert schemes["v_proj"] == [*["q5_k"] * min(2, blocks), *["q4_k"] * (blocks - 2)]
            assert schemes["down_proj"].count("q5_k") == blocks // 16
        if kind.endswith("_m") and kind != "q3_k_m":
            assert [grid == "q6_k" for grid in schemes["v_proj"]] == [more_bits(i, blocks) for i in range(blocks)]
            assert schemes["down_proj"] == schemes["v_proj"]


def test_data_that_is_named_is_learned_from_and_only_where_something_learns() -> None:
    own = shortcuts.sections("words.txt", 5, "none")
    _, learning = shortcuts.quantizing(4, None, "gptq", "transformers", own)
    assert learning["calibration"] == {"source": "words.txt", "samples": 5, "length": 512}
    assert "evaluate" not in learning
    assert "calibration" not in shortcuts.quantizing(4, None, "rtn", "transformers", own)[1]


def test_auto_goes_by_bits_data_and_runtime() -> None:
    def method(bits: int, runtime: str = "transformers", data: dict[str, object] = DATA) -> str:
        return next(iter(shortcuts.quantizing(bits, None, "auto", runtime, data)[1]["passes"][0]))

    assert [method(bits) for bits in (8, 4, 3, 2)] == ["gptq", "gptq", "flexround", "flexround"]
    assert [method(bits, data=NO_DATA) for bits in (4, 3, 2)] == ["rtn", "rtn", "powerquant"]
    assert method(2, "llama.cpp", NO_DATA) == "rtn", "it takes uniform codes only"
    assert next(iter(shortcuts.pruning("0.5", "auto", False, NO_DATA)[1]["passes"][0])) == "magnitude"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["quantize", "demo", "--bits", "3", "--for", "vllm"], "vllm runs 4 or 8 bits here; --bits 4 would fit"),
        (["quantize", "demo", "--group-size", "48", "--for", "llama.cpp"], "--group-size 32 would fit"),
        (["quantize", "demo", "--bits", "7", "--for", "mlx"], "mlx runs 2, 3, 4, 5, 6 or 8 bits here; --bits 8 would"),
        (["quantize", "demo", "--group-size", "16", "--for", "sglang"], "sglang takes 32, 64, 128, or 0 for one scale"),
        (["quantize", "demo", "--method", "jlcm", "--for", "vllm"], "uniform codes only; rtn, gptq, adaround"),
        (["quantize", "demo", "--for", "tensorrt"], "--for tensorrt: known are transformers, vllm"),
        (["quantize", "demo", "--method", "gpqt"], "--method gpqt: no quantizer of that name; did you mean gptq?"),
        (["quantize", "demo", "--method", "hqq"], "--method hqq: hqq is not among the methods; rtn needs no data"),
        (["quantize", "demo", "--method", "wanda"], "--method wanda: no quantizer of that name"),
        (
            ["quantize", "demo", "--type", "q4_k_m", "--bits", "4"],
            "--type q4_k_m says bits and blocks; leave --bits out",
        ),
        (["quantize", "demo", "--type", "q4_k_x"], "--type q4_k_x: did you mean q4_k_"),
        (["quantize", "demo", "--type", "q4_k_m", "--for", "vllm"], "vllm reads no super-blocks; leave --type out"),
        (
            ["quantize", "demo", "--type", "q4_k_m", "--method", "jlcm"],
            "--method jlcm: super-blocks are for rtn and gptq",
        ),
        (["quantize", "demo", "--type", "q2_k", "--method", "gptq", "--data", "none"], "gptq learns from data"),
        (["prune", "demo", "--sparsity", "half"], "--sparsity half: must be a share such as 0.5"),
        (["prune", "demo", "--recover", "--data", "none"], "--recover learns from data"),
        (["merge", "demo", "demo", "--method", "slerp", "--weights", "1"], "--weights: slerp takes none"),
        (["merge", "demo", "demo", "--weights", "1;2"], "--weights 1;2: must be numbers with commas"),
        (["list", "prune", "--bits", "3"], "--bits 3: those that are ready-made have 4"),
        (["list", "nothing"], "no ready-made pipeline is nothing; a word is one of quantize"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_fit(
    line: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = compress_command(*line)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert not list(tmp_path.iterdir())


def test_a_width_that_a_runtime_keeps_no_smaller_is_said() -> None:
    ended = compress_command("quantize", "demo", "--bits", "3", "--for", "llama.cpp", "--method", "rtn", "--dry-run")
    assert "llama.cpp keeps 3 bits in blocks as large as those of 4: no smaller" in ended.err


def test_the_bits_that_llama_cpp_keeps_codes_in_are_those_of_its_blocks() -> None:
    for bits, kept in LLAMA_CPP.items():
        form = UniformForm(bits=bits, groups=2, per_tensor=False, symmetric=bits in RUNTIMES["llama.cpp"].symmetric)
        assert largest_bytes(Spec(shape=(8, 64), form=form)) * 8 == kept * 8 * 64, bits


def test_a_method_without_its_own_entry_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no pruner of that name"):
        shortcuts.pruning("0.5", "rtn", False, DATA)
