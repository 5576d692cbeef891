"""Damaged input by the thousand: `python tests/hostile/fuzz.py --cases 5000`, or one case again with --seed and --case.

Each case damages one file of a small good folder (or the words of a command line) and runs the commands that read it. A
command must succeed or refuse in a sentence; it must not take long, nor much memory, nor change what is not its own,
nor give another result than it would without the damage where that can be known.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import cases
import torch
import watched
import world

SEED = 15
ALLOWED = (0, 1, 2, 3)
EVERYTHING = ("compress.schema.json", "pipeline.yaml")  # `init` writes them


@dataclass(frozen=True)
class Fault:
    """What was not as it must be."""

    seed: int
    number: int
    target: str
    said: str

    def __str__(self) -> str:
        again = f"python tests/hostile/fuzz.py --seed {self.seed} --case {self.number}"
        return f"{self.target}: {self.said}\n    again: {again}"


class Fuzzer:
    """Runs cases in copies of a good folder.

    Args:
        folder: to work in.
        seed: of every choice, with the number of a case.
    """

    def __init__(self, folder: Path, seed: int = SEED):
        self.folder, self.seed = folder, seed
        self.good = world.make(folder / "good")
        self.endings: Counter[str] = Counter()
        self.expected: dict[str, Any] = {}
        self.verbose = self.shows = False
        gc.collect()
        gc.freeze()  # what is here is copied for no child
        for target in cases.TARGETS:
            if target.result is not None and target.commands:
                faults = list(self._run(-1, target, self._copy(), target.commands))
                assert not faults, faults
                self.expected[target.name] = target.result(self.folder / "case")

    def run(self, numbers: Sequence[int]) -> Iterator[Fault]:
        """Run cases; each fault of each."""
        for done, number in enumerate(numbers):
            if self.verbose and done and done % 100 == 0:
                print(f"{done} of {len(numbers)}", flush=True)
            yield from self._case(number)

    def _case(self, number: int) -> Iterator[Fault]:
        rng = Random(f"{self.seed} {number}")
        target = cases.TARGETS[number % len(cases.TARGETS)]
        folder = self._copy()
        if target.file:
            file = folder / target.file
            stat = file.stat()
            file.write_bytes(target.mutation(file.read_bytes(), rng))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        commands = target.commands or (cases.words(rng),)
        faults = list(self._run(number, target, folder, commands))
        yield from faults
        if not faults and target.result is not None and self.succeeded:
            found = target.result(folder)
            if found != self.expected[target.name]:
                yield Fault(self.seed, number, target.name, "succeeds with another result")

    def _copy(self) -> Path:
        shutil.rmtree(self.folder / "case", ignore_errors=True)
        return Path(shutil.copytree(self.good, self.folder / "case"))

    def _run(
        self, number: int, target: cases.Target, folder: Path, commands: Sequence[cases.Command]
    ) -> Iterator[Fault]:
        """Commands one after the other, until one is refused."""
        own = target.writes if target.file else (*_named(commands[0]), *EVERYTHING)
        before = watched.contents(folder, own)
        self.succeeded = False
        for words in commands:
            ended = watched.forked(lambda words=words: _command(words), folder)  # type: ignore[misc]
            self.endings[f"{target.name}: {ended.code}"] += 1
            if self.shows:
                print(f"compress {' '.join(map(repr, words))}\n{ended.code}\n{ended.out}{ended.err}")
            for said in wrong(ended):
                yield Fault(self.seed, number, target.name, f"compress {' '.join(map(repr, words))}: {said}")
            if ended.code != 0:
                break
            (folder / "printed").write_text(ended.out)
        else:
            self.succeeded = True
        after = watched.contents(folder, (*own, "printed"))
        there = {name.split("/")[0] for name in before}
        makes = not target.file and commands[0][:1] in [(maker,) for maker in cases.MAKERS]
        for name in sorted({n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}):
            if makes and name.split("/")[0] not in there:  # a folder named after model and pipeline
                continue
            yield Fault(self.seed, number, target.name, f"{commands[0]}: {name} was changed")


def _named(words: cases.Command) -> tuple[str, ...]:
    """The places at the top of the folder that a command line names, and may write to."""
    tops = [word.removeprefix("./").split("/")[0] for word in words]
    return tuple(name for top in tops for name in (top, f"{top}.work", f"{top}.partial"))


def _command(words: cases.Command) -> Any:
    from compress import cli
    from compress.cli import commands

    offline()
    return cli.guarded(lambda: commands.app(list(words), prog_name="compress", standalone_mode=False), level=30)


def wrong(ended: watched.Ended) -> Iterator[str]:
    """What is wrong with how a command ended."""
    if ended.code not in ALLOWED:
        yield f"{ended.code}: {ended.err[-1500:]}"
    elif found := watched.FOREIGN.search(ended.out + ended.err):
        yield f"says {found[0]!r}: {ended.err[-1500:]}"
    elif ended.code != 0 and "error" not in ended.err.lower():
        yield f"ends with {ended.code} and says {ended.err!r}"
    elif "\x1b" in ended.out + ended.err:
        yield f"prints control characters: {ended.out + ended.err!r:.500}"


def offline() -> None:
    """No case may wait for a network."""
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("there is no network")

    huggingface_hub.snapshot_download = refuse  # type: ignore[assignment]
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--case", type=int, help="this one only, with all that it prints")
    parser.add_argument("--target", help="cases of this one only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [target.name for target in cases.TARGETS]
    if given.target:
        first = names.index(given.target)
        numbers: Sequence[int] = range(first, first + given.cases * len(names), len(names))
    else:
        numbers = range(given.cases) if given.case is None else [given.case]
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), given.seed)
        fuzzer.verbose, fuzzer.shows = True, given.case is not None
        print(f"seed {given.seed}, {len(numbers)} cases", flush=True)
        count = 0
        for fault in fuzzer.run(numbers):
            count += 1
            print(fault, flush=True)
    print(f"{count} faults")
    print(", ".join(f"{ending} {number}" for ending, number in sorted(fuzzer.endings.items())))
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
