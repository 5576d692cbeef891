"""The user's files are never lost, and what is on the disk is what was written, or is refused by name."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command, files_of, make_changed, make_text_model, write_pipeline, write_text
from selection import only
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import compress
from compress import Hf
from compress.api import apply_delta
from compress.api import run as api
from compress.checkpoint.sources import FolderSource
from compress.engine import block_stage
from compress.errors import CheckpointError, UsageError
from compress.io import lock, manifest
from compress.io.safetensors_file import read_header

pytestmark = pytest.mark.usefixtures("one_thread")

TWO: dict[str, Any] = {"passes": [{"wanda": {"sparsity": 0.5}}, {"gptq": {"scheme": "w4g32"}}]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a fine-tune, a pipeline, a text, a result with an export, and a delta; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    make_text_model(folder / "model", hidden_size=32, intermediate_size=64, vocab_size=4096)
    make_changed(folder / "tuned", folder / "model", 1, size=1e-2)
    write_text(folder / "words.txt", words=300)
    data = "{source: words.txt, samples: 2, length: 16}"
    write_pipeline(folder / "p.yaml", f"evaluate: {data}\nexport: [hf]\npasses: [{{rtn: {{scheme: w4g32}}}}]\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        compress.run("p.yaml", "model", "out")
        compress.run({"passes": [{"compeft": {"models": ["tuned"]}}]}, "model", "made")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- what is the user's -----------------------------------------------------------------------------------------------


def foreign(name: str, text: str = "of the user") -> Callable[[Path], object]:
    def put(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)

    return put


def moved(source: str, name: str) -> Callable[[Path], object]:
    return lambda here: (here / source).rename(here / name)


def linked(name: str, target: str) -> Callable[[Path], object]:
    def put(here: Path) -> None:
        (here / target).mkdir(exist_ok=True)
        (here / name).symlink_to(target)

    return put


RUN = ("run", "p.yaml", "model", "-o", "out")
APPLY = ("apply-delta", "model", "made/delta", "-o", "out")
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "notes in a result": (foreign("out/notes.txt"), (*RUN, "--overwrite"), "notes.txt"),
    "notes in an export": (foreign("out/hf/notes.txt"), (*RUN, "--overwrite"), "hf/notes.txt"),
    "a changed model card": (foreign("out/README.md"), (*RUN, "--overwrite"), "README.md"),
    "a file called like a report": (foreign("new/report.json"), (*RUN[:-1], "new", "--overwrite"), "report.json"),
    "a file called like weights": (foreign("new/compress.safetensors"), (*RUN[:-1], "new", "--overwrite"), "no run"),
    "another program's manifest": (foreign("new/manifest.json", "{}"), (*RUN[:-1], "new", "--overwrite"), "no run"),
    "work that is not ours": (foreign("new.work/thesis.txt"), (*RUN[:-1], "new"), "new.work"),
    "work that is called like ours": (foreign("new.work/s00.json"), (*RUN[:-1], "new", "--fresh"), "new.work"),
    "the model is the work": (moved("model", "m.work"), ("run", "p.yaml", "m.work", "-o", "m"), "m.work"),
    "the base is the work": (moved("model", "m.work"), ("apply-delta", "m.work", "made/delta", "-o", "m"), "m.work"),
    "the delta is the result": (moved("made", "out2"), ("apply-delta", "model", "out2/delta", "-o", "out2"), "delta"),
    "the text lies in the result": (
        lambda here: write_pipeline(here / "p.yaml", f"evaluate: {{source: {here / 'out/words.txt'}}}\npasses: [rtn]")
        and shutil.copy("words.txt", "out/words.txt") and None,
        (*RUN, "--overwrite"),
        "words.txt",
    ),
    "the pipeline lies in the result": (moved("p.yaml", "out/p.yaml"), ("run", "out/p.yaml", *RUN[2:]), "p.yaml"),
    "a merged model is the result": (
        lambda here: write_pipeline(here / "p.yaml", "passes: [{average: {models: [out/hf]}}]") and None,
        (*RUN, "--overwrite"),
        "merged model out/hf",
    ),
    "the result is a link": (linked("new", "elsewhere"), (*RUN[:-1], "new", "--overwrite"), "new is a link"),
    "the work is a link": (linked("new.work", "elsewhere"), (*RUN[:-1], "new"), "new.work"),
    "the work of a delta is a link": (linked("new.work", "elsewhere"), (*APPLY[:-1], "new"), "new.work"),
    "a folder called like an export": (foreign("made/hf/mine.txt"), ("export", "made", "--to", "hf"), "mine.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_the_users_is_refused_by_name_and_left_alone(name: str, here: Path) -> None:
    prepare, command, said = REFUSED[name]
    prepare(here)
    before = files_of(here)
    ended = compress_command(*command)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert said in ended.err
    assert files_of(here) == before


def test_a_mount_point_is_refused_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("new"))
    ended = compress_command(*RUN[:-1], "new")
    assert (ended.code, "mount point" in ended.err) == (2, True)


def test_a_result_with_exports_is_replaced_and_what_lies_beside_it_stays(here: Path) -> None:
    compress.export_to("out", [Hf()])
    (here / "out.old-mine").mkdir()
    (here / "out.old-mine" / "notes.txt").write_text("of the user")
    write_pipeline(here / "p.yaml", "passes: [{rtn: {scheme: w8g32}}]")
    before = {name: data for name, data in files_of(here).items() if not name.startswith("out/")}
    assert compress_command(*RUN, "--overwrite").code == 0
    assert {name: data for name, data in files_of(here).items() if not name.startswith("out/")} == before
    assert not (here / "out" / "hf").exists()


def test_a_note_in_the_work_folder_stays(here: Path) -> None:
    with lock.held(here / "new.work"):
        (here / "new.work" / "notes.txt").write_text("of the user")
    assert compress_command(*RUN[:-1], "new", "--fresh").code == 0
    assert (here / "new.work" / "notes.txt").read_text() == "of the user"
    assert compress.verify("new")


def test_links_that_lead_out_of_a_model_are_not_copied(here: Path) -> None:
    (here / "secret.txt").write_text("secret")
    (here / "model" / "merges.txt").symlink_to("../secret.txt")
    (here / "model" / "vocab.txt").symlink_to("tokenizer.json")
    ended = compress_command(*RUN[:-1], "new")
    assert ended.code == 0, ended.err
    assert "merges.txt is a link that leads out of the model's folder" in ended.err
    names = {path.name for path in (here / "new").iterdir()}
    assert "vocab.txt" in names
    assert "merges.txt" not in names


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_a_lock_lets_in_one_at_a_time_and_one_that_was_left_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "out.work"
    with lock.held(work):
        with pytest.raises(UsageError, match=rf"out.work is in use by pid {os.getpid()} on host .* since 20"):
            lock.refuse_others(work)
        with pytest.raises(UsageError, match="is in use by pid"), lock.held(work):
            pass
        said = json.loads((work / lock.LOCK).read_text())
        (work / "s00.json").write_text("{}")
    assert not caplog.text
    said["holder"]["start"] -= 1  # a process of that number that ended before
    (work / lock.LOCK).write_text(json.dumps(said))
    lock.refuse_others(work)
    with lock.held(work):
        assert f"out.work was left by pid {os.getpid()} on host" in caplog.text
        (work / "s00.json").unlink()
    assert not work.exists()


def test_where_locks_are_unknown_the_file_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(lock.UNLOCKABLE[0], "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    work = tmp_path / "out.work"
    with lock.held(work):
        pass
    work.mkdir()
    for change, message in (
        ({}, "is in use by pid 1 "),
        ({"host": "other"}, r"on host other .*; if it has ended, remove"),
    ):
        holder = {**lock.Holder.here().__dict__, "pid": 1, "start": lock._start_of(1), **change}
        (work / lock.LOCK).write_text(json.dumps({"format": lock.FORMAT, "holder": holder}))
        with pytest.raises(UsageError, match=message), lock.held(work):
            pass


# --- bits that flip ---------------------------------------------------------------------------------------------------


def flips(file: Path, count: int) -> Iterator[bytes]:
    """A file with one bit changed, at places all over it."""
    whole = file.read_bytes()
    for i in range(count):
        place = (2 * i + 1) * len(whole) // (2 * count)
        yield whole[:place] + bytes([whole[place] ^ (1 << i % 8)]) + whole[place + 1 :]


def test_no_flipped_bit_of_a_result_is_served(here: Path) -> None:
    for name in ("compress.safetensors", "config.json", "manifest.json", "report.json", "tokenizer.json"):
        file = here / "out" / name
        whole = file.read_bytes()
        for flipped in flips(file, 3):
            file.write_bytes(flipped)
            commands = [
                ("inspect", "out"),
                ("export", "out", "--to", "hf"),
                RUN,
                ("eval", "out", "--source", "words.txt"),
            ]
            for command in commands:
                ended = compress_command(*command)
                assert ended.code == 2, (name, command, ended.err)
                assert name in ended.err or (name, command) == ("report.json", RUN)
        file.write_bytes(whole)
    assert compress_command(*RUN).code == 0


def test_a_damaged_tensor_is_named(here: Path) -> None:
    file = here / "out" / "compress.safetensors"
    data = bytearray(file.read_bytes())
    data[read_header(file).tensors["model.norm.weight"].begin + 1] ^= 8
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"safetensors is not what was written: tensor model.norm.weight differs"):
        compress.verify("out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"compress.safetensors is missing"):
        compress.verify("out")
    with pytest.raises(UsageError, match=r"model has no manifest.json"):
        compress.verify("model")


def test_loading_with_verify_reads_nothing_that_was_changed(here: Path) -> None:
    config = AutoConfig.from_pretrained("out")
    config.quantization_config["verify"] = True
    assert AutoModelForCausalLM.from_pretrained("out", config=config)
    file = here / "out" / "compress.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"compress.safetensors is not what was written: tensor .* differs"):
        AutoModelForCausalLM.from_pretrained("out", config=config)


def test_a_manifest_that_names_files_elsewhere_is_refused(here: Path) -> None:
    for name in ("../words.txt", "/etc/hostname", "a/../../words.txt"):
        made = manifest.Manifest({name: {"bytes": 1, "sha256": "00"}}, {})
        (here / "out" / "manifest.json").write_text(made.to_json())
        ended = compress_command(*RUN, "--overwrite")
        assert (ended.code, "manifest.json is damaged" in ended.err) == (2, True), ended.err
    assert (here / "words.txt").exists()


def drop_module(config: dict[str, Any]) -> None:
    del config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]


def change_layers(by: int) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config["num_hidden_layers"] += by
        config.pop("layer_types", None)

    return change


@pytest.mark.parametrize("change", [drop_module, change_layers(1), change_layers(-1)], ids=["module", "more", "fewer"])
def test_loading_never_leaves_a_tensor_at_random(change: Callable[[dict[str, Any]], None], here: Path) -> None:
    file = here / "out" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (here / "out" / "manifest.json").unlink()
    with pytest.raises((ValueError, AttributeError), match=r"is missing|belongs to nothing|no attribute"):
        AutoModelForCausalLM.from_pretrained("out")
    for command in (("export", "out", "--to", "hf"), ("eval", "out", "--source", "words.txt")):
        assert compress_command(*command, unexpected=True).code in (1, 2)


# --- files that change, and units that were kept ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "tuned/model.safetensors"])
def test_a_source_that_is_replaced_during_the_run_is_refused(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pipeline(here / "p.yaml", "passes: [{average: {models: [tuned]}}, {rtn: {scheme: w4g32}}]")
    before = api.packed_layout.write_packed

    def write_and_replace(*arguments: Any) -> None:
        before(*arguments)
        data = bytearray((here / name).read_bytes())
        data[-3] ^= 4
        (here / name).write_bytes(bytes(data))

    monkeypatch.setattr(api.packed_layout, "write_packed", write_and_replace)
    ended = compress_command(*RUN[:-1], "new")
    assert ended.code == 2
    assert f"{name} was changed or removed while this run was reading it" in ended.err
    assert not (here / "new").exists()


def test_a_base_that_is_replaced_while_a_delta_is_added_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare_and_replace(*_: Any) -> int:
        shutil.copy("tuned/model.safetensors", "model/model.safetensors")
        return 1

    monkeypatch.setattr(apply_delta, "compare_tensors", compare_and_replace)
    ended = compress_command(*APPLY[:-1], "new")
    assert (ended.code, "model.safetensors was changed or removed" in ended.err) == (2, True), ended.err
    assert [path.name for path in here.glob("new*")] == []


def test_a_source_is_known_by_every_byte_and_not_by_its_time(here: Path) -> None:
    file = here / "model" / "model.safetensors"
    first = FolderSource(here / "model").fingerprint()
    os.utime(file, (1, 1))
    assert FolderSource(here / "model").fingerprint() == first
    data = bytearray(file.read_bytes())
    for place in (len(data) // 2 + 1, len(data) - 1):
        data[place] ^= 1
        file.write_bytes(bytes(data))
        os.utime(file, (1, 1 + place))
        assert FolderSource(here / "model").fingerprint() != first


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs wanda and gptq until the second pass has begun; returns a function that goes on, with other options."""
    passes = TWO["passes"]
    done: list[str] = []
    before = block_stage.BlockSequential.run

    def run(**changes: Any) -> list[str]:
        done.clear()
        pipeline = {"passes": changes.pop("passes", passes), **changes}
        compress.run(pipeline, tiny_folder, tmp_path / "out", calibration=tokens)
        return done

    def stop(self: Any, context: Any, stage: Any, *rest: Any) -> Any:
        if stage.number == 1:
            raise KeyboardInterrupt
        return before(self, context, stage, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(block_stage.BlockSequential, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    worked = block_stage._worked_on

    def noted(context: Any, number: int, *rest: Any) -> Any:
        done.append(f"s{number:02d}")
        return worked(context, number, *rest)

    monkeypatch.setattr(block_stage, "_worked_on", noted)
    return run


def test_an_interrupted_run_that_goes_on_gives_no_reason_to_start_over(
    interrupted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert interrupted() == ["s01", "s01"]
    assert "starting over" not in caplog.text


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "starting over: the seed is 1, and was 0 since"),
    "options": ({"passes": [{"wanda": {"sparsity": 0.6}}]}, "starting over: the options of wanda changed since"),
    "pass": ({"passes": ["sparsegpt"]}, "starting over: pass 1 is sparsegpt, and was wanda since"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_run_says_why_it_starts_over(name: str, interrupted: Any, caplog: pytest.LogCaptureFixture) -> None:
    change, said = CHANGED[name]
    assert "s00" in interrupted(**change)
    assert said in caplog.text


def test_other_threads_other_code_and_another_model_start_over_and_this_is_said(
    interrupted: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.work" / "dependencies.json"
    for name, value, said in (
        ("the model", "0" * 64, "the model changed"),
        ("the number of threads", 7, f"the number of threads is {torch.get_num_threads()}, and was 7"),
        ("the code of compress, or torch or transformers,", "0" * 64, "or torch or transformers, changed"),
    ):
        kept = json.loads(file.read_text())
        kept["facts"][name] = value
        file.write_text(json.dumps(kept))
        with monkeypatch.context() as patched:
            patched.setattr(block_stage.BlockSequential, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                interrupted()
        assert "starting over: " in caplog.text
        assert said in caplog.text
        caplog.clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 7)
        assert interrupted() == ["s00", "s00", "s01", "s01"], "units of one thread are not those of seven"


@pytest.mark.parametrize(
    "kind", only(["s00-b0001.safetensors"], ["s00-b0000.safetensors", "s00-b0001.safetensors", "original.json"])
)
def test_a_unit_with_a_flipped_bit_is_done_again(
    kind: str, interrupted: Any, tmp_path: Path, tiny_folder: Path, tokens: Tensor
) -> None:
    file = tmp_path / "out.work" / kind
    *_, flipped = flips(file, 2)
    file.write_bytes(flipped)
    interrupted()
    compress.run(TWO, tiny_folder, tmp_path / "whole", calibration=tokens)
    name = "compress.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
