"""The rules of the code base, checked on its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress

ROOT = Path(compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 450
MOST_LINES_OF_A_PASS = 250

# Who may import what of this package: imports point one way. A folder or file that is not named here is not limited.
ALLOWED = {
    "encodings": {"encodings", "errors"},
    "calibration": {"calibration", "encodings", "errors", "demo"},
    "passes": {"passes", "calibration", "encodings", "axes", "errors"},
    "runtime": {"runtime", "encodings", "errors"},
    "export": {
        "export",
        "runtime",
        "artifact",
        "sources",
        "graph",
        "hub",
        "ledger",
        "progress",
        "encodings",
        "evaluate",
        "calibration",
        "errors",
    },
    "demo": {"demo", "hub"},
    "errors.py": set(),
    "progress.py": set(),
    "axes.py": set(),
    "graph.py": {"axes", "errors"},
    "traced.py": {"axes", "graph"},
    "aligning.py": {"sources", "artifact", "passes", "residence", "sweep", "traced"},
    "sources.py": {"errors"},
    "artifact.py": {"sources", "graph", "encodings", "errors"},
    "ledger.py": {"artifact", "encodings", "errors"},
    "observe.py": {"passes", "graph", "encodings", "errors"},
    "evaluate.py": {"calibration", "errors"},
    "report.py": {"errors", "evaluate", "ledger"},
    "draw.py": {"passes"},
    "shares.py": {"plan", "observe", "passes", "artifact", "graph", "progress"},
    "typed.py": {"passes", "export", "errors"},
    "pipeline.py": {"passes", "calibration", "export", "typed", "errors"},
}
FORBIDDEN_TO_PASSES = {"transformers", "os", "safetensors", "pathlib", "shutil", "random", "numpy"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


each_file = pytest.mark.parametrize("file", FILES, ids=name_of)
each_pass_file = pytest.mark.parametrize("file", sorted((ROOT / "passes").rglob("*.py")), ids=name_of)


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in it."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            if node.module == "compress":
                yield from (f"compress.{alias.name}" for alias in node.names)
            else:
                yield node.module


def calls(file: Path) -> Iterator[tuple[str, int]]:
    """(attribute or name, line) of everything a file calls or reads."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    files = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py"))
    assert files
    for file in files:
        if file == ROOT / "demo" / "speak.py":
            continue  # a program of its own, at the very end of the chain
        for module in imported(file):
            if module.split(".")[0] == "compress":
                used = module.split(".")[1]
                assert used in ALLOWED[part], f"{name_of(file)} imports {module}"


@each_pass_file
def test_a_pass_knows_no_file_and_no_model_library(file: Path) -> None:
    assert not FORBIDDEN_TO_PASSES & {module.split(".")[0] for module in imported(file)}


@each_pass_file
def test_a_pass_knows_no_device_and_no_global_random_state(file: Path) -> None:
    forbidden = {"cuda", "manual_seed", "seed", "open", "global"}
    assert not forbidden & {name for name, _ in calls(file)}


def test_hooks_are_registered_in_one_file_only() -> None:
    hooks = {"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook"}
    hooks |= {"register_module_forward_hook", "register_module_forward_pre_hook"}
    found = {name_of(file) for file in FILES for name, _ in calls(file) if name in hooks}
    assert found == {"calibration/collect.py"}


@each_file
def test_no_pickle_is_ever_loaded(file: Path) -> None:
    assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {
        module.split(".")[0] for module in imported(file)
    }
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
            assert node.value.id != "torch", f"{name_of(file)}:{node.lineno} calls torch.load"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in {alias.name for alias in node.names}


@each_file
def test_code_of_a_model_folder_is_never_run(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__")


@each_file
def test_yaml_is_read_safely(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
            assert node.attr not in ("load", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader")


@each_file
def test_a_file_can_be_read_at_one_sitting(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@each_pass_file
def test_a_pass_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_A_PASS


@each_file
def test_a_file_says_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(tree(file))
