"""Count the files of the package that a reader enters to explain a written weight.

A pipeline of one pass runs on the bundled model, the result is loaded with transformers, and makes its first forward. A
file counts when one of its functions runs meanwhile, wherever it was called from. What runs when a module is imported
does not count: everything is imported before.

Two counts: every file, and those of them that held a weight, which means that one of their functions was given a matrix
or gave one back, as a tensor, as codes and scales, or as the layer that has it. The others read the pipeline, plan,
keep, time and report.

    python scripts/entered_files.py              # rtn, gptq, flexround and a merge: the counts
    python scripts/entered_files.py gptq         # one of them: its files, and the functions that ran in them;
                                                 # * before a file that held a weight

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
from dataclasses import is_dataclass
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

Entered = dict[str, dict[str, set[str]]]  # file -> phase -> functions; the phase HELD: those that held a weight
HELD = "held"


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
        star = "*" if HELD in phases else " "
        print(f"{star} {file:36} {'+'.join(p for p in PHASES if p in phases):16} {', '.join(functions)}")
    counts = ", ".join(f"{p} {sum(p in phases for phases in found.values())}" for p in (*PHASES, HELD))
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

    def note(frame: FrameType, event: str, given: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_flags & CO_OPTIMIZED:
            return
        if not code.co_filename.startswith(prefix):
            return
        phases = found.setdefault(code.co_filename.removeprefix(prefix), {})
        phases.setdefault(phase, set()).add(code.co_name)
        arguments = frame.f_locals.values() if event == "call" else (given,)
        if code.co_name not in phases.get(HELD, ()) and any(holds_weight(value) for value in arguments):
            phases.setdefault(HELD, set()).add(code.co_name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def holds_weight(value: Any, depth: int = 2) -> bool:
    """Whether a value is a matrix of numbers or codes, a layer with one, or an object or collection with one inside."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.dim() >= 2 and value.dtype is not torch.long and not value.is_meta  # not ids, not a mere shape
    if isinstance(value, torch.nn.Module):
        made = vars(value).get("_modules") is not None  # not yet while it is being made
        return made and not any(value.children()) and any(holds_weight(t) for t in value.state_dict().values())
    if not depth:
        return False
    if isinstance(value, dict):
        return any(holds_weight(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_weight(item, depth - 1) for item in value)
    return is_dataclass(value) and any(holds_weight(item, depth - 1) for item in vars(value).values())


if __name__ == "__main__":
    main()
