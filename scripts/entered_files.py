"""Count the files of the package that a reader enters to explain a written weight.

A pipeline of one pass runs on the bundled model, the result is loaded with transformers, and makes its first forward. A
file counts when one of its functions runs meanwhile, wherever it was called from. What runs when a module is imported
does not count: everything is imported before.

    python scripts/entered_files.py              # rtn, gptq, flexround and a merge: the counts
    python scripts/entered_files.py gptq         # one of them: its files, and the functions that ran in them

Another version of the package is counted with PYTHONPATH=FOLDER before it.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

CALIBRATION = {"source": "demo", "samples": 2, "length": 16}
PIPELINES: dict[str, dict[str, Any]] = {
    "rtn": {"passes": [{"rtn": {"bits": 4}}]},
    "gptq": {"passes": [{"gptq": {"bits": 4}}], "calibration": CALIBRATION},
    "flexround": {"passes": [{"flexround": {"bits": 4, "steps": 2}}], "calibration": CALIBRATION},
    "task_arithmetic": {"passes": [{"task_arithmetic": {"models": ["demo"]}}]},
}
PHASES = ("run", "load", "forward")

Entered = dict[str, dict[str, set[str]]]  # file -> phase -> functions


def main() -> None:
    names = sys.argv[1:]
    if unknown := [name for name in names if name not in PIPELINES]:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(PIPELINES)}")
    if len(names) == 1:
        show(names[0], entered(PIPELINES[names[0]]))
        return
    for name in names or PIPELINES:  # each in a process of its own: a cached function runs once
        ended = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True, check=True)
        print(ended.stdout.splitlines()[-1])


def show(name: str, found: Entered) -> None:
    for file in sorted(found):
        phases = found[file]
        functions = sorted({f for some in phases.values() for f in some if not f.startswith("<")})
        print(f"{file:36} {'+'.join(p for p in PHASES if p in phases):16} {', '.join(functions)}")
    counts = ", ".join(f"{p} {sum(p in phases for phases in found.values())}" for p in PHASES)
    print(f"{name}: {len(found)} files ({counts})")


def entered(pipeline: dict[str, Any]) -> Entered:
    """Run a pipeline, load its result and run that once."""
    import torch
    import transformers

    import compress

    for module in pkgutil.walk_packages(compress.__path__, "compress."):
        importlib.import_module(module.name)
    found: Entered = {}
    root = Path(compress.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "pipeline.yaml", Path(folder) / "out"
        file.write_text(json.dumps(pipeline))
        with traced(root, "run", found):
            compress.run(file, "demo", out)
        with traced(root, "load", found):
            model = transformers.AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad(), traced(root, "forward", found):
            model(input_ids=torch.zeros(4, 16, dtype=torch.long))
    return found


@contextmanager
def traced(root: Path, phase: str, found: Entered) -> Iterator[None]:
    """Note every function of the files under a folder that is called, in any thread."""
    prefix = f"{root}{os.sep}"

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & CO_OPTIMIZED and code.co_filename.startswith(prefix):
            file = code.co_filename.removeprefix(prefix)
            found.setdefault(file, {}).setdefault(phase, set()).add(code.co_name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


if __name__ == "__main__":
    main()
