"""`compress list` and `compress advise`: what is shipped is what was measured, and what is advised follows from it."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import compress_command
from safetensors.torch import save_file

from compress import Rtn
from compress.config import advice, measured
from compress.config.advice import Wish, advise, candidates
from compress.config.pipeline import PRESETS
from compress.config.runtimes import RUNTIMES
from compress.errors import UsageError
from compress.export.gguf.blocks import BYTES, SMALLEST, smallest_type
from compress.planning.model_size import weights_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("choosing")
    finally:
        sys.path.pop(0)


@pytest.mark.slow
def test_the_shipped_table_and_the_matrix_of_formats_are_those_of_the_code_and_the_measurements(
    script: ModuleType,
) -> None:
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert measured.FILE.read_text() == script.content(), "run scripts/choosing.py"
    assert page == script.page(page), "run scripts/choosing.py"


def test_every_number_that_list_shows_stands_in_the_recorded_results() -> None:
    recorded = json.loads((ROOT / "docs" / "results.json").read_text())
    shown = {row.name: row for row in measured.rows() if row.name}
    assert shown.keys() == {file.stem for file in PRESETS.glob("*.yaml")}, "run scripts/choosing.py"
    assert {name for name, row in shown.items() if row.perplexity is not None} == recorded.keys()
    for name, rows in recorded.items():
        last, row = rows[-1], shown[name]
        assert row.perplexity == pytest.approx(last["perplexity"], abs=1e-5), name
        assert row.kl == pytest.approx(last["kl"], abs=1e-5), name
        assert row.size == last["bytes"], name
        assert row.seconds == pytest.approx(sum(each["seconds"] for each in rows), abs=0.1), name


def test_list_groups_and_filters_ready_made_pipelines() -> None:
    def names(*words: object) -> list[str]:
        lines = compress_command("list", *words).out.splitlines()
        return [line.split()[0] for line in lines if line.startswith("  ")]

    assert set(names()) == {file.stem for file in PRESETS.glob("*.yaml")}
    assert {"gptq-w3", "flexround-w3"} <= set(names("--bits", 3))
    assert not {"gptq-w4", "wanda-2of4"} & set(names("--bits", 3))
    assert {"wanda-2of4", "sparsegpt-50-gptq-w4"} <= set(names("prune"))
    assert set(names("sparsegpt", "quantize")) == {"sparsegpt-50-gptq-w4", "sparsegpt-50-gptq-w4-eora"}
    line = next(line for line in compress_command("list").out.splitlines() if line.startswith("  gptq-w4 "))
    assert line.split()[1:5] == ["25.56", "0.0049", "4.65", "4.31"]


def test_llama_cpp_keeps_codes_in_blocks_as_large_as_advise_takes_them_for() -> None:
    weight = torch.randn(64, 256)
    runtime = RUNTIMES["llama.cpp"]
    for bits in runtime.bits:
        made = Rtn(bits=bits, group_size=runtime.group, symmetric=bits in runtime.symmetric).nearest(weight)
        assert runtime.stored[bits] == 8 * BYTES[smallest_type(made)] / SMALLEST, bits


# --- advise -----------------------------------------------------------------------------------------------------------


def test_what_is_advised_loses_no_more_than_a_little_above_the_best_and_is_the_quickest_of_those() -> None:
    for bits in (2, 3, 4):
        for runtime in ("transformers", "onnxruntime"):
            found = candidates(Wish(bits, runtime))
            chosen = advice.best(found)
            least = min(row.kl or 9.0 for row in found)
            assert (chosen.kl or 9.0) <= advice.CLOSE * least
            better = [row for row in found if (row.kl or 9.0) <= advice.CLOSE * least]
            assert chosen.seconds == min(row.seconds or 0.0 for row in better)


def _divergence(found: advice.Advice) -> float:
    """KL of what is advised, as it is said."""
    return float(found.reasons[0].partition("KL ")[2].partition(",")[0])


def test_with_less_time_something_quicker_is_advised_and_what_more_time_brings_is_said() -> None:
    slow, quick = (advise("demo", Wish(3, minutes=m), measured.original().weights) for m in (30, 0.5))
    assert _divergence(slow) < _divergence(quick)
    assert "--method gptq" in quick.command
    assert "With more time, flexround-w3 has KL 0.0173." in quick.reasons
    larger = advise("big", Wish(3, minutes=30), 1000 * measured.original().weights)
    assert "--method rtn" in larger.command


def test_every_advice_is_a_command_that_runs_or_is_refused_with_what_would_fit() -> None:
    said = set[str]()
    for runtime in RUNTIMES:
        for bits in (2, 8):
            for data in ("demo", "none"):
                if bits not in RUNTIMES[runtime].bits:
                    with pytest.raises(UsageError, match="would fit"):
                        advise("demo", Wish(bits, runtime, data), None)
                    continue
                said.add(advise("demo", Wish(bits, runtime, data), None).command)
    assert len(said) == 20
    for command in sorted(said):
        words = command.split()[1:]
        shown = [*words, "--dry-run"] if words[0] == "quantize" else ["plan", *words[1:]]
        ended = compress_command(*shown, *(["--data", "none"] if "rtn" in words else []))
        assert ended.code == 0, f"{command}: {ended.err}"


def test_bits_that_take_no_less_room_are_advised_against() -> None:
    found = advise("demo", Wish(3, "llama.cpp"), None)
    assert found.reasons[0].startswith("llama.cpp keeps 3 bits in blocks of 4.5 bits per weight, as it keeps 4")
    assert "--bits 4" in found.command


def test_data_of_ones_own_is_in_the_command_and_none_excludes_what_learns() -> None:
    assert advise("demo", Wish(4, data="my texts.txt"), None).command.endswith("--data 'my texts.txt'")
    assert not any(row.data for row in candidates(Wish(2, data="none")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "9"], "--bits 9: transformers runs 2 to 8 bits here"),
        (["--for", "tensorrt"], "--for tensorrt: known are"),
        (["--minutes", "0.00001", "--bits", "2"], "the quickest, rtn"),
    ],
)
def test_a_wish_that_nothing_meets_is_refused_with_what_would(options: list[str], said: str) -> None:
    ended = compress_command("advise", "demo", *options)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_time_needs_a_model_whose_size_is_known(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000, 10, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert weights_of(str(tmp_path)) == pytest.approx(10_000, rel=0.01)
    assert weights_of("org/name") is None
    refused = compress_command("advise", "org/name", "--minutes", "3")
    assert refused.code == 2
    assert "nobody knows how large it is" in refused.err
