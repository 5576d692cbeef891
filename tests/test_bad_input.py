"""Everything a user can get wrong, through the command line: the right exit code, words that say what, where and what
to do, nothing on stdout, and no folder that looks finished.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import PROCESSES, end_command, interrupted_child
from commands import PIPELINE, Ended, compress_command, files_of, make_text_model, write_pipeline, write_text
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor, nn

import compress
from compress.api import run as api
from compress.checkpoint import packed_layout as exporter
from compress.engine import ledger, manager
from compress.errors import CompressError, ConfigError, DataError, UnsupportedModelError
from compress.planning import resources

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GPTQ = "gptq: {scheme: w4g32}"
RTN = "passes: [{rtn: {scheme: w4g32}}]\n"


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return make_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture
def broken(text_model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(text_model, tmp_path / "broken"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "words.txt")


@pytest.fixture
def gptq(text: Path, tmp_path: Path) -> Path:
    """A good pipeline."""
    return write_pipeline(tmp_path / "gptq.yaml", PIPELINE.format(text=text, entry=GPTQ))


@pytest.fixture
def rtn(tmp_path: Path) -> Path:
    """A good pipeline without data."""
    return write_pipeline(tmp_path / "rtn.yaml", RTN)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def assert_refused(ended: Ended, code: int, out: Path, *words: str, rows: Sequence[str] = ()) -> None:
    """The exit code, every word on stderr, nothing on stdout but rows that were measured before, no OUT."""
    assert ended.code == code, ended.err
    assert [line.split("│")[1].strip() for line in ended.out.splitlines() if line.startswith("│")] == list(rows)
    assert bool(ended.out) == bool(rows)
    assert re.search("^error: ", ended.err, re.MULTILINE), ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    assert not out.exists()


# --- the pipeline -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ("pases: [rtn]\npasses: [rtn]\n", ["p.yaml:1: pases: ", "did you mean passes"]),
    "misspelt method": ("passes:\n  - gpqt\n", ["p.yaml:2: passes[0].gpqt: ", "did you mean gptq"]),
    "misspelt option": ("passes:\n  - rtn: {bit: 4}\n", ["p.yaml:2: passes[0].rtn.bit: ", "did you mean bits"]),
    "wrong type": ("passes:\n  - rtn:\n      bits: four\n", ["p.yaml:3: passes[0].rtn.bits: ", "a whole number"]),
    "impossible value": ("passes:\n  - rtn: {bits: 40}\n", ["p.yaml:2: passes[0].rtn.bits: ", "between 2 and 8"]),
    "several at once": (
        "sed: 1\npasses:\n  - gpqt\n  - rtn: {bits: four}\n  - wanda: {sparsity: 7}\n",
        [
            "p.yaml:1: sed: ",
            "p.yaml:3: passes[0].gpqt: ",
            "p.yaml:4: passes[1].rtn.bits: ",
            "p.yaml:5: passes[2].wanda.sparsity: ",
        ],
    ),
    "group size": ("passes:\n  - rtn: {group_size: 48}\n", ["p.yaml:2: passes[0].rtn: ", "q_proj", "48", "16, 32, 64"]),
    "pattern that matches nothing": (
        "passes:\n  - rtn: {exclude: [lm-head]}\n",
        ["p.yaml:2: passes[0].rtn.exclude: ", "'lm-head'", "model.layers.0.self_attn.q_proj"],
    ),
    "order": ("passes:\n  - rtn\n  - magnitude\n", ["p.yaml:3: passes[1].magnitude: ", "before the quantizer"]),
    "missing calibration": ("passes:\n  - gptq\n", ["p.yaml:2: passes[0].gptq: ", "calibration: {source: demo"]),
    "calibration file missing": (
        "calibration: {source: gone.txt}\npasses: [gptq]\n",
        ["p.yaml:1: calibration.source: ", "gone.txt"],
    ),
    "not YAML": ("passes: [rtn\nseed: 1\n", ["p.yaml:2: ", "not YAML"]),
    "empty": ("", ["p.yaml: ", "passes:"]),
    "binary": (None, ["p.yaml", "cannot read"]),
}


@pytest.mark.parametrize(("yaml", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistaken_pipeline_is_refused_with_place_and_remedy(
    yaml: str | None, words: list[str], tiny_folder: Path, tmp_path: Path, out: Path
) -> None:
    pipeline = tmp_path / "p.yaml"
    pipeline.write_bytes(b"\xff\xfe\x00\x80" if yaml is None else yaml.encode())
    assert_refused(compress_command("run", pipeline, tiny_folder, "-o", out), 2, out, *words)
    assert not list(tmp_path.glob("out*")), "nothing was started"


def test_a_pipeline_that_does_not_exist_is_named(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    gone = tmp_path / "gone.yaml"
    assert_refused(compress_command("run", gone, tiny_folder, "-o", out), 2, out, str(gone), "No such file")


def test_a_pipeline_that_is_a_folder_is_named(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    assert_refused(compress_command("run", tmp_path, tiny_folder, "-o", out), 2, out, str(tmp_path))


# --- the data ---------------------------------------------------------------------------------------------------------

DATA = {
    "empty file": ("c.txt", b"", ["c.txt", "empty"]),
    "text too short": ("c.txt", b"two words", ["c.txt", "tokens", "lower samples or length"]),
    "json line without the field": (
        "c.jsonl",
        b'{"text": "one"}\n\n{"txt": "two"}\n',
        ["c.jsonl:3", "'text'"],
    ),
    "json line that is no JSON": ("c.jsonl", b'{"text": "one"}\n{"text\n', ["c.jsonl:2", "'text'"]),
    "json line that is no object": ("c.jsonl", b'["text"]\n', ["c.jsonl:1", "'text'"]),
    "json line with a number as text": ("c.jsonl", b'{"text": 5}\n', ["c.jsonl:1", "'text'"]),
    "json line with null as text": ("c.jsonl", b'{"text": null}\n', ["c.jsonl:1", "'text'"]),
    "json line with a list as text": ("c.jsonl", b'{"text": ["a", "b"]}\n', ["c.jsonl:1", "'text'"]),
    "json lines in no encoding": ("c.jsonl", b'{"text": "\xff\xfe"}\n', ["c.jsonl"]),
    "json lines of nothing": ("c.jsonl", b"\n\n", ["c.jsonl", "0 tokens"]),
    "parquet that is none": ("c.parquet", b"PAR1 and then something else", ["c.parquet", "'text'"]),
    "a kind of file that is not read": ("c.csv", b"text\nhello\n", ["c.csv", ".jsonl"]),
}


@pytest.mark.parametrize(("name", "data", "words"), DATA.values(), ids=DATA.keys())
@pytest.mark.parametrize("section", only(["calibration"], ["calibration", "evaluate"]))
def test_unusable_text_is_refused_before_any_work(
    section: str, name: str, data: bytes, words: list[str], text: Path, text_model: Path, tmp_path: Path, out: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    sources = {"calibration": text, "evaluate": text} | {section: tmp_path / name}
    sections = [f"{key}: {{source: {source}, samples: 4, length: 32}}\n" for key, source in sources.items()]
    pipeline = write_pipeline(tmp_path / "p.yaml", "".join(sections) + f"passes: [{{{GPTQ}}}]\n")
    assert_refused(compress_command("run", pipeline, text_model, "-o", out), 2, out, *words)
    assert not list(tmp_path.glob("out*")), "nothing was started"


AMOUNTS = {
    "to calibrate with": ("calibration: {source: TEXT, samples: 900, length: 64}\n", "calibration.source: "),
    "to measure with": ("evaluate: {source: {a: TEXT}, samples: 900, length: 64}\n", "evaluate.source.a: "),
    "for one window": ("evaluate: {source: SHORT, protocol: wikitext, length: 128}\n", "evaluate.source: "),
}


@pytest.mark.parametrize(("section", "where"), AMOUNTS.values(), ids=AMOUNTS.keys())
def test_too_few_tokens_for_a_run_are_too_few_for_check_and_plan(
    section: str, where: str, text: Path, text_model: Path, tmp_path: Path, out: Path
) -> None:
    section = section.replace("TEXT", str(text)).replace("SHORT", str(write_text(tmp_path / "short.txt", words=50)))
    good = "" if section.startswith("calibration") else f"calibration: {{source: {text}, samples: 4, length: 32}}\n"
    pipeline = write_pipeline(tmp_path / "p.yaml", good + section + f"passes: [{{{GPTQ}}}]\n")
    for command in ("check", "plan"):
        assert_refused(compress_command(command, pipeline, text_model), 2, out, where, "tokens, ", "lower samples or")


def parquet(path: Path, **columns: list[Any]) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_gives_the_tokens_that_text_gives(text: Path, text_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    table = parquet(tmp_path / "c.parquet", number=[1], body=[text.read_text()])
    plain, columns = (
        compress.load_tokens(str(source), tokenizer, samples=3, length=16, field=field)
        for source, field in ((text, "text"), (table, "body"))
    )
    assert torch.equal(plain, columns)
    assert columns.shape == (3, 16)


def test_json_lines_give_the_tokens_of_their_field(text_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    texts = ["a path of strings " * 20, "the value of a list " * 20]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"n": 1, "text": t}) + "\n\n" for t in texts))
    found = compress.load_tokens(str(tmp_path / "c.jsonl"), tokenizer, samples=4, length=32)
    whole = [i for t in texts for i in [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert all(any(whole[i : i + 32] == row for i in range(len(whole))) for row in found.tolist())


@pytest.mark.parametrize("column", [{"body": ["words " * 999]}, {"text": [1, 2, 3]}], ids=["missing", "of numbers"])
def test_a_parquet_column_without_text_is_refused(
    column: dict[str, list[Any]], text_model: Path, tmp_path: Path, out: Path
) -> None:
    table = parquet(tmp_path / "c.parquet", **column)
    pipeline = write_pipeline(tmp_path / "p.yaml", PIPELINE.format(text=table, entry=GPTQ))
    assert_refused(compress_command("run", pipeline, text_model, "-o", out), 2, out, "c.parquet", "'text'")


def test_a_model_without_tokenizer_is_refused_where_text_must_be_read(gptq: Path, tiny_folder: Path, out: Path) -> None:
    ended = compress_command("run", gptq, tiny_folder, "-o", out)
    assert_refused(ended, 2, out, str(tiny_folder), "no tokenizer", "calibration")


def test_a_tokenizer_of_another_model_is_refused(gptq: Path, tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(compress.demo.MODEL_DIR / name, other / name)
    assert_refused(compress_command("run", gptq, other, "-o", out), 2, out, "0..255", "another tokenizer")
    words = gptq.parent / "words.txt"
    measured = compress_command("eval", other, "--source", words, "--samples", 2, "--length", 32)
    assert_refused(measured, 2, out, "0..255", "another tokenizer")


def test_measuring_windows_longer_than_the_models_positions_is_refused(text: Path, text_model: Path, out: Path) -> None:
    measured = compress_command("eval", text_model, "--source", text, "--samples", 2, "--length", 129)
    assert_refused(measured, 2, out, "129", "128 positions")


# --- tokens from Python -----------------------------------------------------------------------------------------------


def words_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(4))


TOKENS = {
    "numbers with a point": (lambda: words_of((4, 32)).float(), "integer token ids"),
    "truth values": (lambda: words_of((4, 32)) > 9, "integer token ids"),
    "one dimension": (lambda: words_of((32,)), r"\(samples, length\)"),
    "three dimensions": (lambda: words_of((4, 32, 1)), r"\(samples, length\)"),
    "no sample": (lambda: words_of((0, 32)), "empty"),
    "no token": (lambda: words_of((4, 0)), "empty"),
    "a token above the vocabulary": (lambda: words_of((4, 32)).index_fill_(1, torch.tensor([3]), 256), r"0\.\.255"),
    "a negative token": (lambda: words_of((4, 32)).index_fill_(1, torch.tensor([3]), -1), r"0\.\.255"),
}


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize(("make", "words"), TOKENS.values(), ids=TOKENS.keys())
def test_tokens_that_are_none_are_refused(
    role: str, make: Callable[[], Tensor], words: str, tiny_llama: nn.Module, tiny_folder: Path, out: Path
) -> None:
    given: dict[str, Any] = {"calibration": words_of((4, 32)), "evaluation": words_of((4, 32)), role: make()}
    with pytest.raises(DataError, match=words) as caught:
        compress.apply(tiny_llama, [compress.Gptq()], **given)
    assert role in str(caught.value)
    with pytest.raises(DataError, match=words):
        compress.run({"passes": ["gptq"]}, tiny_folder, out, **given)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_of_a_smaller_integer_type_are_taken_or_refused(dtype: torch.dtype, tiny_llama: nn.Module) -> None:
    tokens = words_of((4, 32)).clamp(max=127)
    wanted = compress.apply(tiny_llama, [compress.Gptq()], tokens).weights
    try:
        found = compress.apply(tiny_llama, [compress.Gptq()], tokens.to(dtype)).weights
    except DataError:
        return
    assert all(torch.equal(found[n].dequantize(), wanted[n].dequantize()) for n in wanted)


def test_more_tokens_from_python_than_the_models_positions_are_refused(tiny_llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="128 positions"):
        compress.apply(tiny_llama, [compress.Gptq()], words_of((2, 129)))


def test_missing_calibration_from_python_is_refused(tiny_llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="gptq learns from data"):
        compress.apply(tiny_llama, [compress.Gptq()])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_of_another_module_must_be_finite(value: float) -> None:
    inputs = torch.randn(8, 16)
    inputs[3, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        compress.apply(nn.Sequential(nn.Linear(16, 8)), [compress.Gptq()], inputs)


# --- the model --------------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist_is_named(rtn: Path, tmp_path: Path, out: Path) -> None:
    gone = tmp_path / "gone"
    assert_refused(compress_command("run", rtn, gone, "-o", out), 2, out, f"no such folder: {gone}", "hub id")


def test_a_file_is_not_a_model(rtn: Path, out: Path) -> None:
    assert_refused(compress_command("run", rtn, rtn, "-o", out), 2, out, str(rtn), "is a file", "save_pretrained")


def test_a_hub_id_that_cannot_be_fetched_is_named(rtn: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ended = compress_command("run", rtn, "no-such-organisation/no-such-model", "-o", out)
    assert_refused(ended, 2, out, "no-such-organisation/no-such-model", "not a local folder", "from the hub failed")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the stored weights."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    """Change the stored configuration."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def index(weight_map: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def poison(name: str, value: float) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "save_pretrained"]),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "config of an unknown model": (lambda f: configure(f, model_type="zzz"), ["config.json", "zzz"]),
    "config with a text as a width": (lambda f: configure(f, hidden_size="wide"), ["config.json", "hidden_size"]),
    "config that contradicts itself": (lambda f: configure(f, hidden_size=63, head_dim=None), ["config.json", "63"]),
    "config with an unknown activation": (lambda f: configure(f, hidden_act="zzz"), ["zzz"]),
    "config of another size": (lambda f: configure(f, intermediate_size=96), ["mlp", "(128, 64)", "(96, 64)"]),
    "config with more blocks": (lambda f: configure(f, num_hidden_layers=3), ["9 parameters", "model.layers.2."]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS]),
    "a pickle": (pickle_only, ["pytorch_model.bin", "pickle", "never loaded", "convert"]),
    "an empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS, "0 bytes", "truncated or corrupt"]),
    "random bytes": (
        lambda f: (f / WEIGHTS).write_bytes(random.Random(0).randbytes(5000)),
        [WEIGHTS, "5000 bytes", "truncated or corrupt", "fetch it again"],
    ),
    "a truncated file": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size // 2),
        [WEIGHTS, "truncated or corrupt", "fetch it again"],
    ),
    "an index outside its folder": (index({"a": "../x.safetensors"}), [INDEX, "../x.safetensors", "outside"]),
    "an index with an absolute path": (index({"a": "/etc/passwd"}), [INDEX, "/etc/passwd", "outside"]),
    "an index naming a missing shard": (index({"a": "b.safetensors"}), [INDEX, "b.safetensors", "does not exist"]),
    "an index naming a number": (index({"a": 5}), [INDEX]),
    "an index of nothing": (index({}), [INDEX]),
    "an index that is a list": (index([]), [INDEX]),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX]),
    "a weight of another shape": (
        lambda f: change(f, lambda t: t.update({UP: torch.zeros(3, 3)})),
        [UP, "(3, 3)", "(128, 64)"],
    ),
    "a weight that is missing": (lambda f: change(f, lambda t: t.pop(UP)), [UP, "not in the files"]),
    "a quantized model": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        ["already quantized", "gptq", "compress eval"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_model_is_refused_before_any_work(
    damage: Callable[[Path], object], words: list[str], rtn: Path, broken: Path, tmp_path: Path, out: Path
) -> None:
    damage(broken)
    assert_refused(compress_command("run", rtn, broken, "-o", out), 2, out, *words)
    assert not list(tmp_path.glob("out*")), "nothing was started"
    assert compress_command("check", rtn, broken).code == 2


POISON = {
    "NaN in a matrix": (poison(UP, float("nan")), [UP, "1 of 8192", "get a clean one"]),
    "infinity in a matrix": (poison(UP, float("inf")), [UP, "1 of 8192", "get a clean one"]),
    "NaN in a norm": (poison(NORM, float("nan")), [NORM]),
    "NaN in the embedding": (poison("model.embed_tokens.weight", float("nan")), ["model.embed_tokens.weight"]),
    "NaN in the head": (poison("lm_head.weight", float("nan")), ["lm_head.weight"]),
}


@pytest.mark.parametrize(("damage", "words"), POISON.values(), ids=POISON.keys())
@pytest.mark.parametrize("measured", [False, True], ids=["unmeasured", "measured"])
def test_a_weight_that_is_not_finite_is_never_exported(
    measured: bool, damage: Callable[[Path], None], words: list[str], text: Path, broken: Path, out: Path
) -> None:
    damage(broken)
    section = f"evaluate: {{source: {text}, samples: 2, length: 32}}\n" if measured else ""
    pipeline = write_pipeline(out.with_name("p.yaml"), section + RTN)
    assert_refused(compress_command("run", pipeline, broken, "-o", out), 1, out, *words)


def test_finite_weights_whose_activations_overflow_are_refused_where_it_happens(
    text: Path, broken: Path, out: Path
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
        tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30

    change(broken, enlarge)
    pipeline = write_pipeline(
        out.with_name("p.yaml"), f"calibration: {{source: {text}, samples: 2, length: 32}}\npasses: [gptq]\n"
    )
    ended = compress_command("run", pipeline, broken, "-o", out)
    assert_refused(ended, 1, out, "model.layers.1.mlp.down_proj", "not finite", "calibration data", rows=["original"])


def test_a_folder_that_was_compressed_already_is_refused(rtn: Path, tiny_folder: Path, out: Path) -> None:
    assert compress_command("run", rtn, tiny_folder, "-o", out).code == 0
    again = out.with_name("again")
    ended = compress_command("run", rtn, out, "-o", again)
    assert_refused(ended, 2, again, str(out), "already quantized", "compress eval")


def test_a_module_with_nothing_to_compress_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        compress.apply(nn.Sequential(nn.LayerNorm(4)), [compress.Rtn()])


# --- the destination --------------------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(rtn: Path, tiny_folder: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    ended = compress_command("run", rtn, tiny_folder, "-o", out)
    assert ended.code == 2
    assert "exists" in ended.err
    assert "--overwrite" in ended.err
    assert files_of(out) == {"precious.txt": b"mine"}
    assert not out.with_name("out.work").exists()


def test_the_result_of_another_pipeline_is_left_alone(rtn: Path, tiny_folder: Path, out: Path) -> None:
    assert compress_command("run", rtn, tiny_folder, "-o", out).code == 0
    before = files_of(out)
    other = write_pipeline(rtn.with_name("other.yaml"), "passes: [{rtn: {bits: 3}}]")
    assert compress_command("run", other, tiny_folder, "-o", out).code == 2
    assert files_of(out) == before
    assert compress_command("run", other, tiny_folder, "-o", out, "--overwrite").code == 0
    assert files_of(out) != before


def test_overwriting_the_model_itself_is_refused(rtn: Path, broken: Path) -> None:
    before = files_of(broken)
    for name in (broken, broken / ".", broken.parent / "x" / ".." / broken.name):
        assert compress_command("run", rtn, broken, "-o", name, "--overwrite").code == 2
        assert files_of(broken) == before


def test_overwriting_a_folder_that_holds_the_model_is_refused(rtn: Path, text_model: Path, out: Path) -> None:
    model = Path(shutil.copytree(text_model, out / "model"))
    before = files_of(out)
    assert compress_command("run", rtn, model, "-o", out, "--overwrite").code == 2
    assert files_of(out) == before


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_destination_without_a_name_is_refused(
    name: str, rtn: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = compress_command("run", rtn, tiny_folder, "-o", name)
    assert ended.code == 2
    assert ended.err.startswith("error: ")


def test_a_destination_that_is_a_file_is_refused_before_any_work(rtn: Path, tiny_folder: Path, out: Path) -> None:
    out.write_text("mine")
    for more in ([], ["--overwrite"]):
        ended = compress_command("run", rtn, tiny_folder, "-o", out, *more)
        assert ended.code == 2
        assert str(out) in ended.err
        assert out.read_text() == "mine"
        assert not out.with_name("out.work").exists()


def test_a_destination_inside_a_file_is_refused(rtn: Path, tiny_folder: Path, out: Path) -> None:
    out.write_text("mine")
    ended = compress_command("run", rtn, tiny_folder, "-o", out / "below")
    assert ended.code == 2
    assert str(out) in ended.err


# --- resources --------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_said_before_any_work(
    gptq: Path, text_model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 10**4, free=10**4))
    ended = compress_command("run", gptq, text_model, "-o", out)
    assert_refused(ended, 4, out, "disk", str(tmp_path), "MB free")
    assert not list(tmp_path.glob("out*")), "nothing was started"


def test_too_little_memory_is_said_before_any_work(
    gptq: Path, text_model: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 10**7)
    ended = compress_command("run", gptq, text_model, "-o", out)
    assert_refused(ended, 4, out, "memory", "10.0 MB are available", "samples need less")
    assert not list(tmp_path.glob("out*")), "nothing was started"


@pytest.mark.parametrize(
    "fail", [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 60, dtype=torch.uint8)], ids=["Python", "torch"]
)
def test_running_out_of_memory_has_an_exit_code_of_its_own(
    fail: Callable[[], object], gptq: Path, text_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "execute", lambda *_: fail())
    assert_refused(compress_command("run", gptq, text_model, "-o", out), 4, out, "memory", "calibration samples")


FULL: dict[str, Exception] = {
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "no quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.mark.parametrize(
    ("moment", "error"),
    only(
        [("second block", FULL["no space"])],
        [*(("second block", e) for e in FULL.values()), ("export", FULL["no space"]), ("report", FULL["no space"])],
    ),
    ids=[*(f"second block, {name}" for name in FULL), "export, no space", "report, no space"],
)
def test_a_full_disk_keeps_what_is_finished_and_the_same_command_then_finishes(
    moment: str, error: Exception, gptq: Path, text_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    save_tensors_before, write_before, text_before = ledger.save_sealed, exporter._write_weights, api.write_text

    def save(*args: Any, **options: Any) -> str:
        calls.append(args)
        if moment == "second block" and len(calls) == 2:
            Path(args[1]).write_bytes(b"half")
            raise error
        return save_tensors_before(*args, **options)

    def write(artifact: Any, file: Path, bars: Any) -> None:
        if moment == "export":
            file.write_bytes(b"half")
            raise error
        write_before(artifact, file, bars)

    def write_text(file: Path, text: str) -> None:
        if moment == "report":
            with ledger.writing(file):
                raise error
        text_before(file, text)

    work = out.with_name("out.work")
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "save_sealed", save)
        patched.setattr(exporter, "_write_weights", write)
        patched.setattr(api, "write_text", write_text)
        ended = compress_command("run", gptq, text_model, "-o", out)
    measured = ["original"] if moment == "second block" else ["original", "gptq"]
    assert_refused(ended, 4, out, "no space left", "make room", "same command", rows=measured)
    finished = sorted(work.glob("s00-b*.safetensors"))
    assert len(finished) == (1 if moment == "second block" else 2)
    assert not list(work.rglob("*.partial"))
    times = {f: f.stat().st_mtime_ns for f in finished}

    kept: dict[Path, int] = {}

    def look(*args: Any) -> object:
        kept.update({f: f.stat().st_mtime_ns for f in finished})
        return export_before(*args)

    export_before = api._export
    monkeypatch.setattr(api, "_export", look)
    assert compress_command("run", gptq, text_model, "-o", out).code == 0
    assert kept == times, "finished units are not done again"
    assert not work.exists()


# --- the gate ---------------------------------------------------------------------------------------------------------


def taught(folder: Path, text: Path) -> Path:
    """The model after a few steps on a text, so that damage is sure to raise its perplexity."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = compress.load_tokens(str(text), AutoTokenizer.from_pretrained(folder), samples=8, length=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_a_gate_that_is_not_met_exports_nothing_and_keeps_the_work(text: Path, broken: Path, out: Path) -> None:
    model, pipeline = taught(broken, text), out.with_name("p.yaml")
    measured = (
        f"evaluate: {{source: {text}, samples: 4, length: 32, max_increase: GATE}}\n"
        "passes: [{magnitude: {sparsity: 0.95, include: ['*']}}]\n"
    )
    write_pipeline(pipeline, measured.replace("GATE", "10%"))
    ended = compress_command("run", pipeline, model, "-o", out)
    words = ("after magnitude perplexity", "max_increase", "+10.0%", "Nothing was exported")
    assert_refused(ended, 3, out, *words, rows=["original", "magnitude"])
    lines = ended.out.splitlines()
    assert len({len(line) for line in lines[1:]}) == 1, "rows are aligned"
    assert lines[-1].startswith("└")
    work = out.with_name("out.work")
    log = (work / "log.txt").read_text()
    for said in ("INFO evaluate original: batches 1 of 1, ", "INFO magnitude: block 2 of 3, ", "after magnitude, "):
        assert said in log
    finished = {f: f.stat().st_mtime_ns for f in work.glob("s00-*.safetensors")}
    assert len(finished) == 3, "two blocks and the head"

    again = compress_command("run", pipeline, model, "-o", out)
    assert (again.code, again.err) == (3, ended.err)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished, "the work was kept"

    write_pipeline(pipeline, measured.replace("GATE", "null"))
    assert compress_command("run", pipeline, model, "-o", out).code == 0
    assert out.is_dir()


def test_the_gate_holds_in_python_too(tiny_llama: nn.Module) -> None:
    with pytest.raises(CompressError) as caught:
        compress.apply(tiny_llama, [compress.Rtn(bits=2)], evaluation=words_of((4, 32)), max_increase=-0.99)
    assert caught.value.exit_code == 3


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), only([("SIGTERM", 143)], [("SIGINT", 130), ("SIGTERM", 143)]))
def test_an_interrupted_run_says_so_and_the_same_command_ends_with_the_same_bytes(
    name: str, code: int, gptq: Path, text_model: Path, out: Path
) -> None:
    arguments = ["run", str(gptq), str(text_model), "-o", str(out)]
    process = PROCESSES.Process(target=interrupted_child, args=(out.parent, arguments, getattr(signal, name)))
    process.start()
    ended = end_command(process)
    said = (out.parent / "stderr.txt").read_text()
    work = out.with_name("out.work")
    assert not out.exists()
    assert [f.name for f in work.glob("s00-b*")] == ["s00-b0000.safetensors"]
    assert compress_command(*arguments).code == 0
    assert not work.exists()
    straight = out.with_name("straight")
    assert compress_command("run", gptq, text_model, "-o", straight).code == 0
    assert (out / "compress.safetensors").read_bytes() == (straight / "compress.safetensors").read_bytes()
    assert ended == code, said
    assert f"kept in {work}; the same command continues" in said
    assert "Traceback" not in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("│")] == ["original"]


# --- the command line itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "p.yaml"], ["walk"], ["run", "p.yaml", "demo", "-o", "out", "--jump"], ["eval"]],
    ids=" ".join,
)
def test_a_command_that_is_none_is_bad_usage(arguments: list[str]) -> None:
    ended = compress_command(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: compress" in ended.err


@pytest.mark.parametrize("arguments", [["--field", "body"], ["--length", "1"], ["--samples", "-3"]], ids=" ".join)
def test_measuring_nothing_is_refused(arguments: list[str], text_model: Path) -> None:
    ended = compress_command("eval", text_model, *arguments)
    assert ended.code == 2
    assert ended.err.startswith("error: ")


def test_measuring_a_folder_with_corrupt_weights_is_refused(text: Path, broken: Path) -> None:
    (broken / WEIGHTS).write_bytes(random.Random(0).randbytes(5000))
    ended = compress_command("eval", broken, "--source", text, "--samples", 2, "--length", 32)
    assert ended.code in (1, 2)
    assert ended.err.startswith("error: ")
    assert WEIGHTS in ended.err


@pytest.mark.parametrize("config", [None, "{}", "[]", "{", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_inspecting_a_folder_of_something_else_is_refused(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "report.json").write_text('{"layers": {}}')
    ended = compress_command("inspect", tmp_path)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert str(tmp_path) in ended.err


def test_a_new_pipeline_in_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    ended = compress_command("init", tmp_path / "gone" / "p.yaml")
    assert ended.code == 2
    assert str(tmp_path / "gone") in ended.err
