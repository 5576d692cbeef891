"""What the README shows is run."""

import re
import shlex
import subprocess
from pathlib import Path
from shutil import copytree

import pytest
from commands import compress_command, make_changed, make_text_model, write_text
from selection import only

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def run(command: str, *more: str) -> None:
    """Run a line of a block, a comment behind it left out, with more options."""
    ended = compress_command(*shlex.split(command, comments=True)[1:], *more)
    assert ended.code == 0, f"{command}: {ended.err}"


def test_the_first_commands_of_the_readme_are_there_for_who_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = blocks("console")[0].splitlines()
    demo, activate, quantize, test = (shlex.split(line, comments=True) for line in lines)
    for target in (demo, test):
        subprocess.run([*target, "-n", "--old-file=pyproject.toml"], cwd=ROOT, check=True, capture_output=True)
    assert activate == [".", ".venv/bin/activate"], "which `make demo` sets up"
    if (ROOT / ".venv").exists():
        shell = f"{shlex.join(activate)} && command -v compress"
        found = subprocess.run(["bash", "-c", shell], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert found.strip().endswith(".venv/bin/compress")
    monkeypatch.chdir(tmp_path)
    make_text_model(tmp_path / "MODEL")
    run(lines[2], "--data", "none", "--evaluate", "none")
    assert (tmp_path / "MODEL-w4g64").is_dir()
    assert "writes MODEL-w4g64" in lines[2]
    assert quantize[0] == "compress"
    exec(compile(blocks("python")[0], "README.md", "exec"), {})  # the result loads in one line


def test_the_other_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_changed(tmp_path / "TUNED", make_text_model(tmp_path / "MODEL", max_position_embeddings=512), 1)
    for line in blocks("console")[1].splitlines():
        small = ["calibration.samples=2", "calibration.length=32", "evaluate=null"] if " run " in line else []
        run(line, *(word for change in small for word in ("--set", change)))
    assert (tmp_path / "two-bits").is_dir()


@pytest.mark.parametrize("model", only(["MODEL"], ["MODEL", "demo"]))
def test_the_pipeline_of_the_readme_and_its_commands_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_text_model(tmp_path / "MODEL", num_hidden_layers=1)
    small = blocks("yaml")[0].replace("samples: 128, length: 256", "samples: 8, length: 128")
    small = small.replace("max_increase: 10%", "samples: 4, length: 128, max_increase: 100%")
    if model != "demo":
        small = small.replace("source: demo", f"source: {write_text(tmp_path / 'text.txt')}")
    (tmp_path / "pipeline.yaml").write_text(small)
    commands = blocks("console")[2].splitlines()
    assert len(commands) == 8
    for command in commands:
        if " compare " in command:
            copytree("out", "other")
        few = ["--samples", "2", "--length", "128"] if " eval " in command else []
        run(re.sub(r"\bdemo\b", model, command), *few)


def test_every_block_of_the_readme_is_run_here_and_it_can_be_read_at_one_sitting() -> None:
    found = re.findall(r"^```(\w+)$", README, flags=re.M)
    assert sorted(found) == ["console", "console", "console", "python", "python", "yaml"]
    assert len(README.splitlines()) < 120


def test_python_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    small = blocks("python")[1].replace("samples=16, length=128", "samples=4, length=64")
    exec(compile(small.replace("samples=8, length=128", "samples=2, length=64"), "README.md", "exec"), {})
    perplexities = eval(capsys.readouterr().out)
    assert len(perplexities) == 3
    assert perplexities[1] > perplexities[0]


def test_results_of_the_documentation_come_from_the_recorded_runs() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import quantizers
        import recovery
        import results
    finally:
        sys.path.pop(0)
    recorded = json.loads((ROOT / "docs" / "results.json").read_text())
    names = sorted(recorded, key=lambda n: recorded[n][-1]["perplexity"])
    page = results.PAGE.read_text()
    assert results.table(recorded, names) in page
    assert f"<!-- highlights -->\n{results.highlights(recorded)}\n<!-- /highlights -->" in README
    assert quantizers.table(json.loads(quantizers.STORE.read_text())) in page
    found = json.loads(recovery.RECORD.read_text())
    assert recovery.table([row for sparsity in recovery.SPARSITIES for row in found[sparsity]]) in page


def test_formats_in_the_documentation_come_from_the_recorded_measurement() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import exports
    finally:
        sys.path.pop(0)
    assert (
        exports.table(json.loads((ROOT / "docs" / "exports.json").read_text()))
        in (ROOT / "docs" / "exports.md").read_text()
    )


def test_ablations_on_the_pages_of_methods_come_from_the_recorded_measurement() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import ablations
    finally:
        sys.path.pop(0)
    recorded = json.loads((ROOT / "docs" / "ablations.json").read_text())
    assert recorded.keys() == ablations.PAGES.keys()
    for page, found in recorded.items():
        shown = (ROOT / "docs" / "methods" / f"{page}.md").read_text()
        assert f"<!-- ablation -->\n{ablations.text(ablations.PAGES[page](), found)}\n<!-- /ablation -->" in shown, page


def test_every_relative_link_of_the_documentation_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
