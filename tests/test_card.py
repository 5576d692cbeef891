"""Model cards: what hubs read of a result, the terms of what it was made of, and how each folder is run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import compress_command, files_of, make_changed, make_text_model, write_pipeline, write_text

from compress.config.pipeline import FORMATS
from compress.models.origin import hub_ids, said_by

TERMS = "license: other\nlicense_name: own-terms\nlanguage: [en, de]\n"
PIPELINE = "evaluate: {source: WORDS, samples: 1, length: 32}\npasses: [PASSES]\nexport: [EXPORTS]\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a card and a licence."""
    folder = make_text_model(tmp_path / "model")
    (folder / "README.md").write_text(f"---\n{TERMS}tags: [theirs]\nbase_model: who/else\n---\n# A model\n")
    (folder / "LICENSE").write_text("terms")
    write_text(tmp_path / "words.txt")
    return folder


def ran(model: Path, passes: str, exports: str = "safetensors") -> Path:
    text = PIPELINE.replace("WORDS", str(model.parent / "words.txt")).replace("PASSES", passes)
    file = write_pipeline(model.parent / "p.yaml", text.replace("EXPORTS", exports))
    ended = compress_command("run", file, model, "-o", model.parent / "out")
    assert ended.code == 0, ended.err
    return model.parent / "out"


def head_of(card: Path) -> dict[str, Any]:
    _, head, _ = card.read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_result_says_its_terms_and_what_was_done_and_carries_the_licence(model: Path) -> None:
    out = ran(model, "{magnitude: {}}, {rtn: {scheme: w4g32}}", "hf")
    for folder in (out, out / "hf"):
        assert head_of(folder / "README.md") == {
            "license": "other", "license_name": "own-terms", "language": ["en", "de"], "library_name": "transformers",
            "tags": ["compress", "magnitude", "rtn", "4-bit"],
        }  # fmt: skip
        assert (folder / "LICENSE").read_text() == "terms"
        assert "# model, compressed" in (folder / "README.md").read_text()
    assert 'from_pretrained("./hf")' in (out / "README.md").read_text()
    assert 'from_pretrained(".")' in (out / "hf" / "README.md").read_text()


def test_an_export_that_is_written_later_has_a_card_like_one_of_the_run(model: Path, tmp_path: Path) -> None:
    out = ran(model, "{rtn: {scheme: w4g32}}", "hf")
    first = files_of(out / "hf")
    assert compress_command("export", out, "--to", "hf").code == 0
    assert files_of(out / "hf") == first
    (out / "README.md").write_text("my own words")
    assert compress_command("export", out, "--to", "hf").code == 0
    assert head_of(out / "hf" / "README.md") == {"library_name": "transformers", "tags": ["compress"]}


def test_of_a_merge_what_all_parents_say_alike_holds(model: Path) -> None:
    other = make_changed(model.parent / "other", model, 1)
    (other / "README.md").write_text("---\nlicense: other\nlicense_name: their-terms\n---\n")
    out = ran(model, f"{{average: {{models: ['{other}']}}}}")
    assert head_of(out / "README.md") == {
        "license": "other", "library_name": "transformers", "tags": ["compress", "average", "merge"]
    }  # fmt: skip


def test_names_on_the_hub_are_known_of_ids_adapters_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "models--some--model" / "snapshots" / "0a"
    cached.mkdir(parents=True)
    (tmp_path / "a" / "folder").mkdir(parents=True)
    assert hub_ids("some/model") == ["some/model"]
    assert hub_ids("some/model+an/adapter") == ["some/model", "an/adapter"]
    assert hub_ids(cached) == ["some/model"]
    for local in ("demo", "a/folder", tmp_path / "a", "./a", "~/a"):
        assert hub_ids(local) == []


def test_a_parent_on_the_hub_is_named_with_what_became_of_it(model: Path) -> None:
    cached = model.parent / "models--some--model" / "snapshots" / "0a"
    cached.parent.mkdir(parents=True)
    model.rename(cached)
    (cached.parent / "words.txt").write_bytes((model.parent / "words.txt").read_bytes())
    top = head_of(ran(cached, "{rtn: {scheme: w8g32}}") / "README.md")
    assert (top["base_model"], top["base_model_relation"]) == (["some/model"], "quantized")


@pytest.mark.parametrize(
    "text",
    [
        "no head at all", "---\nlicense: mit\n", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n",
        "---\nlicense: 3\n---\n", f"---\nlicense: {'a' * 1000}\n---\n", '---\nlicense: "a\\e[31m"\n---\n', "",
        "---\nlicense: !!python/object/apply:os.system [exit]\n---\n", "---\nlicense: []\n---\n",
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert said_by(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert said_by(tmp_path) == {}
    assert said_by(tmp_path / "nowhere") == {}


def test_every_format_says_how_it_is_run() -> None:
    for exporter in FORMATS.values():
        language, code = exporter.used
        assert language in ("python", "console")
        assert "FOLDER" in code
        if language == "python":
            compile(code.replace("LOADER", "AutoModelForCausalLM"), "card", "exec")
