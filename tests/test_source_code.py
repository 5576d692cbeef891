"""Which code a stage's key holds: what its passes and the engine compute with, and nothing else."""

import ast
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from selection import only

import compress
from compress.engine.stages import RUNNERS
from compress.io import source_code
from compress.io.source_code import Locate, closure, code_of, located, plug_ins
from compress.passes import PASSES, Pass

MODULES = {reach: type(runner).__module__ for reach, runner in RUNNERS.items()}  # that run the stages


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that may be changed."""
    root = tmp_path / "compress"
    shutil.copytree(Path(compress.__file__).parent, root, ignore=shutil.ignore_patterns("model", "__pycache__"))
    return root


def located_in(package: Path) -> Locate:
    def locate(module: str) -> Path | None:
        found = located(module)
        if found is None or not module.startswith("compress"):
            return found
        return package / found.relative_to(source_code.ROOT)

    return locate


def keys(package: Path) -> dict[str, str]:
    """Key of a pass -> what its code gives."""
    locate = cache(located_in(package))
    return {p.key: code_of([p], [MODULES[p.reach]], locate) for p in PASSES}


KNOWN: dict[Path, dict[str, str]] = {}  # copy of the package -> keys after what was last changed in it


@cache
def unchanged() -> dict[str, str]:
    """The keys of the package as it is."""
    return keys(source_code.ROOT)


MERGES = {p.key for p in PASSES if p.reach == "merge"}


def changed(package: Path, name: str, change: Callable[[str], str]) -> set[str]:
    """The passes whose key is another one after a change of a file."""
    file = package / name
    before, text = KNOWN.get(package) or unchanged(), file.read_text()
    assert change(text) != text
    file.write_text(change(text))
    after = KNOWN[package] = keys(package)
    return {key for key in before if before[key] != after[key]}


def with_a_line(text: str) -> str:
    return text + "\nADDED = 1\n"


@pytest.mark.parametrize(
    "file",
    only(["api/run.py"], ["export/gguf/keys.py", "export/onnx/trace.py", "report/html.py", "cli.py", "api/run.py"]),
)
def test_what_no_pass_computes_with_changes_no_key(package: Path, file: str) -> None:
    if not (package / file).is_file():
        (package / file).write_text("")
    assert changed(package, file, with_a_line) == set()


def test_comments_docstrings_layout_and_imports_for_type_checkers_change_no_key(package: Path) -> None:
    def reworded(text: str) -> str:
        tree = ast.parse(text)
        documented = ast.get_docstring(tree)
        assert documented
        text = text.replace(documented.splitlines()[0], "Other words.", 1)
        return f"# a comment\n\n{text}\n# another\nif TYPE_CHECKING:\n    import compress.cli\n"

    for file in ("passes/quantize/gptq.py", "engine/sweep.py", "encodings/uniform.py"):
        assert changed(package, file, reworded) == set(), file


def test_a_changed_pass_changes_its_key_and_those_of_passes_that_use_it(package: Path) -> None:
    assert changed(package, "passes/quantize/gptq.py", with_a_line) == {"gptq", "eora"}
    assert changed(package, "passes/prune/bip.py", with_a_line) == {"bip"}
    assert changed(package, "passes/merge/ties.py", with_a_line) == {"ties", "breadcrumbs", "compeft"}


def test_a_file_that_several_passes_import_changes_their_keys_and_no_other(package: Path) -> None:
    solver = changed(package, "passes/solvers/obs.py", with_a_line)
    assert {"gptq", "sparsegpt"} <= solver
    assert not {"rtn", "ties", "perp"} & solver
    assert (
        changed(package, "passes/solvers/obs.py", lambda text: text.replace("width // every", "width // 2")) == solver
    )


def test_what_the_engine_computes_with_changes_the_keys_of_its_stages(package: Path) -> None:
    names = {p.key for p in PASSES}
    assert changed(package, "engine/validate.py", with_a_line) == {
        p.key for p in PASSES if p.reach in ("matrix", "block", "model", "channels", "stream")
    }
    assert changed(package, "engine/merge/aligning.py", with_a_line) == MERGES
    assert changed(package, "models/graph.py", with_a_line) == names


def test_every_pass_reaches_its_own_file_and_the_libraries_it_uses() -> None:
    for kind in PASSES:
        files, _ = closure([kind.__module__], located)
        assert {kind.__module__, "compress.passes.base", "compress.lazy"} <= files.keys(), kind
    _, libraries = closure(["compress.passes.quantize.codebook"], located)
    assert "sklearn" in libraries
    assert "sklearn" not in closure(["compress.passes.quantize.rtn"], located)[1]


def test_no_stage_computes_with_an_exporter_or_the_command_line() -> None:
    files, _ = closure([*MODULES.values(), *(kind.__module__ for kind in PASSES)], located)
    rooms = {name.split(".")[1] for name in files if "." in name}
    assert not {"export", "config", "api", "cli"} & rooms


def test_what_is_installed_is_a_library_wherever_it_lies_and_a_plug_ins_helper_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("installed", "borrowed_library"), ("own", "own_helper")):
        (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / name / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path / folder)
    (tmp_path / "installed" / "borrowed_library-1.0.dist-info").mkdir()
    assert located("borrowed_library") is None
    assert located("own_helper") == tmp_path / "own" / "own_helper" / "__init__.py"


def test_another_version_of_a_library_changes_the_keys_of_what_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, str]:
        return {name: code_of([kind for kind in PASSES if kind.key == name]) for name in ("rtn", "codebook")}

    before, version = found(), source_code._installed_version
    for library, affected in (("torch", {"rtn", "codebook"}), ("transformers", {"rtn", "codebook"}),
                              ("sklearn", {"codebook"})):  # fmt: skip
        monkeypatch.setattr(
            source_code, "_installed_version", lambda name, new=library: "0" if name == new else version(name)
        )
        after = found()
        assert {name for name in before if before[name] != after[name]} == affected


# --- plug-ins ---------------------------------------------------------------------------------------------------------

PLUG_IN = """
import math

import compress
from compress import Rtn
from compress.passes.solvers.obs import Tiles as _Tiles  # noqa
from plugged_helper import SCALE


class Mine(Rtn):
    key = "mine"
    scale = SCALE * math.pi
    other = compress.Wanda
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], type[Pass]]]:
    """A pass of another module, which imports a helper of its own."""
    from compress.passes.solvers import obs

    name = next(n for n in vars(obs) if not n.startswith("_") and n[0].islower() and callable(vars(obs)[n]))
    (tmp_path / "plugged.py").write_text(PLUG_IN.replace("Tiles", name))
    (tmp_path / "plugged_helper.py").write_text("SCALE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def load() -> type[Pass]:
        kind: type[Pass] = importlib.import_module("plugged").Mine
        return kind

    yield load
    for module in ("plugged", "plugged_helper"):
        sys.modules.pop(module, None)


def test_a_plug_in_counts_with_its_source_its_own_helpers_and_what_it_takes_from_the_package(
    plug_in: Callable[[], type[Pass]], package: Path, tmp_path: Path
) -> None:
    locate, kind = located_in(package), plug_in()
    assert plug_ins([kind, *PASSES]) == [kind]

    def changes(file: Path) -> tuple[bool, bool]:
        before = code_of([kind], (), locate), code_of([compress.Rtn], (), locate)
        file.write_text(with_a_line(file.read_text()))
        after = code_of([kind], (), locate), code_of([compress.Rtn], (), locate)
        return before[0] != after[0], before[1] != after[1]

    assert changes(tmp_path / "plugged.py") == (True, False)
    assert changes(tmp_path / "plugged_helper.py") == (True, False)
    assert changes(package / "passes" / "solvers" / "obs.py") == (True, False)
    assert changes(package / "passes" / "prune" / "wanda.py") == (True, False)  # asked for as `compress.Wanda`
    assert changes(package / "passes" / "quantize" / "rtn.py") == (True, True)
    assert changes(package / "export" / "gguf" / "keys.py") == (False, False)
    assert changes(package / "passes" / "quantize" / "olive.py") == (False, False)


def test_a_pass_without_a_source_file_never_has_the_same_key_twice() -> None:
    typed: dict[str, type] = {}
    exec("class Mine(Base): pass", {"Base": compress.Rtn, "__name__": "typed_at_a_prompt"}, typed)
    assert code_of([typed["Mine"]]) != code_of([typed["Mine"]])
    assert code_of([compress.Rtn]) == code_of([compress.Rtn])
