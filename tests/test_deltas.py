"""Compressed deltas: small files that stand for fine-tunes wherever a merge names a model."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from children import contents
from commands import compress_command, files_of, make_changed, make_text_model, write_pipeline
from conftest import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import compress
from compress import BitDelta, Compeft
from compress.api import apply_delta
from compress.api import run as api
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.delta.file import Delta
from compress.checkpoint.delta.source import with_delta
from compress.checkpoint.sources import ModuleSource
from compress.engine.merge import pieces
from compress.engine.merge.merging import Merging
from compress.errors import CheckpointError, ConfigError, NonFiniteError, UsageError
from compress.models import graph as graphs

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: dict[str, dict[str, Any]] = {
    "compeft": {"density": 0.1},
    "compeft-tensor": {"density": 0.2, "scope": "tensor", "magnitude": "mean", "alpha": 2.0},
    "bitdelta": {"steps": 0},
    "bitdelta-3": {"bits": 3, "steps": 0},
}
each_method = pytest.mark.parametrize("method", METHODS)
MERGES = ("ties", "task_arithmetic", "average", "slerp", "dare")
# Every merge, and every kind of delta.
ONE_EACH = [*zip(MERGES, METHODS, strict=False), ("dare", "compeft")]


def entry(method: str, tuned: Path, **more: Any) -> dict[str, Any]:
    return {method.split("-")[0]: {"models": [str(tuned)], **METHODS[method], **more}}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and two fine-tunes, `a` and `b`, bfloat16; what runs on the base left of each method in `METHODS/`."""
    folder = tmp_path_factory.mktemp("deltas")
    make_text_model(folder / "base", dtype="bfloat16")
    LlamaForCausalLM.from_pretrained(folder / "base").bfloat16().save_pretrained(folder / "base")
    for seed, name in enumerate("ab"):
        make_changed(folder / name, folder / "base", seed, size=3e-2)
    for method in METHODS:
        compress.run({"passes": [entry(method, folder / "a")]}, folder / "base", folder / method)
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    assert a.keys() == b.keys()
    return all(
        value.dtype == b[n].dtype and value.numpy(force=True).tobytes() == b[n].numpy(force=True).tobytes()
        if value.dtype != torch.bfloat16
        else torch.equal(value.view(torch.int16), b[n].view(torch.int16))
        for n, value in a.items()
    )


# --- what a run leaves, and what is made of it ------------------------------------------------------------------------


@each_method
def test_base_and_delta_make_the_very_model_that_was_measured(method: str, here: Path, tmp_path: Path) -> None:
    found = compress.apply_delta(here / "base", here / method / "delta", tmp_path / "out")
    assert same(loaded(tmp_path / "out"), loaded(here / method))
    assert found["tensors_equal"] == len(load_file(tmp_path / "out" / "model.safetensors"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "delta.json", "generation_config.json", "manifest.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert json.loads((tmp_path / "out" / "delta.json").read_text())["method"] == method.split("-")[0]
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize(("merge", "method"), only(ONE_EACH[::2], itertools.product(MERGES, METHODS)))
def test_a_delta_stands_for_the_checkpoint_it_makes_in_every_merge(
    merge: str, method: str, here: Path, tmp_path: Path
) -> None:
    compress.apply_delta(here / "base", here / method / "delta", tmp_path / "whole")
    others = [] if merge == "slerp" else [str(here / "b")]
    for name, model in (("delta", here / method / "delta"), ("whole", tmp_path / "whole")):
        pipeline = {"passes": [{merge: {"models": [str(model), *others]}}]}
        compress.run(pipeline, here / "base", tmp_path / f"by-{name}")
    a, b = (load_file(tmp_path / f"by-{name}" / "compress.safetensors") for name in ("delta", "whole"))
    assert same(a, b)
    assert not same(a, load_file(here / method / "compress.safetensors"))


def test_the_file_alone_and_several_deltas_are_models_too(here: Path, tmp_path: Path) -> None:
    file = shutil.copy(here / "compeft" / "delta" / "delta.safetensors", tmp_path / "maths.safetensors")
    models = [str(file), str(here / "bitdelta" / "delta"), str(here / "b")]
    compress.run({"passes": [{"ties": {"models": models}}]}, here / "base", tmp_path / "out")
    again = {"passes": [{"compeft": {"models": [str(file)], "density": 0.05}}]}
    report = compress.run(again, here / "base", tmp_path / "smaller")
    assert report.merged[0]["delta"]["bytes"] < Path(file).stat().st_size


def test_a_delta_belongs_to_the_model_of_the_pipeline_also_behind_another_merge(here: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    compress.apply_delta(here / "base", here / "compeft" / "delta", whole)
    first = {"average": {"models": [str(here / "b")]}}
    for name, model in (("delta", here / "compeft" / "delta"), ("whole", whole)):
        compress.run({"passes": [first, {"average": {"models": [str(model)]}}]}, here / "base", tmp_path / f"by-{name}")
    a, b = (load_file(tmp_path / f"by-{name}" / "compress.safetensors") for name in ("delta", "whole"))
    assert same(a, b)


@each_method
def test_in_memory_the_same_comes_out(method: str, here: Path) -> None:
    passes = {"compeft": Compeft, "bitdelta": BitDelta}
    pass_ = passes[method.split("-")[0]](models=(str(here / "a"),), **METHODS[method])
    model = LlamaForCausalLM.from_pretrained(here / "base")
    assert same(dict(compress.apply(model, [pass_]).model.state_dict()), loaded(here / method))
    by_delta = compress.apply(model, [compress.TaskArithmetic(models=(str(here / method / "delta"),), scale=1.0)])
    close = by_delta.model.state_dict()
    assert all(torch.allclose(close[n].float(), v.float(), atol=2e-3) for n, v in loaded(here / method).items())


def test_the_report_says_how_small_the_delta_is(here: Path) -> None:
    sizes = {}
    for method in METHODS:
        report = json.loads((here / method / "report.json").read_text())
        size = (here / method / "delta" / "delta.safetensors").stat().st_size
        found = report["merged"][0]["delta"]
        parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(here / "base").parameters())
        assert found["bytes"] == size
        assert found["bits_per_parameter"] == pytest.approx(8 * size / parameters)
        assert found["times_smaller"] == pytest.approx(2 * parameters / size)
        assert report["verified"]["delta"]["tensors_equal"] == report["verified"]["tensors_equal"]
        assert f"{found['bits_per_parameter']:.3f} bits per parameter" in (here / method / "README.md").read_text()
        sizes[method] = found["bits_per_parameter"]
    assert sizes["compeft"] < 0.576 + 0.1 < sizes["compeft-tensor"] < 0.939 + 0.1  # 4 kB of names on a tiny model
    assert sizes["bitdelta"] < sizes["bitdelta-3"]


def test_what_is_not_merged_is_the_bases_and_takes_no_room(here: Path, tmp_path: Path) -> None:
    pipeline = {"passes": [entry("compeft", here / "a", include=["*.mlp.*"], exclude=["*.1.*"])]}
    compress.run(pipeline, here / "base", tmp_path / "out")
    compress.apply_delta(here / "base", tmp_path / "out" / "delta", tmp_path / "whole")
    found, base = loaded(tmp_path / "whole"), loaded(here / "base")
    changed = {name for name, value in found.items() if not torch.equal(value, base[name])}
    with safe_open(tmp_path / "out" / "delta" / "delta.safetensors", "pt") as file:
        assert set(file.keys()) == changed
    assert changed == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_tied_tensors_stay_tied_and_further_rows_are_the_bases(tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make_llama(tie_word_embeddings=True, vocab_size=250).save_pretrained(tmp_path / "small")
    tuned = make_changed(tmp_path / "tuned", tmp_path / "small", 1)
    for method in METHODS:
        options = {"passes": [entry(method, tuned, vocabulary="common")]}
        compress.run(options, tmp_path / "base", tmp_path / method)
        compress.apply_delta(tmp_path / "base", tmp_path / method / "delta", tmp_path / f"{method}-whole")
        found = loaded(tmp_path / f"{method}-whole")
        assert same(found, loaded(tmp_path / method))
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
        rows = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"][250:]
        assert torch.equal(found["model.embed_tokens.weight"][250:], rows)


@pytest.mark.parametrize("method", only(["bitdelta"], METHODS))
def test_cut_into_small_chunks_the_same_is_made(
    method: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1001)
    compress.run({"passes": [entry(method, here / "a")]}, here / "base", tmp_path / method)
    assert same(loaded(tmp_path / method), loaded(here / method))
    monkeypatch.setattr(pieces, "PIECE", 700)
    pipeline = {"passes": [{"average": {"models": [str(tmp_path / method / "delta")], "weights": [0, 1]}}]}
    compress.run(pipeline, here / "base", tmp_path / f"{method}-read")
    assert same(loaded(tmp_path / f"{method}-read"), loaded(here / method))


class Odd(nn.Module):
    """Tensors of every odd kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 9, bias=False))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.still = nn.Parameter(torch.ones(5))
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize("pass_", [Compeft, BitDelta])
def test_scalars_and_empty_and_unchanged_tensors_come_back(pass_: Any, tmp_path: Path) -> None:
    from compress.engine.context import Context
    from compress.engine.ledger import FolderLedger
    from compress.engine.stage import Stage
    from compress.planning.plan import PassPlan
    from compress.progress import Bars

    base, tuned = Odd(), Odd()
    tuned.still.data.copy_(base.still.data)
    tuned.gain.data += 1
    (tmp_path / "tuned").mkdir()
    save_file(dict(tuned.state_dict()), tmp_path / "tuned" / "model.safetensors")
    graph = graphs.find(base)
    artifact = Artifact(graph, ModuleSource(base))
    ledger = FolderLedger(tmp_path / "work")
    context = Context(
        artifact=artifact, given=artifact, ledger=ledger, seed=0, dtype=torch.float32, products="float32",
        resident=False, bars=Bars(),
    )  # fmt: skip
    options = {"scope": "tensor"} if pass_ is Compeft else {"steps": 0}
    plan = PassPlan("passes[0]", pass_(models=(str(tmp_path / "tuned"),), **options), (), {})
    after = Merging().run(context, Stage(0, (plan,)), None, "key").context
    assert after.delta is not None
    made = with_delta(artifact, Delta.open(after.delta.file))
    for name, _ in graph.tensors():
        assert torch.equal(made.tensor(name), after.artifact.tensor(name)), name
    assert made.tensor("gain") == 2.5
    assert made.tensor("empty").shape == (0, 4)
    assert torch.equal(made.tensor("still"), base.still)
    assert made.tensor("count") == 3


# --- refused before any work ------------------------------------------------------------------------------------------


def others(here: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Bases that the delta does not belong to, and what is said of each."""
    model = LlamaForCausalLM.from_pretrained(here / "base")
    model.float().save_pretrained(folder / "float")
    model.bfloat16().model.layers[1].mlp.up_proj.weight.data[-1, -1] += 1
    model.save_pretrained(folder / "touched")
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder / "gpt2")
    make_text_model(folder / "wide", intermediate_size=192)
    make_text_model(folder / "deep", num_hidden_layers=3)
    return {
        "b": (here / "b", "21 of 21 tensors hold other values, such as model.embed_tokens.weight"),
        "touched": (folder / "touched", "1 of 21 tensors hold other values, such as model.layers.1.mlp.up_proj.weight"),
        "float": (folder / "float", "model.embed_tokens.weight was bfloat16 4096x64 there, and is float32 4096x64"),
        "gpt2": (folder / "gpt2", "was made for a LlamaForCausalLM, and the base is a GPT2LMHeadModel"),
        "wide": (folder / "wide", "model.embed_tokens.weight was bfloat16"),
        "deep": (
            folder / "deep",
            "this base has a tensor model.layers.2.input_layernorm.weight, and its base has none",
        ),
    }


def test_a_delta_of_another_base_is_refused_with_what_differs(here: Path, tmp_path: Path) -> None:
    delta = here / "compeft" / "delta"
    pipeline = write_pipeline(tmp_path / "p.yaml", f"passes:\n  - ties:\n      models: ['{here / 'a'}', '{delta}']\n")
    for base, said in others(here, tmp_path).values():
        ended = compress_command("apply-delta", base, delta, "-o", tmp_path / "out")
        assert ended.code == 2
        assert said in ended.err
        assert str(delta) in ended.err
        ended = compress_command("check", pipeline, base)
        assert ended.code == 2
        assert "p.yaml:3: passes[0].ties.models[1]: " in ended.err
        assert said in ended.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.work"))


def damaged(file: Path, folder: Path) -> dict[str, tuple[bytes, str]]:
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    renamed = whole.replace(b'"model.layers.1.mlp.up_proj.weight":', b'"model.layers.1.mlp.up_prok.weight":')
    save_file({"a": torch.zeros(2)}, folder / "plain.safetensors")
    return {
        "cut": (whole[:-100], "truncated or corrupt"),
        "cut in the header": (whole[:200], "truncated or corrupt"),
        "nothing": (b"", "truncated or corrupt"),
        "one bit": (bytes(flipped), "is damaged: its content is not what was written"),
        "one bit of a name": (renamed, "is damaged: its content is not what was written"),
        "newer": (whole.replace(b'"version":"2"', b'"version":"4"'), "was written by a newer version"),
        "a model": ((folder / "plain.safetensors").read_bytes(), "is not a compressed delta"),
    }


def test_a_damaged_file_is_refused_before_work_starts(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "delta" / "delta.safetensors"
    file.parent.mkdir()
    for method in ("compeft", "bitdelta"):
        for data, said in damaged(here / method / "delta" / "delta.safetensors", tmp_path).values():
            file.write_bytes(data)
            with pytest.raises(CheckpointError, match=said):
                compress.apply_delta(here / "base", file.parent, tmp_path / "out")
            pipeline = {"passes": [{"ties": {"models": [str(file)]}}]}
            with pytest.raises(ConfigError, match=said):
                compress.run(pipeline, here / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_what_is_there_is_never_lost(here: Path, tmp_path: Path) -> None:
    base, delta = shutil.copytree(here / "base", tmp_path / "base"), here / "compeft" / "delta"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    before = files_of(tmp_path)
    for out, more, said in (
        ("base", ["--overwrite"], "is, holds or lies in the model"),
        ("mine", [], "exists; choose another -o"),
        ("mine", ["--overwrite"], "holds files that no run wrote"),
    ):
        ended = compress_command("apply-delta", base, delta, "-o", tmp_path / out, *more)
        assert (ended.code, said in ended.err) == (2, True), ended.err
    ended = compress_command("apply-delta", base, here / "a", "-o", tmp_path / "out")
    assert (ended.code, "is not a compressed delta" in ended.err) == (2, True)
    ended = compress_command("apply-delta", base, tmp_path / "nowhere", "-o", tmp_path / "out")
    assert (ended.code, "no such folder" in ended.err) == (2, True)
    shutil.copytree(delta, tmp_path / "delta")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"is, holds or lies in|holds files that no run wrote"):
            compress.apply_delta(base, tmp_path / "delta", tmp_path / "delta", overwrite=overwrite)
    shutil.rmtree(tmp_path / "delta")
    assert files_of(tmp_path) == before


def test_its_own_result_is_replaced_when_asked_and_kept_when_it_fails(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["apply-delta", here / "base", here / "compeft" / "delta", "-o", tmp_path / "out"]
    ended = compress_command(*arguments)
    assert ended.code == 0
    assert "21 tensors read back equal; a delta of " in ended.out
    assert compress_command(*arguments).code == 2
    before = files_of(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(apply_delta, "copy_companions", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        assert compress_command(*arguments, "--overwrite").code == 4
    assert files_of(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    other = [*arguments[:2], here / "bitdelta" / "delta", *arguments[3:], "--overwrite", "--json"]
    ended = compress_command(*other)
    assert json.loads(ended.out)["tensors_equal"] == 21
    assert files_of(tmp_path / "out") != before


def test_a_delta_is_made_by_the_first_pass_only(here: Path, tmp_path: Path) -> None:
    for passes in (
        [{"average": {"models": [str(here / "b")]}}, entry("compeft", here / "a")],
        [entry("bitdelta", here / "a"), entry("compeft", here / "a")],
    ):
        with pytest.raises(ConfigError, match=r"passes\[1\].*put it first"):
            compress.run({"passes": passes}, here / "base", tmp_path / "out")


def test_what_is_not_finite_is_refused(here: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(here / "a", tmp_path / "tuned"))
    values = load_file(tuned / "model.safetensors")
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(values, tuned / "model.safetensors", {"format": "pt"})
    for method in METHODS:
        with pytest.raises(NonFiniteError, match=r"up_proj.weight holds NaN or infinity"):
            compress.run({"passes": [entry(method, tuned)]}, here / "base", tmp_path / method)


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_distilled_scales_are_what_is_stored_also_when_the_run_is_interrupted(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"bitdelta": {"models": [str(here / "a")], "steps": 6, "learning_rate": 0.1}}
    tokens = torch.randint(4096, (32, 16), generator=torch.Generator().manual_seed(1))
    whole = compress.run({"passes": [entry]}, here / "base", tmp_path / "whole", calibration=tokens)
    notes = whole.merged[0]["notes"]
    assert notes["loss"] < notes["loss_start"]
    compress.apply_delta(here / "base", tmp_path / "whole" / "delta", tmp_path / "applied")
    found, fitted = loaded(tmp_path / "applied"), loaded(here / "bitdelta")
    assert same(found, loaded(tmp_path / "whole"))
    changed = {name for name, value in found.items() if not torch.equal(value, fitted[name])}
    assert changed
    assert all("_proj" in name for name in changed)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(api, "_export", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run({"passes": [entry]}, here / "base", tmp_path / "out", calibration=tokens)
    next((tmp_path / "out.work").glob("s00-merged-*")).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(BitDelta, "learn", stop)  # what was learned is in the delta
        again = compress.run({"passes": [entry]}, here / "base", tmp_path / "out", calibration=tokens)
    assert again.merged == whole.merged
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_result_without_its_delta_is_not_whole(here: Path, tmp_path: Path) -> None:
    pipeline = {"passes": [entry("compeft", here / "a")]}
    compress.run(pipeline, here / "base", tmp_path / "out")
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "delta")
    with pytest.raises(UsageError, match=r"the result of this run, but it lacks delta/delta.safetensors"):
        compress.run(pipeline, here / "base", tmp_path / "out")
    compress.run(pipeline, here / "base", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_a_changed_delta_is_another_run(here: Path, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(here / "compeft" / "delta", tmp_path / "delta"))
    pipeline = {"passes": [{"ties": {"models": [str(delta)]}}]}
    compress.run(pipeline, here / "base", tmp_path / "out")
    assert compress.run(pipeline, here / "base", tmp_path / "out").rows
    shutil.copy(here / "bitdelta" / "delta" / "delta.safetensors", delta)
    with pytest.raises(UsageError, match="not the result of this run"):
        compress.run(pipeline, here / "base", tmp_path / "out")


def test_a_damaged_delta_of_an_unfinished_run_is_made_again(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = {"passes": [entry("compeft", here / "a")]}

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(api, "_export", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run(pipeline, here / "base", tmp_path / "out")
    (file,) = (tmp_path / "out.work").glob("s00-delta-*")
    file.write_bytes(file.read_bytes()[:-7])
    compress.run(pipeline, here / "base", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(here / "compeft")
