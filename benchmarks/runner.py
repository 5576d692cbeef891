"""Start the experiments in processes of their own, and write down what they say."""

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
POLL = 0.02  # seconds between two looks at a running experiment's memory


class Failed(Exception):
    """The experiment ended with an error; the message holds the end of what it wrote."""


def run(python: Path | str, script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object on the last line of `python script arguments`, with two things only seen from outside added.

    wall          seconds from start to end of the process, imports included
    anonymous_mb  largest resident memory without mapped files, MiB (Linux only, sampled)
    """
    command = [str(python), str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        anonymous = 0
        try:
            while process.poll() is None:
                anonymous = max(anonymous, _anonymous_mb(process.pid))
                time.sleep(POLL)
        finally:
            process.kill()
        wall = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise Failed(f"{script} {' '.join(map(str, arguments))}: exit {process.returncode}\n{err.read()[-3000:]}")
        result: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return result | {"wall": round(wall, 3), "anonymous_mb": anonymous}


def _anonymous_mb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) // 1024


def versions(python: Path | str, *packages: str) -> dict[str, str]:
    code = "import sys, importlib.metadata as m; print([m.version(p) for p in sys.argv[1:]])"
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, json.loads(done.stdout.replace("'", '"')), strict=True))


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"system": platform.system(), "processor": [*names, platform.machine()][0], "cores": os.cpu_count()}


def table(head: Sequence[str], rows: Sequence[Sequence[object]], text_columns: int = 1) -> str:
    """A markdown table; after the first columns of text come numbers."""
    rule = ["---" if k < text_columns else "---:" for k in range(len(head))]
    lines = [list(head), rule, *[[str(x) for x in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / name
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
