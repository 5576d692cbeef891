"""The first second of the command line: what is asked often must not wait for torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from selection import only

HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn")
MOST_MEMORY = 150e6
WATCHED = """
import atexit, sys
from pathlib import Path
from compress.cli import main

def state():
    loaded = sorted(set({heavy!r}) & set(sys.modules))
    status = Path("/proc/self/status")  # the peak of getrusage is the parent's, where that is larger
    peak = 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else 0
    print("STATE", peak, *loaded, file=sys.stderr)

atexit.register(state)
main()
"""


# Each imports other parts of the package.
QUICK = [
    (["--help"], 0), (["check", "gptq-w4"], 0), (["list", "methods"], 0), (["advise", "demo", "--bits", "3"], 0),
    (["run", "W4A16", "demo"], 2),
]  # fmt: skip
MOST_SECONDS = 0.7  # of processor time; what a user waits where nothing else runs


def start(*arguments: object) -> tuple[int, int, list[str], str]:
    """Exit code, most resident memory in bytes, heavy modules that were imported, and all that was printed."""
    command = [sys.executable, "-c", WATCHED.format(heavy=HEAVY), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "120"})
    *printed, state = ended.stderr.splitlines()
    word, peak, *loaded = state.split()
    assert word == "STATE"
    return ended.returncode, int(peak), loaded, "\n".join([ended.stdout, *printed])


@pytest.mark.parametrize(
    ("arguments", "code"),
    only(QUICK, [
        *QUICK, (["check", "PIPELINE"], 2), (["-h"], 0), (["run", "-h"], 0), (["--version"], 0), (["list"], 0),
        (["quantize", "-h"], 0), (["quantize", "demo", "--bits", "3", "--for", "vllm"], 2), (["chekc"], 2),
        (["run", "gptq-w4", "demo", "--jump"], 2), (["init", "."], 2),
    ]),
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_what_needs_no_model_imports_no_heavy_library_and_stays_small(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text("passes: [gpqt]")
    ended, peak, loaded, printed = start(*(tmp_path / "p.yaml" if a == "PIPELINE" else a for a in arguments))
    assert ended == code, printed
    assert not loaded
    assert peak < MOST_MEMORY


@pytest.mark.parametrize(
    "arguments",
    only([["list"], ["advise", "demo", "--bits", "3"]],
         [["--help"], ["list"], ["list", "prune"], ["advise", "demo", "--bits", "3"]]),
    ids=" ".join,
)  # fmt: skip
def test_what_is_asked_first_is_there_at_once(arguments: list[str]) -> None:
    code = "import time; from compress.cli import main\ntry: main()\nfinally: print(time.process_time())"
    taken = []
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
        )
        taken.append(float(ended.stdout.split()[-1]))
        if taken[-1] < MOST_SECONDS:
            return
    pytest.fail(f"{min(taken):.2f} s, and the least of three runs may take {MOST_SECONDS} s")


def test_a_misspelt_method_is_named_with_the_one_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("passes:\n  - gpqt\n")
    ended, peak, loaded, printed = start("check", tmp_path / "p.yaml")
    assert (ended, loaded) == (2, [])
    assert peak < MOST_MEMORY
    assert "p.yaml:2: passes[0].gpqt" in printed
    assert "did you mean gptq" in printed


def test_the_version_is_that_of_the_package() -> None:
    import compress

    assert start("--version")[3].strip() == f"compress {compress.__version__}"


# --- shell completion -------------------------------------------------------------------------------------------------


def complete(line: str, folder: Path) -> list[str]:
    """What bash is offered at the end of a line."""
    words = line.split(" ")
    asked = {"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'compress'; from compress.cli import main; main()"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=folder, env={**os.environ, **asked}, check=False
    )
    assert ended.stderr == ""
    return ended.stdout.split()


def test_the_shell_is_offered_commands_ready_made_pipelines_pipeline_files_and_formats(tmp_path: Path) -> None:
    (tmp_path / "gptq-mine.yaml").write_text("")
    (tmp_path / "gptq-notes.txt").write_text("")
    assert {"run", "check", "apply-delta"} <= set(complete("compress ", tmp_path))
    found = complete("compress run gptq-", tmp_path)
    assert {"gptq-w4", "gptq-mine.yaml"} <= set(found)
    assert "gptq-notes.txt" not in found
    assert complete("compress export out --to gg", tmp_path) == ["gguf"]


def test_the_script_for_shell_completion_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'compress'; from compress.cli import main; main()"]
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = subprocess.run(
        [*command, "--show-completion", "bash"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "_COMPRESS_COMPLETE=complete_bash" in ended.stdout


@pytest.mark.real
def test_the_plug_in_may_be_what_imports_transformers_first() -> None:
    code = (
        "import compress.runtime.register\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert AUTO_QUANTIZER_MAPPING['compress'] is compress.runtime.register.CompressQuantizer"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
