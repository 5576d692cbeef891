"""`compress sweep`: each combination a run as if alone, what they share computed once, none lost by another's fault."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Ended, compress_command, files_of, make_text_model, write_pipeline, write_text

import compress
from compress.config.sweep import load_sweep
from compress.engine.ledger import FolderLedger
from compress.errors import ConfigError, GateError
from compress.passes import Magnitude

SWEEP = """\
pipeline:
  calibration: {source: WORDS, samples: 2, length: 32}
  evaluate: {source: WORDS, samples: 1, length: 32}
  passes:
    - wanda: {sparsity: 0.5}
    - rtn: {scheme: w4g32}
grid:
  passes[1].rtn.bits: BITS
"""


def sweep_text(world: Path, bits: str) -> str:
    return SWEEP.replace("WORDS", str(world / "words.txt")).replace("BITS", bits)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text; to be read only."""
    folder = tmp_path_factory.mktemp("world")
    make_text_model(folder / "model", num_hidden_layers=1)
    write_text(folder / "words.txt")
    return folder


@pytest.fixture
def swept(world: Path, tmp_path: Path) -> Callable[..., Ended]:
    """`compress sweep` over some bits, with other options."""

    def command(bits: str, *options: object, change: tuple[str, str] = ("", "")) -> Ended:
        file = write_pipeline(tmp_path / "s.yaml", sweep_text(world, bits).replace(*change))
        return compress_command("sweep", file, world / "model", "-o", tmp_path / "out", *options)

    return command


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def alone(world: Path) -> dict[str, bytes]:
    """What the pipeline with four bits makes alone."""
    steps = load_sweep(yaml.safe_load(sweep_text(world, "[4]")))[0].pipeline
    compress.run(steps, world / "model", world / "alone")
    return steady(world / "alone")


def steady(folder: Path) -> dict[str, bytes]:
    """The files of a result, without those that name seconds and memory."""
    varying = ("report.json", "manifest.json", "README.md")
    return {name: data for name, data in files_of(folder).items() if name not in varying}


GRID = {"passes[0].magnitude.sparsity": ["2:4", 0.5], "passes[1].rtn.bits": [3, 4], "seed": [7]}
STEPS = {"passes": [{"magnitude": {}}, {"rtn": {"group_size": 32}}]}


def test_every_combination_is_a_pipeline_named_by_what_differs() -> None:
    made = load_sweep({"pipeline": STEPS, "grid": GRID})
    names = ["sparsity-2-4_bits-3", "sparsity-2-4_bits-4", "sparsity-0.5_bits-3", "sparsity-0.5_bits-4"]
    assert [each.name for each in made] == names
    assert [vars(each.pipeline.passes[1][0])["bits"] for each in made] == [3, 4, 3, 4]
    assert {each.pipeline.seed for each in made} == {7}
    assert [each.shares for each in made] == [1, 1, 1, 1]
    assert STEPS == {"passes": [{"magnitude": {}}, {"rtn": {"group_size": 32}}]}, "what was given is changed"


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ({"passes[0]": ["rtn", {"gptq": {"bits": 3}}]}, ["passes-0-rtn", "passes-0-gptq-bits-3"]),
        (
            {"passes[0].magnitude.include": [["*"], ["*.up_proj", "*.q_proj"]]},
            ["include-none", "include-up_proj+q_proj"],
        ),
        ({"description": ["a/b", "a b", "A b"]}, ["description-a-b_1", "description-a-b_2", "description-A-b_3"]),
        ({"passes[1].rtn.bits": [3]}, ["bits-3"]),
        ({"seed": [-1, 1]}, ["seed--1", "seed-1"]),
        (
            {"passes[0].magnitude.exclude": [["a"], ["b"]], "passes[1].rtn.exclude": [["c"], ["d"]]},
            [f"magnitude-exclude-{a}_rtn-exclude-{b}" for a in "ab" for b in "cd"],
        ),
    ],
)
def test_names_can_be_folders_and_differ(grid: dict[str, list[Any]], names: list[str]) -> None:
    assert [each.name for each in load_sweep({"pipeline": STEPS, "grid": grid})] == names


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "a sweep is a mapping with `pipeline:` and `grid:`"),
        ({"pipeline": STEPS, "gird": {}}, "gird: unknown key; did you mean grid?"),
        ({"pipeline": 3, "grid": {"seed": [1]}}, "pipeline: must be a pipeline: a file, the name of a ready-made one"),
        ({"pipeline": STEPS, "grid": {}}, "grid: must be keys with lists of values"),
        ({"pipeline": STEPS, "grid": {"seed": 1}}, "grid.seed: 1 is no list of values to try"),
        ({"pipeline": STEPS, "grid": {"seed": [1, 2, 1]}}, "grid.seed: 1 appears twice"),
        ({"pipeline": STEPS, "grid": {"seed": list(range(99)), "passes[1].rtn.bits": list(range(99))}}, "9801 comb"),
        ({"pipeline": STEPS, "grid": {"passes[0].gptq.bits": [2]}}, r"bits: passes[0] is magnitude, not gptq"),
        ({"pipeline": STEPS, "grid": {"passes[1].rtn.bits": [4, 99]}}, "grid.passes[1].rtn.bits: 99 is not between"),
        ({"pipeline": STEPS, "grid": {"passes 1": [4]}}, "grid.passes 1: is no key of a pipeline, such as"),
        ({"pipeline": {"passes": ["rtm"]}, "grid": {"seed": [1, 2]}}, "pipeline.passes[0].rtm: unknown method"),
    ],
)
def test_mistakes_are_said_once_with_their_place(values: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps(values))
    for source in (tmp_path / "s.yaml", *([values] if isinstance(values, dict) else [])):
        with pytest.raises(ConfigError) as raised:
            load_sweep(source)
        assert str(raised.value).count(said) == 1, raised.value
        assert len(raised.value.problems) <= 2


def test_the_line_of_the_grid_is_named(swept: Callable[..., Ended], tmp_path: Path) -> None:
    ended = swept("[4, 99]")
    assert (ended.code, ended.out) == (2, "")
    assert f"{tmp_path}/s.yaml:8: grid.passes[1].rtn.bits: 99 is not between" in ended.err
    assert not (tmp_path / "out").exists()


def test_each_result_is_what_its_pipeline_makes_alone_and_what_is_shared_is_computed_once(
    swept: Callable[..., Ended], alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()
    commit = FolderLedger.commit

    def counted(self: FolderLedger, unit: str, key: str, records: Any) -> Any:
        done.append(unit)
        return commit(self, unit, key, records)

    monkeypatch.setattr(FolderLedger, "commit", counted)
    ended = swept("[3, 4]")
    assert ended.code == 0, ended.err
    assert done == ["s00-b0000", "s01-b0000", "s01-b0000"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "bits-3", "bits-4", "lock.json", "sweep.csv", "sweep.html",
    ]  # fmt: skip
    found = rows(tmp_path / "out")
    assert [(row["run"], row["passes[1].rtn.bits"]) for row in found] == [("bits-3", "3"), ("bits-4", "4")]
    report = json.loads((tmp_path / "out" / "bits-4" / "report.json").read_text())
    assert float(found[1]["kl"]) == report["rows"][-1]["kl"]
    assert "[2/2] bits-4: perplexity" in ended.out
    assert "bits-3" in (tmp_path / "out" / "sweep.html").read_text()
    assert steady(tmp_path / "out" / "bits-4") == alone

    before = {name: data for name, data in files_of(tmp_path / "out").items() if name.startswith("bits-")}
    done.clear()
    assert swept("[3, 4, 5]").code == 0  # one value more: the others are there
    assert done == ["s00-b0000", "s01-b0000"]
    after = files_of(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert [row["run"] for row in rows(tmp_path / "out")] == ["bits-3", "bits-4", "bits-5"]

    ended = swept("[3]", change=("sparsity: 0.5", "sparsity: 0.6"))
    assert ended.code == 2
    assert "is not the result of this run, but of one with other settings" in ended.err
    assert files_of(tmp_path / "out") == after


def test_an_interrupted_sweep_goes_on_and_a_damaged_file_is_done_again(
    swept: Callable[..., Ended], alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, stop = list[str](), 2
    commit = FolderLedger.commit

    def counted(self: FolderLedger, unit: str, key: str, records: Any) -> Any:
        found = commit(self, unit, key, records)
        done.append(unit)
        if len(done) == stop + 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(FolderLedger, "commit", counted)
    assert swept("[3, 4]").code not in (0, 2)
    assert (tmp_path / "out" / "bits-4.work").is_dir()
    shared = next((tmp_path / "out" / "shared.work").glob("*s00-b0000.safetensors"))
    data = bytearray(shared.read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "bits-4.work" / "s00-b0000.safetensors").unlink()
    shared.unlink()  # its links in the folders of the runs stay what they are
    shared.write_bytes(data)
    done.clear()
    stop = 99
    ended = swept("[3, 4]")
    assert ended.code == 0, ended.err
    assert done == ["s00-b0000"], "what the other run had finished of its own is there"
    assert steady(tmp_path / "out" / "bits-4") == alone


@pytest.mark.parametrize(
    ("error", "code"),
    [(ZeroDivisionError("a defect"), 1), pytest.param(GateError("a defect"), 3, marks=pytest.mark.real)],
)
def test_a_run_that_fails_is_named_at_the_end_and_the_others_are_there(
    error: Exception, code: int, swept: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Magnitude.run

    def broken(self: Magnitude, target: Any) -> Any:
        if self.sparsity == 0.25:
            raise error
        return run(self, target)

    monkeypatch.setattr(Magnitude, "run", broken)
    change = ("passes[1].rtn.bits: [4]", "passes[0]: [{magnitude: {sparsity: 0.25}}, {magnitude: {sparsity: 0.5}}]")
    ended = swept("[4]", "--json", change=change)
    assert ended.code == code
    assert "1 of 2 runs failed: passes-0-magnitude-sparsity-0.25: a defect" in ended.err
    found = json.loads(ended.out)["runs"]
    assert [row.get("error") for row in found] == ["a defect", None]
    assert [row["run"] for row in rows(tmp_path / "out")] == [row["run"] for row in found]
    assert (tmp_path / "out" / "passes-0-magnitude-sparsity-0.5" / "manifest.json").is_file()


def test_what_no_run_could_do_is_said_before_the_first(
    swept: Callable[..., Ended], world: Path, tmp_path: Path
) -> None:
    ended = swept("[3, 4]", "--set", "calibration.source=nowhere.txt", "--set", "passes[1].rtn.group_size=37")
    assert (ended.code, ended.out) == (2, "")
    assert "nowhere.txt" in ended.err
    ended = swept("[3, 4]", "--set", "passes[1].rtn.group_size=37")
    assert "sweep: bits-3: passes[1].rtn" in ended.err
    assert "sweep: bits-4: passes[1].rtn" in ended.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    ended = swept("[3, 4]")
    assert ended.code == 2
    assert "was not made by this version of compress: it holds mine.txt" in ended.err
    ended = swept("[3, 4]", "-o", world)
    assert "is or holds" in ended.err


def test_a_dry_run_lists_the_runs_and_writes_nothing(swept: Callable[..., Ended], tmp_path: Path) -> None:
    ended = swept("[3, 4]", "--dry-run")
    assert ended.code == 0, ended.err
    assert f'{tmp_path}/out/bits-4: {{"passes[1].rtn.bits": 4}}' in ended.out
    assert not (tmp_path / "out").exists()


def test_the_sweep_of_the_page_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "sweeps.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", page, flags=re.S)
    assert found is not None
    (tmp_path / "sweep.yaml").write_text(found[1])
    names = [each.name for each in load_sweep(tmp_path / "sweep.yaml")]
    assert len(names) == 4
    assert re.search(r"`out/(sparsity\S+)`", page)[1] in names  # type: ignore[index]
