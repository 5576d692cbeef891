"""What the README shows is run."""

import re
import shlex
from pathlib import Path

import pytest

from compress import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = blocks("yaml")[0].replace("samples: 128, length: 256", "samples: 8, length: 128")
    small = small.replace("{source: demo, max", "{samples: 4, length: 128, max")
    (tmp_path / "pipeline.yaml").write_text(small.replace("10%", "100%"))
    commands = [line.split("#")[0] for line in blocks("console")[1].splitlines()]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "eval":
            words += ["--samples", "2", "--length", "128"]
        monkeypatch.setattr("sys.argv", ["compress", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().err
    # and the first Python block: the result loads in one line
    exec(compile(blocks("python")[0], "README.md", "exec"), {})


def test_python_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    perplexities = eval(capsys.readouterr().out)
    assert len(perplexities) == 3
    assert perplexities[1] > perplexities[0]


def test_results_in_the_readme_come_from_the_recorded_runs() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import results
    finally:
        sys.path.pop(0)
    recorded = json.loads((ROOT / "docs" / "results.json").read_text())
    names = sorted(recorded, key=lambda n: recorded[n][-1]["perplexity"])
    assert results.table(recorded, names) in README


def test_formats_in_the_readme_come_from_the_recorded_measurement() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import exports
    finally:
        sys.path.pop(0)
    assert exports.table(json.loads((ROOT / "docs" / "exports.json").read_text())) in README


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
