"""`compress push`: what goes to the hub, and what stands in its way."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from commands import compress_command
from conftest import make_llama

import compress
from compress import CheckpointError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    make_llama().save_pretrained(folder / "model")
    compress.run({"passes": [{"rtn": {"scheme": "w4g32"}}], "export": ["hf"]}, folder / "model", folder / "out")
    (folder / "out" / "notes.txt").write_text("mine")
    return folder / "out"


class Hub:
    """What a hub would be asked for."""

    def __init__(self, **_: Any):
        self.asked = ASKED

    def create_repo(self, repository: str, **options: Any) -> str:
        self.asked.append(("create", {"repo_id": repository, **options}))
        return f"https://hub/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


ASKED: list[tuple[str, dict[str, Any]]] = []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    ASKED.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return ASKED


def test_everything_that_was_written_goes_and_nothing_else(made: Path, hub: list[tuple[str, dict[str, Any]]]) -> None:
    upload = compress.push(made, "me/tiny-w4", private=True, revision="next")
    assert upload.address == "https://hub/me/tiny-w4"
    (_, created), (_, sent) = hub
    assert created == {"repo_id": "me/tiny-w4", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"], sent["revision"]) == ("me/tiny-w4", made, "next")
    there = {file.name for file in made.iterdir() if file.is_file()}
    assert {*sent["allow_patterns"]} == there - {"notes.txt"}
    assert {"README.md", "manifest.json", "compress.safetensors"} <= there
    assert upload.bytes == sum((made / name).stat().st_size for name in upload.files)


def test_a_dry_run_sends_nothing_and_says_what_would_go(made: Path, hub: list[tuple[str, dict[str, Any]]]) -> None:
    ended = compress_command("push", made, "me/tiny", "--export", "hf", "--dry-run")
    assert ended.code == 0, ended.err
    assert not hub
    files = [line.split()[-1] for line in ended.out.splitlines()]
    assert {"model.safetensors", "config.json", "README.md", "manifest.json", "me/tiny"} <= {*files}
    assert not [name for name in files if name.startswith("hf")]
    ended = compress_command("push", made, "me/tiny")
    assert ended.code == 0, ended.err
    assert "https://hub/me/tiny: " in ended.out
    assert [name for name, _ in hub] == ["create", "upload"]


def test_what_stands_in_the_way_is_said_before_anything_is_sent(
    made: Path, tmp_path: Path, hub: list[tuple[str, dict[str, Any]]]
) -> None:
    wrong = (
        ("me/a b", None, "is no name of a repository"),
        ("tiny", None, "names no owner; write org/name, such as me/tiny"),
        ("me/tiny", "gguf", "has no export 'gguf'; it has hf: write it with `compress export`"),
    )
    for repository, export, said in wrong:
        with pytest.raises(UsageError, match=said):
            compress.push(made, repository, export=export)
    with pytest.raises(UsageError, match="no such folder"):
        compress.push(tmp_path / "nowhere", "me/tiny")
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        compress.push(tmp_path, "me/tiny")
    for file in made.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        compress.push(tmp_path, "me/tiny")
    assert not hub


def test_a_hub_that_refuses_is_answered_in_a_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Hub):
        def create_repo(self, repository: str, **options: Any) -> str:
            raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(UsageError, match=r"did not take .* as me/tiny: 401 Unauthorized; log in with `hf auth login`"):
        compress.push(made, "me/tiny")
