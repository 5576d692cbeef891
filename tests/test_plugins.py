"""Passes of one's own in pipeline files: from a file, from an installed package; whose defect an impossible edit is."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import compress_command, make_text_model, write_pipeline, write_text

from compress import UsageError, register_pass
from compress.config import plugins
from compress.config.pipeline import METHODS
from compress.config.reading import parse

PAGE = (Path(__file__).parent.parent / "docs" / "writing_a_pass.md").read_text()
RUN = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
assert RUN is not None
SOURCE = RUN[1]
OPTIONS = "evaluate: {source: WORDS, samples: 1, length: 32}\npasses: [{powers_of_two: {exponents: EXPONENTS}}]\n"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers is known to that test alone."""
    known, modules, loaded = dict(METHODS), set(sys.modules), set(plugins.LOADED)
    yield
    METHODS.clear()
    METHODS.update(known)
    plugins.LOADED.intersection_update(loaded)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent.name.startswith("test_"):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    make_text_model(tmp_path / "model")
    write_text(tmp_path / "words.txt")
    (tmp_path / "powers_of_two.py").write_text(SOURCE)
    return tmp_path


def pipeline(here: Path, exponents: int = 5) -> Path:
    text = OPTIONS.replace("WORDS", str(here / "words.txt")).replace("EXPONENTS", str(exponents))
    return write_pipeline(here / "p.yaml", text)


def test_the_pass_of_the_page_runs_from_a_file_and_is_measured_and_checked_as_any_other(here: Path) -> None:
    file, own = pipeline(here), ("--plugin", here / "powers_of_two.py")
    ended = compress_command("check", file)
    assert ended.code == 2
    assert "unknown method" in ended.err
    assert "a pass of your own is given with --plugin FILE" in ended.err
    assert compress_command("check", file, here / "model", *own).code == 0
    assert "powers_of_two" in compress_command("plan", file, here / "model", *own).out
    assert '"powers_of_two"' in compress_command("schema", *own).out
    ended = compress_command("run", file, here / "model", "-o", here / "out", *own)
    assert ended.code == 0, ended.err
    assert "powers_of_two" in ended.out
    del METHODS["powers_of_two"]
    assert compress_command("inspect", here / "out").code == 0
    assert compress_command("eval", here / "out").code == 0
    assert "\n".join(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)).startswith("evaluate: {source: demo")


def test_what_the_pass_of_the_page_makes_is_what_it_says(here: Path) -> None:
    plugins.load([here / "powers_of_two.py"])
    from compress.passes.base import LinearPass, Target

    made = METHODS["powers_of_two"](exponents=4)  # type: ignore[call-arg]
    assert isinstance(made, LinearPass)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    rounded = made.run(Target(weight)).weight
    assert rounded is not None
    kept = rounded[rounded != 0].abs()
    assert torch.equal(kept.log2(), kept.log2().round())
    assert len(kept.unique()) <= 4
    ratio = (rounded / weight)[rounded != 0]
    assert ((ratio > 0.5) & (ratio <= 2)).all()


def test_its_options_are_checked_as_those_of_any_other(here: Path) -> None:
    ended = compress_command("check", pipeline(here, 99), "--plugin", here / "powers_of_two.py")
    assert ended.code == 2
    assert "p.yaml:2: passes[0].powers_of_two.exponents: 99 is not between 1 and 16" in ended.err


def test_a_result_depends_on_the_code_of_its_pass(here: Path) -> None:
    run = ("run", pipeline(here), here / "model", "-o", here / "out", "--plugin", here / "powers_of_two.py")
    assert compress_command(*run).code == 0
    (here / "powers_of_two.py").write_text(SOURCE.replace('"""Every weight', '"""Each weight'))
    assert compress_command(*run).code == 0, "the result is there already: a docstring computes nothing"
    (here / "powers_of_two.py").write_text(SOURCE.replace("exp2() / 2", "exp2() / 3"))
    ended = compress_command(*run)
    assert ended.code == 2
    assert "is not the result of this run" in ended.err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a = 1\nb = nothing\n", r"own\.py:2: NameError: name 'nothing' is not defined"),
        ("a = 1\n\nb = = 2\n", r"own\.py:3: SyntaxError: invalid syntax"),
        ("a = 1\n", "it defines no pass, which is a class with a `key` derived from one of compress"),
        (SOURCE.replace("powers_of_two", "gptq"), r"own\.py:\d+: PowersOfTwo has the key gptq, which is taken"),
        (SOURCE.replace("powers_of_two", "onnx"), "has the key onnx, which is taken"),
        (SOURCE.replace('"powers_of_two"', '"Powers of 2"'), "has no key of small letters, digits and underscores"),
        (SOURCE.replace("frozen=True, ", ""), r"own\.py:\d+: TypeError: cannot inherit non-frozen dataclass"),
        (SOURCE.replace("@dataclass(frozen=True, kw_only=True)\n", ""), "is no frozen dataclass"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(here: Path, source: str, said: str) -> None:
    (here / "own.py").write_text(source)
    ended = compress_command("check", pipeline(here), "--plugin", here / "own.py")
    assert (ended.code, ended.out) == (2, "")
    assert re.search(said, ended.err), ended.err


def test_a_file_that_is_not_there_or_has_the_name_of_another_module_is_refused(here: Path) -> None:
    (here / "json.py").write_text(SOURCE)
    for name, said in (
        ("nowhere.py", "no such file of Python"),
        ("p.yaml", "no such"),
        ("json.py", "called json"),
    ):
        pipeline(here)
        ended = compress_command("check", here / "p.yaml", "--plugin", here / name)
        assert ended.code == 2
        assert said in ended.err


def test_a_defect_of_a_pass_is_said_with_its_file_and_line(here: Path) -> None:
    line = 1 + SOURCE.splitlines().index("@dataclass(frozen=True, kw_only=True)")
    for made, said in (
        ("Edit(weight=target.weight[1:])", "new values of shape .*"),
        ("target.weight", "it returned a Tensor, and should an Edit"),
        ("Edit(weight=target.weight.tolist())", "`weight` of its edit is a list, and should be of Tensor"),
        ("Edit(weight=target.weight, mask=size)", r"`mask` of its edit holds torch\.float32, and should bool"),
    ):
        (here / "own.py").write_text(re.sub(r"return Edit\(.*\)\n", f"return {made}\n", SOURCE))
        ended = compress_command("run", pipeline(here), here / "model", "-o", here / "out", "--plugin", here / "own.py")
        assert ended.code not in (0, 2)
        assert re.search(rf"{said}; this is a defect of \S*own\.py:{line}", ended.err), ended.err


def test_a_pass_of_an_installed_package_needs_no_option(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    point = importlib.metadata.EntryPoint("powers_of_two", "powers_of_two:PowersOfTwo", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group, name: [point] if name == point.name else [])
    found = parse("passes: [{powers_of_two: {exponents: 3}}]").passes[0][0]
    assert (type(found).__name__, found.options()) == ("PowersOfTwo", {"exponents": 3})
    broken = importlib.metadata.EntryPoint("other", "powers_of_two:Nothing", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group, name: [broken])
    with pytest.raises(UsageError, match=r"Nothing, which offers other, cannot be imported: AttributeError"):
        parse("passes: [other]")
    renamed = importlib.metadata.EntryPoint("other", "powers_of_two:PowersOfTwo", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group, name: [renamed])
    with pytest.raises(UsageError, match="is offered as other, and its key is powers_of_two"):
        parse("passes: [other]")


def test_what_is_no_pass_is_not_registered() -> None:
    with pytest.raises(UsageError, match="int is no pass; derive it from"):
        register_pass(int)  # type: ignore[type-var]
