"""Several processes share a run: the same bits every time, hardly another perplexity, one voice, and one end."""

import hashlib
import itertools
import json
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from children import PROCESSES, contents
from commands import make_changed, make_text_model, write_text
from expert_models import make_mixture
from torch import Tensor

from compress.api.together import device_for, refuse_differing
from compress.calibration.ranges import Range
from compress.calibration.shares import Shares
from compress.calibration.statistics import Statistics
from compress.cli import ranks
from compress.engine.exchange import Exchange
from compress.engine.executor import SingleProcess
from compress.engine.several import SeveralProcesses, _fed_alike, dealt
from compress.errors import CompressError, DataError, UsageError

DATA = "{source: words.txt, samples: 48, length: 128}"
EVALUATION = "{source: words.txt, samples: 6, length: 64}"
PIPELINES = {
    # Sums and ranges over inputs, and one pass that needs nothing.
    "sums": f"""\
calibration: {DATA}
evaluate: {EVALUATION}
passes:
  - blockwise:
      - rtn: {{bits: 8, include: ["*down_proj"]}}
      - gptq: {{scheme: w4g32, exclude: ["*down_proj"], activation_bits: 8, activation_scale: tensor,
          propagation: 0.5, rounds: 1}}
""",
    # Gradients of a block and of the whole model, distances, and what is allocated.
    "learned": f"""\
calibration: {DATA}
evaluate: {EVALUATION}
passes:
  - layer_drop: {{blocks: 1}}
  - wanda: {{sparsity: 0.5}}
  - perp: {{steps: 4, batch_size: 3}}
  - flexround: {{scheme: w4g32, steps: 8, batch_size: 8, inputs: mix}}
  - eora: {{rank: null, budget: 0.5}}
""",
    "merged": f"""\
evaluate: {EVALUATION}
passes:
  - compeft: {{models: [one], density: 0.2}}
  - ties: {{models: [one, two]}}
""",
}


# --- processes --------------------------------------------------------------------------------------------------------


def child(folder: Path, words: list[str], place: dict[str, str], facts: dict[str, Any]) -> None:
    """The command line as one of several processes, all that it says in RANK.txt."""
    os.environ.update(place)
    os.chdir(folder)
    torch.set_num_threads(1)
    name = f"{place.get('RANK', 'alone')}.txt"
    said = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    import sys

    from compress import cli
    from compress.calibration import training
    from compress.engine import shared_ledger

    finish = training._Run.finish

    def noted(run: training._Run) -> None:
        """Note what was learned before the best of it is taken."""
        seen = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in run.iterate)).hexdigest()
        with (folder / f"learned-{name}").open("a") as file:
            file.write(f"{seen}\n")
        finish(run)

    training._Run.finish = noted  # type: ignore[method-assign,assignment]
    if facts.get("apart") and place["RANK"] != "0":  # as on another machine
        shared_ledger._identity = lambda file: []
    if facts.get("threads") and place["RANK"] != "0":
        torch.set_num_threads(facts["threads"])
    sys.argv = ["compress", *words]
    cli.main()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(folder: Path, words: list[str], world: int, **facts: Any) -> list[BaseProcess]:
    """So many processes that share `compress WORDS` in a folder."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    places = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
    processes: list[BaseProcess] = [
        PROCESSES.Process(target=child, args=(folder, words, place, facts)) for place in places
    ]
    with pytest.MonkeyPatch.context() as patched:  # the server looks for `warm` where Python looks by itself only
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        for process in processes:
            process.start()
    return processes


def end(processes: list[BaseProcess]) -> list[int | None]:
    """The exit codes of processes."""
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def run(folder: Path, words: list[str], world: int, **facts: Any) -> list[int | None]:
    return end(start(folder, words, world, **facts))


def heard(folder: Path, rank: int) -> str:
    """What a process said, in one line, without the lines of progress."""
    lines = (folder / f"{rank}.txt").read_text().splitlines()
    return " ".join(line for line in lines if not line.startswith(("Loading weights", "[")))


def said_by_both(folder: Path) -> str:
    return heard(folder, 0) + heard(folder, 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_text_model(folder / "model", hidden_size=32, intermediate_size=64, num_key_value_heads=4, num_hidden_layers=3)
    for seed, name in enumerate(("one", "two")):
        make_changed(folder / name, folder / "model", seed, size=1e-2)
    write_text(folder / "words.txt", words=9000)
    for name, text in PIPELINES.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    """A folder with everything in it, to be worked in."""
    for path in prepared.iterdir():
        if path.suffix != ".txt" or path.name == "words.txt":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def done(prepared: Path) -> dict[str, Path]:
    """What two processes made of every pipeline."""
    found = {}
    for name in PIPELINES:
        assert run(prepared, ["run", f"{name}.yaml", "model", "-o", f"two-{name}"], 2) == [0, 0], said_by_both(prepared)
        found[name] = prepared / f"two-{name}"
    return found


def perplexities(folder: Path) -> list[float]:
    return [row["perplexity"] for row in json.loads((folder / "report.json").read_text())["rows"]]


# --- the same result --------------------------------------------------------------------------------------------------


def test_one_process_and_two_agree_in_perplexity(done: dict[str, Path], place: Path) -> None:
    assert run(place, ["run", "sums.yaml", "model", "-o", "out"], 1) == [0]
    alone, together = perplexities(place / "out"), perplexities(done["sums"])
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[0] == together[0], "measuring has the same bits"


def test_one_process_and_two_agree_nearly_where_weights_are_learned(done: dict[str, Path], place: Path) -> None:
    assert run(place, ["run", "learned.yaml", "model", "-o", "out"], 1) == [0]
    alone, together = perplexities(place / "out"), perplexities(done["learned"])
    assert together[:3] == pytest.approx(alone[:3], rel=1e-5), "before anything is learned"
    # Adam makes more of the last digit, and a random model much of a few codes; tests/test_reconstruct.py is exact.
    assert together == pytest.approx(alone, rel=5e-2)


def test_merges_have_the_same_bytes_however_many_processes_make_them(done: dict[str, Path], place: Path) -> None:
    assert run(place, ["run", "merged.yaml", "model", "-o", "out"], 1) == [0]
    assert contents(place / "out") == contents(done["merged"])


def test_all_processes_learn_the_same_numbers(done: dict[str, Path]) -> None:
    learned = [(done["learned"].parent / f"learned-{rank}.txt").read_text() for rank in (0, 1)]
    assert learned[0] == learned[1]
    assert learned[0].count("\n") == 3, "the model, and two blocks"


def test_a_finished_result_is_measured_by_all_processes(done: dict[str, Path]) -> None:
    folder = done["sums"].parent
    words = ["eval", "two-sums", "--source", "words.txt", "--samples", "6", "--length", "64", "--against", "model"]
    assert run(folder, [*words, "--json"], 2) == [0, 0]
    text = (folder / "0.txt").read_text()
    found = json.loads(text[text.index("{\n") :])
    assert found["perplexity"] == pytest.approx(perplexities(done["sums"])[-1], rel=1e-6)
    assert heard(folder, 1) == ""


EXPERTS = """\
calibration: {source: words.txt, samples: 4, length: 32}
evaluate: {source: words.txt, samples: 6, length: 64}
passes:
  - wanda: {sparsity: 0.5}
  - gptq: {scheme: w4g16}
"""


@pytest.mark.real
def test_experts_that_one_process_alone_sent_tokens_to_are_solved_as_by_one(tmp_path: Path) -> None:
    """A sample for each of four processes: no expert is sent tokens by all of them, and some by hardly any."""
    make_text_model(tmp_path / "model")
    make_mixture("Qwen3Moe", vocab_size=4096, num_experts=16).save_pretrained(tmp_path / "model")
    write_text(tmp_path / "words.txt", words=9000)
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    found = []
    for world in (1, 4):
        assert run(tmp_path, ["run", "experts.yaml", "model", "-o", f"out{world}"], world) == [0] * world
        report = json.loads((tmp_path / f"out{world}" / "report.json").read_text())
        found.append((perplexities(tmp_path / f"out{world}"), report["fallbacks"], report["layers"]))
    (alone, said, layers), (together, also, others) = found
    assert together[:2] == pytest.approx(alone[:2], rel=1e-4)
    first = {name: notes for name, notes in layers.items() if ".layers.0." in name}
    few = [name for name, notes in first.items() if "tokens" in notes["wanda"]]
    assert few
    assert len(few) < len(first)
    assert all(others[name]["wanda"].get("tokens") == first[name]["wanda"].get("tokens") for name in first)
    assert len(said) == len(also) > 0


# --- one end ----------------------------------------------------------------------------------------------------------


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end, f"{file} is not written"
        time.sleep(0.01)


def killed(place: Path, lost: int, after: str) -> str:
    """What the other one says where one of two processes is killed once a unit is finished."""
    processes = start(place, ["run", "sums.yaml", "model", "-o", "out"], 2)
    wait_for(place / "out.work" / f"{after}.safetensors")
    pid = processes[lost].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    since = time.monotonic()
    codes = end(processes)
    assert time.monotonic() - since < 10
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert not (place / "out").exists()
    return heard(place, 1 - lost)


def test_where_a_process_is_killed_the_other_ends_and_the_same_command_goes_on_to_the_same_bytes(
    done: dict[str, Path], place: Path
) -> None:
    for lost, after in ((1, "s00-b0000"), (0, "s00-b0001")):
        said = killed(place, lost, after)
        assert said.count(f"process {lost} of 2 has ended") == 1
        assert "the same command continues" in said
    before = (place / "out.work" / "s00-b0000.safetensors").stat().st_mtime_ns
    # The second process sees none of the files of the first, as on another machine.
    processes = start(place, ["run", "sums.yaml", "model", "-o", "out"], 2, apart=True)
    wait_for(place / "out.work" / "s00-b0002.safetensors")
    assert (place / "out.work" / "s00-b0000.safetensors").stat().st_mtime_ns == before
    assert end(processes) == [0, 0]
    assert contents(place / "out") == contents(done["sums"])


def test_an_interruption_ends_all_processes_with_one_sentence(place: Path) -> None:
    processes = start(place, ["run", "sums.yaml", "model", "-o", "out"], 2)
    wait_for(place / "out.work" / "s00-b0000.safetensors")
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    assert end(processes) == [130, 130]
    assert said_by_both(place).count("interrupted; what was finished is kept") == 1


@pytest.mark.parametrize(
    ("words", "facts", "said"),
    [
        (["run", "none.yaml", "model", "-o", "out"], {}, "error: cannot read none.yaml"),
        (["run", "sums.yaml", "model", "-o", "out"], {"threads": 2}, "process 1 has another number of threads"),
    ],
)
def test_a_mistake_is_said_once(place: Path, words: list[str], facts: dict[str, Any], said: str) -> None:
    assert run(place, words, 2, **facts) == [2, 2]
    assert said_by_both(place).count(said) == 1
    assert said_by_both(place).count("error") == 1
    assert not (place / "out.work").exists()


def test_only_what_is_shared_waits_for_other_processes() -> None:
    for words in (
        ["run", "p.yaml", "m", "-o", "o"],
        ["-q", "run", "p.yaml"],
        ["prune", "m"],
        ["eval", "out", "--json"],
    ):
        assert ranks.are_shared(words)
    for words in ([], ["list"], ["--help"], ["run", "--help"], ["eval", "-h"], ["export", "run", "--to", "hf"]):
        assert not ranks.are_shared(words)


def test_what_stands_in_the_environment_is_understood_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.place() is None
    assert ranks.executor() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.place() is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="start several processes with torchrun"):
        ranks.place()
    for name, value in {"RANK": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.place() == ranks.Place(2, 3, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UsageError, match="does not fit"):
        ranks.place()


# --- shares -----------------------------------------------------------------------------------------------------------


def of_several(rank: int, world: int) -> SeveralProcesses:
    return SeveralProcesses(Exchange(rank, world))


def test_batches_go_to_one_process_each_and_samples_where_there_are_too_few() -> None:
    samples = torch.arange(20).view(10, 2)
    for world in (2, 3, 5):
        batches = list(torch.split(samples, 2))
        owned = [of_several(rank, world).shard(batches) for rank in range(world)]
        assert torch.equal(torch.cat([batch for each in owned for batch in each]), samples)
        assert all(len(batch) == 2 for each in owned for batch in each)
    owned = [of_several(rank, 4).shard([samples]) for rank in range(4)]
    assert torch.equal(torch.cat([batch for each in owned for batch in each]), samples)
    assert sorted(len(batch) for each in owned for batch in each) == [2, 2, 3, 3]
    assert of_several(0, 4).shard([]) == []
    with pytest.raises(DataError, match="10 calibration samples cannot be shared by 11 processes"):
        of_several(0, 11).shard([samples])


def test_every_sample_of_a_step_is_taken_once() -> None:
    numbers = torch.randperm(11)[:7]
    for counts in ((), (4, 0, 7), (11, 0, 0)):
        taken: list[int] = []
        for rank in range(3):
            shares = Shares(rank, 3, counts=counts)
            own, places = shares.own(numbers)
            assert torch.equal(numbers[places], own + (shares.first if counts else 0))
            taken += places.tolist()
        assert sorted(taken) == list(range(7))


def test_the_dearest_work_is_dealt_first() -> None:
    assert dealt([1, 1, 10, 1, 1, 1], 2) == [1, 1, 0, 1, 1, 1]
    assert dealt([1, 1, 1, 1], 2) == [0, 1, 0, 1]
    assert dealt([], 2) == []


def test_sites_are_fed_alike_by_whoever_has_seen_them() -> None:
    seen = [[(["q", "k"], 4, "gram", 1)], [(["q", "k", "v"], 4, "gram", 1), (["expert"], 8, "norm", 1)]]
    assert _fed_alike(seen) == [[["q", "k", "v"], 4, "gram", 1], [["expert"], 8, "norm", 1]]
    with pytest.raises(CompressError, match="fed by one tensor in one process and by different ones"):
        _fed_alike([[(["q"], 4, "gram", 1), (["k"], 4, "gram", 1)], [(["q", "k"], 4, "gram", 1)]])


def test_sums_over_batches_are_the_same_to_the_bit_in_whatever_order_they_are_added() -> None:
    batches = torch.randn(12, 64, 200, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    def summed(order: list[int]) -> Statistics:
        found = Statistics(200, "gram")
        for number in order:
            found.update(batches[number], "a site")
        return found

    whole = summed(list(range(12)))
    halves = summed(list(range(6))), summed(list(range(6, 12)))
    for total, part in zip(halves[0].sums(), halves[1].sums(), strict=True):
        total += part
    for other in (summed([7, 3, 11, 0, 1, 2, 10, 4, 9, 5, 6, 8]), halves[0]):
        assert whole.gram is not None
        assert other.gram is not None
        assert torch.equal(whole.gram, other.gram)
        assert torch.equal(whole.gram, whole.gram.T)
    assert whole.gram is not None
    exact = torch.einsum("bti,btj->ij", batches.double(), batches.double())
    assert torch.allclose(whole.gram.double(), exact, rtol=1e-5, atol=1e-3)


def test_the_range_of_several_processes_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.calibration.ranges.MOST_NUMBERS", 100)
    inputs = torch.randn(333, 4, generator=torch.Generator().manual_seed(1))

    def seen(rows: Tensor, start: int) -> Range:
        found = Range(start)
        for part in torch.split(rows, 7):
            found.update(part)
        return found

    whole = seen(inputs, 0)
    for cuts in ([0, 100, 333], [0, 1, 3, 333], [0, 330, 333], [0, 55, 111, 201, 333]):
        parts = [seen(inputs[a:b], a) for a, b in itertools.pairwise(cuts)]
        joined = Range.joined([(part.facts(), part.sample) for part in parts])
        assert (joined.low, joined.high) == (whole.low, whole.high)
        assert torch.equal(joined.sample, whole.sample), cuts


def test_every_process_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    several = SeveralProcesses(Exchange(3, 4), local=1)
    assert device_for("auto", several) == "auto", "no graphics processor here"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_for("auto", several) == device_for("cuda", several) == "cuda:1"
    assert device_for("cpu", several) == "cpu"
    assert device_for("cuda:3", SingleProcess()) == "cuda:3"
    with pytest.raises(UsageError, match="each of several processes takes one of its own"):
        device_for("cuda:3", several)
    refuse_differing(SingleProcess(), {"model": "any"})
