"""What a run needs of memory and disk, said before it starts: neither too little nor much too much."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import compress_command, write_pipeline
from conftest import make_llama
from selection import only
from torch import Tensor, nn

import compress
from compress.checkpoint import opening
from compress.config.reading import parse
from compress.engine import ledger
from compress.errors import ResourceError
from compress.io import atomic
from compress.models import graph
from compress.planning import plan, resources
from compress.planning.need import Need, most
from compress.planning.plan import Plan

CALIBRATION = "calibration: {source: demo, samples: 8, length: 32}\n"
EVALUATION = "evaluate: {source: demo, samples: 64, length: 128}\n"


def planned(model: nn.Module, text: str) -> Plan:
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    return plan.make(parse(text), graph.find(model), dtypes)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_needed_most_is_named_with_its_moment_and_without_what_it_does_not_take() -> None:
    found = most([Need("evaluating", {"logits": 5, "training": 0}), Need("reading data", {"data": 4})])
    assert (found.moment, found.parts, found.total) == ("evaluating", {"logits": 5}, 5)


@pytest.mark.parametrize("text", [EVALUATION + "passes: [rtn]", CALIBRATION + "passes: [magnitude, perp]"])
def test_a_large_vocabulary_needs_no_more_than_a_piece_of_its_logits(text: str) -> None:
    """64 windows of 128 tokens: 8192 x 65,536 logits are 2.1 GB, of which there would be five."""
    wide = planned(make_llama(vocab_size=1 << 16, num_hidden_layers=1), text)
    assert wide.memory.total < 3 << 29


def test_a_model_that_cannot_be_stopped_before_its_head_is_planned_with_all_its_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_llama(vocab_size=1 << 16, num_hidden_layers=1)
    monkeypatch.setattr(type(model), "base_model_prefix", "missing")
    assert planned(model, EVALUATION + "passes: [rtn]").memory.total > 5 * 8192 * (1 << 16) * 4


def test_text_and_exports_are_counted(tiny_llama: nn.Module, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    with text.open("wb") as file:
        file.truncate(1 << 28)
    few = planned(tiny_llama, CALIBRATION + "passes: [gptq]").memory
    read = planned(tiny_llama, f"calibration: {{source: {text}, samples: 8, length: 32}}\npasses: [gptq]").memory
    assert read.moment == "reading data"
    assert read.total - few.total > 1 << 30
    exported = planned(tiny_llama, "passes: [{rtn: {scheme: w4g32}}]\nexport: [onnx]").memory
    assert exported.moment == "exporting onnx"
    assert exported.parts["exports"] > 200 << 20


@pytest.mark.parametrize("score", ["obs", "activation"])
def test_what_taking_out_neurons_takes_is_planned_of_all_neurons(score: str) -> None:
    """benchmarks/forecast.py compares it with what a process takes."""
    sizes = []
    for share in (0.25, 0.5):
        text = f"{CALIBRATION}passes: [{{width_prune: {{parts: [mlp], score: {score}, sparsity: {share}}}}}]"
        sizes.append(planned(make_llama(intermediate_size=2048, num_hidden_layers=1), text).memory.parts["statistics"])
    assert sizes[0] == sizes[1] > 28 * 2048**2


@pytest.mark.parametrize("pass_", ["qat: {bits: 2}", "perp: {train: [norm, full]}", "sparse_soup: {train: [full]}"])
def test_numbers_that_are_learned_are_counted_in_memory(pass_: str) -> None:
    """Each has a gradient, two moments and a best value of its own."""
    model = make_llama(hidden_size=256, intermediate_size=1024)
    inside = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    every = sum(p.numel() for p in model.parameters())
    found = planned(model, f"{CALIBRATION}passes: [{{{pass_}}}]").memory.parts["training"]
    assert found > 4 * (3 * every + 5 * inside)  # the model, the original, and what it starts as


def test_each_moment_is_planned_with_the_model_of_that_time() -> None:
    """The original is evaluated with all of its neurons."""
    text = EVALUATION + "passes: [{width_prune: {score: magnitude, repair: none, parts: [mlp], sparsity: 0.75}}]"
    whole = planned(make_llama(intermediate_size=4096), EVALUATION + "passes: [rtn]").memory
    narrow = planned(make_llama(intermediate_size=4096), text).memory
    assert (narrow.moment, narrow.total) == (whole.moment, whole.total) == ("evaluating", whole.total)


# --- what there is ----------------------------------------------------------------------------------------------------


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_limit_of_a_process_s_control_groups_holds_version_2(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root)
    group(root / "pod", memory__max=5000, memory__high="max", memory__current=1500, memory__stat="inactive_file 500")
    group(root / "pod" / "job", memory__max="max", memory__high=2000, memory__current=800, memory__stat="anon 3")
    (tmp_path / "self").write_text("0::/pod/job\n")
    assert sorted(resources.group_limits(tmp_path / "self", root)) == [1200, 4000]


def test_the_tightest_limit_of_a_process_s_control_groups_holds_version_1(tmp_path: Path) -> None:
    root = tmp_path / "cgroup" / "memory"
    group(root, memory__limit_in_bytes=9000, memory__usage_in_bytes=9500, memory__stat="total_inactive_file 100")
    group(root / "job", memory__limit_in_bytes=700, memory__usage_in_bytes=200, memory__stat="total_inactive_file 50")
    (tmp_path / "self").write_text("4:memory:/job\n3:cpuset:/other\n0::/\n")
    assert sorted(resources.group_limits(tmp_path / "self", tmp_path / "cgroup")) == [0, 550]


def test_a_machine_without_control_groups_has_no_limits_of_theirs(tmp_path: Path) -> None:
    assert list(resources.group_limits(tmp_path / "missing", tmp_path)) == []


def test_a_control_group_that_is_too_small_refuses_the_run_before_it_works_and_says_for_what(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group(tmp_path / "cgroup", memory__max=100 << 20, memory__current=0)
    (tmp_path / "self").write_text("0::/\n")
    monkeypatch.setattr(resources, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(resources, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resources, "_own", lambda: 1 << 20)
    with pytest.raises(ResourceError, match=r"105.9 MB are available \(while .*: interpreter 587.2 MB"):
        compress.run({"passes": ["rtn"]}, tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


# --- disk -------------------------------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    """Files of several names once, in whole blocks of 4 kB."""
    sizes = {f.stat().st_ino: -(-f.stat().st_size // 4096) * 4096 for f in folder.rglob("*") if f.is_file()}
    return sum(sizes.values())


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are more than what is beside them: 2.3 MB."""
    folder = tmp_path_factory.mktemp("larger")
    make_llama(hidden_size=128, intermediate_size=512).save_pretrained(folder)
    return folder


FILLING = {
    "two stages": "passes: [magnitude, {rtn: {scheme: w4g32}}]",
    "perp": "passes: [magnitude, {perp: {steps: 4, train: [norm, mask_lora, full]}}]",
    "narrower": "passes: [{perp: {steps: 4, objective: next_token}}, {width_prune: {sparsity: 0.5}}]",
    "turned and scaled": "passes: [rotate, smooth, {rtn: {scheme: w4g32}}]",
    "soup": "passes: [{sparse_soup: {steps: 2, models: 2}}]",
    "merge": "passes: [{average: {models: [MODEL]}}, rtn]",
    "merge, tried": "passes: [{interpolate: {models: [MODEL], choose: {alpha: [0.25, 0.5]}}}, rtn]\nexport: [hf]",
    "delta": "passes: [{compeft: {models: [MODEL]}}]",
    "exports": "passes: [{rtn: {scheme: w4g32, symmetric: true}}]\nexport: [hf, compressed-tensors, gptq, awq, mlx]",
}
QUICK = [FILLING[name] for name in ("perp", "soup", "merge, tried", "delta", "exports")]


@pytest.mark.parametrize(
    "text",
    only(QUICK, FILLING.values()),
    ids=FILLING.keys(),
)
def test_the_disk_that_is_planned_is_enough_and_not_much_too_much(
    text: str, larger: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = parse(text.replace("MODEL", str(larger)) + "\ncalibration: {samples: 8, length: 32}")
    opened = opening.open_model(larger)
    need = plan.make(pipeline, opened.artifact.graph, opened.dtypes, companions=opened.companion_bytes).disk
    place, seen = tmp_path / "disk", [0]
    for module, name in ((atomic, "publish"), (ledger, "publish"), (shutil, "rmtree")):
        before = getattr(module, name)

        def looked(*args: object, before: Callable[..., None] = before, **options: object) -> None:
            seen[0] = max(seen[0], bytes_in(place))
            before(*args, **options)

        monkeypatch.setattr(module, name, looked)
    compress.run(pipeline, larger, place / "out", calibration=tokens)
    assert seen[0] <= need.total <= 1.5 * seen[0] + 3_000_000


def test_states_of_training_are_gone_when_a_stage_is_done(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []
    commit = ledger.FolderLedger.commit_row

    def looked(self: ledger.FolderLedger, unit: str, *rest: object) -> None:
        there.append({f.name for f in self.folder.glob("*training*")})
        commit(self, unit, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger.FolderLedger, "commit_row", looked)
    passes = ["magnitude", {"perp": {"steps": 2}}, {"sparse_soup": {"steps": 2, "models": 2}}]
    compress.run({"passes": passes}, tiny_folder, tmp_path / "out", calibration=tokens)
    assert there == [set()] * 4


def test_what_an_interrupted_run_left_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = Plan((), 0, 0, Need("evaluating", {}), Need("writing the result", {"result": 3000}))
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: SimpleNamespace(free=2500))
    work = tmp_path / "out.work"
    with pytest.raises(ResourceError, match="while writing the result: result"):
        resources.check_resources(need, tmp_path / "out", work)
    work.mkdir()
    (work / "s00-b0000.safetensors").write_bytes(bytes(600))
    resources.check_resources(need, tmp_path / "out", work)


def test_a_plan_says_what_memory_and_disk_are_for(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", CALIBRATION + "passes: [magnitude, {perp: {steps: 2}}]")
    found = json.loads(compress_command("plan", pipeline, tiny_folder, "--json").out)
    for total, of in (("peak_memory", "peak_memory_of"), ("disk", "disk_of")):
        assert found[total] == sum(found[of].values())
    assert "interpreter" in found["peak_memory_of"]
    shown = compress_command("plan", pipeline, tiny_folder).out.replace("\n", " ")
    assert f"memory, most while {found['peak_memory_when']}: " in shown
    assert f"disk, most while {found['disk_when']}: " in shown
