"""How long commands that need no model take from nothing: time, processor time, and memory.

    python benchmarks/start.py [REPEATS]

Each command is started several times in a process of its own; the quickest counts.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = (
    "--help",
    "--version",
    "list",
    "check gptq-w4",
    "chekc",
    "check PIPELINE",
    "run gptq-w4 demo --jump",
    "schema",
)


def measured(arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of the processor, and MB of one start."""
    command = [sys.executable, "-m", "compress", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def main(repeats: int = 5) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as folder:
        misspelt = Path(folder) / "p.yaml"
        misspelt.write_text("passes: [gpqt]\n")
        print("| command | seconds | processor seconds | MB |\n|---|---:|---:|---:|")
        for line in COMMANDS:
            arguments = [str(misspelt) if word == "PIPELINE" else word for word in line.split()]
            seconds, processor, memory = min(measured(arguments) for _ in range(repeats))
            print(f"| `compress {line}` | {seconds:.2f} | {processor:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
