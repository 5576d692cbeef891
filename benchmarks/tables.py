"""Put results/*.json into README.md: no number is typed by hand.

python benchmarks/tables.py
"""

import json
import re
from pathlib import Path

import memory
import quality
import recovery
import runner

PAGE = Path(__file__).parent / "README.md"


def loaded(rows: list[dict[str, float]]) -> str:
    head = ("model", "file MB", "parameters MB", "in float32 MB", "grown by loading MB", "grown by a call MB")
    keys = ("file_mb", "parameters_mb", "float32_mb", "grown_by_loading_mb", "grown_by_a_call_mb")
    return runner.table(head, [(row["model"], *(row[k] for k in keys)) for row in rows])


def main() -> None:
    page = PAGE.read_text()
    for name, show in (
        ("quality", quality.show),
        ("recovery", recovery.show),
        ("learned", quality.show),
        ("memory", memory.show),
        ("load", loaded),
    ):
        file = runner.RESULTS / f"{name}.json"
        if file.exists():
            text = show(json.loads(file.read_text())["rows"])
            page = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                lambda m, text=text: f"{m[1]}{text.rstrip()}\n{m[2]}",
                page,
                flags=re.S,
            )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
