"""The pipeline that `compress init` writes, with the schema that editors complete and explain it by."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from compress.config.schema import schema
from compress.io.atomic import write_text

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "compress.schema.json"  # beside the pipeline, so that it is found without a network
TEMPLATE = """\
# Run it:  compress run {name} demo -o out      Check it:  compress check {name} demo
calibration: {{source: demo, samples: 128, length: 512}}   # or a .txt / .jsonl / .parquet file, or a data set id
evaluate: {{source: demo, max_increase: 10%}}              # a gate: above it the run fails with exit code 3
passes:                                                   # order is execution order; see `compress list methods`
  - gptq: {{scheme: w4g64}}
export: [safetensors]
"""


def write_pipeline(path: Path, text: str) -> None:
    """Write a pipeline whose first line names its schema, and the schema beside it."""
    write_text(path.parent / SCHEMA, json.dumps(schema(), indent=1) + "\n")
    write_text(path, f"# yaml-language-server: $schema={SCHEMA}\n{text}")
