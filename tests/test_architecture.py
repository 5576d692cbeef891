"""The rules of the code base, checked on its source."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PASS_FILES = [file for file in FILES if "passes" in file.relative_to(ROOT).parts]
MOST_LINES = 460
MOST_LINES_OF_A_PASS = 250
MOST_LINES_OF_A_FUNCTION = 60

# The rooms in their order: each may import only those above it. Nothing is exempt.
ROOMS = (
    "errors", "lazy", "logs", "progress", "encodings", "io", "models", "checkpoint", "runtime", "demo", "calibration",
    "passes", "export", "config", "planning", "report", "engine", "api", "testing", "cli",
    "__main__",
)  # fmt: skip
FORBIDDEN_TO_PASSES = {"transformers", "os", "safetensors", "pathlib", "shutil", "random", "numpy"}
FORBIDDEN_NAMES_IN_PASSES = {"cuda", "manual_seed", "seed", "open", "global"}
HOOKS = {
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_hook",
    "register_module_forward_hook", "register_module_forward_pre_hook",
}  # fmt: skip
OPENERS = {"Delta", "os", "PIL.Image"}  # whose `open` opens no text
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {"load", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room_of(module: str) -> str:
    """`compress.passes.base` -> `passes`; the package itself, which re-exports, is the room of nothing."""
    return module.split(".")[1] if "." in module else ""


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def nodes(file: Path) -> list[ast.AST]:
    """All that is in a file, gathered once for all tests."""
    return list(ast.walk(tree(file)))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("compress", *(parts[:-1] if parts[-1] == "__init__" else parts)))


MODULES = {module_of(file) for file in FILES}


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in it."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


def names_used(file: Path) -> Iterator[tuple[str, int]]:
    """(attribute or name, line) of everything a file calls or reads."""
    for node in nodes(file):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


def test_every_file_lies_in_a_room() -> None:
    assert {room_of(module_of(file)) for file in FILES} - {""} == set(ROOMS)


def test_a_room_imports_only_rooms_above_it() -> None:
    wrong = []
    for file in FILES:
        room = room_of(module_of(file))
        if room:
            allowed = set(ROOMS[: ROOMS.index(room) + 1])
            inner = (m for m in imported(file) if m.split(".")[0] == "compress")
            wrong += [f"{name_of(file)} imports {m}" for m in inner if room_of(m) not in allowed]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    needs = {module_of(f): {m for m in imported(f) if m in MODULES and m != module_of(f)} for f in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for needed in sorted(needs[module]):
                visit(needed, (*path, module))
            done.add(module)

    for module in sorted(needs):
        visit(module, ())


def test_a_pass_knows_no_file_no_model_library_no_device_and_no_global_random_state() -> None:
    for file in PASS_FILES:
        assert not FORBIDDEN_TO_PASSES & {m.split(".")[0] for m in imported(file)}, name_of(file)
        found = [
            f"{name_of(file)}:{line}: {name}" for name, line in names_used(file) if name in FORBIDDEN_NAMES_IN_PASSES
        ]
        assert not found


def test_hooks_that_watch_and_change_are_registered_in_one_file_and_those_of_a_model_in_two() -> None:
    found = {name_of(file) for file in FILES for name, _ in names_used(file) if name in HOOKS}
    assert found == {"calibration/collect.py", "models/turned_inputs.py", "runtime/cache.py"}


def families() -> dict[str, Path]:
    """Class of a form or an encoding -> its file."""
    roots = {"Form", "Encoding"}
    found = dict.fromkeys(roots, ROOT / "encodings" / "base.py")
    for file in (ROOT / "encodings").glob("*.py"):
        for node in nodes(file):
            if isinstance(node, ast.ClassDef) and roots & {b.id for b in node.bases if isinstance(b, ast.Name)}:
                found[node.name] = file
    return found


def test_only_a_family_of_encodings_asks_for_its_own_class() -> None:
    owners = families()
    assert {"UniformForm", "Uniform", "Codebooks", "OutlierVictim", "PowerForm"} <= owners.keys()
    wrong = []
    for file in FILES:
        for node in nodes(file):
            asked: ast.AST | None = node if isinstance(node, ast.MatchClass) else None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                asked = node if node.func.id in ("isinstance", "issubclass") else None
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                asked = node
            for part in ast.walk(asked) if asked is not None else ():
                name = part.attr if isinstance(part, ast.Attribute) else part.id if isinstance(part, ast.Name) else ""
                if owners.get(name, file) != file:
                    wrong.append(f"{name_of(file)}:{getattr(part, 'lineno', 0)} asks for {name}")
    assert not wrong


def test_no_pickle_is_ever_loaded() -> None:
    for file in FILES:
        assert not PICKLES & {m.split(".")[0] for m in imported(file)}, name_of(file)
        for node in nodes(file):
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{name_of(file)}:{node.lineno} calls torch.load"
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert "load" not in {alias.name for alias in node.names}, f"{name_of(file)}:{node.lineno}"


def test_code_of_a_model_folder_is_never_run() -> None:
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), f"{name_of(file)}:{node.value.lineno}"
                assert node.value.value is False, f"{name_of(file)}:{node.value.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), f"{name_of(file)}:{node.lineno}"


def test_yaml_is_read_safely() -> None:
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
                assert node.attr not in UNSAFE_YAML, f"{name_of(file)}:{node.lineno}"


def test_a_file_says_what_it_is_for_and_can_be_read_at_one_sitting() -> None:
    for file in FILES:
        assert ast.get_docstring(tree(file)), name_of(file)
        most = MOST_LINES_OF_A_PASS if file in PASS_FILES else MOST_LINES
        assert len(file.read_text(encoding="utf-8").splitlines()) <= most, name_of(file)


def test_headers_of_safetensors_are_read_and_written_in_one_file_only() -> None:
    libraries = {name_of(file): set(imported(file)) for file in FILES}
    users = {name for name, modules in libraries.items() if any(m.split(".")[0] == "safetensors" for m in modules)}
    assert users == {"models/loading.py"}, "which catches what transformers raises"


def test_every_text_file_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale: a mode with `b`, or an encoding that is named."""
    wrong = []
    for file in FILES:
        for node in nodes(file):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            of_a_file = not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in OPENERS)
            text = name == "open" and of_a_file and not any("b" in m for m in modes)
            text |= name in ("read_text", "write_text", "FileHandler") and isinstance(node.func, ast.Attribute)
            if text and not any(k.arg == "encoding" and ast.unparse(k.value) == "'utf-8'" for k in node.keywords):
                wrong.append(f"{name_of(file)}:{node.lineno}: {name}")
    assert not wrong


def test_files_are_written_by_the_atomic_writer() -> None:
    found = set()
    for file in FILES:
        for node in nodes(file):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                mode = node.args[0] if node.func.attr == "open" and node.args else None
                opened = isinstance(mode, ast.Constant) and "w" in str(mode.value)
                wrote = node.func.attr in ("write_bytes", "copyfile", "copy2", "save_file")
                text = node.func.attr == "write_text" and len(node.args) == 1
                if opened or wrote or text:
                    found.add(name_of(file))
    # Constants of a graph, inside of `writing`: their order and places are those of the format.
    assert found == {"io/atomic.py", "io/safetensors_file.py", "export/onnx/files.py"}


def test_no_module_needs_a_library_that_only_some_systems_have() -> None:
    some = {"fcntl", "grp", "pwd", "resource", "termios"}
    for file in FILES:
        for node in tree(file).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not some & set(names), f"{name_of(file)}: import it where it is used, or say what is done without"


def test_a_function_is_short_and_a_docstring_is_a_sentence() -> None:
    for file in FILES:
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(node, clean=False) or ""
                assert not text.startswith(("Of ", "As ")), f"{name_of(file)}:{node.lineno}: {text}"
            if isinstance(node, ast.FunctionDef):
                body = [line.strip() for line in lines[node.lineno - 1 : node.end_lineno]]
                code = sum(bool(line) and not line.startswith("#") for line in body) - len(text.splitlines())
                assert code <= MOST_LINES_OF_A_FUNCTION, f"{name_of(file)}:{node.lineno}: {node.name}"


def test_json_that_is_nested_too_deeply_is_caught_wherever_it_is_read() -> None:
    for file in FILES:
        caught, read = set(), set()
        for node in nodes(file):
            types = [ast.unparse(h.type) for h in node.handlers if h.type] if isinstance(node, ast.Try) else []
            if isinstance(node, ast.Try) and "RecursionError" in " ".join(types):
                caught |= {inner for each in node.body for inner in ast.walk(each)}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "json.loads":
                read.add(node)
        assert read <= caught, f"{name_of(file)}: {', '.join(str(call.lineno) for call in read - caught)}"
