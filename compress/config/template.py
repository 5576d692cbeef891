"""The pipeline that `compress init` writes."""

from __future__ import annotations

TEMPLATE = """\
# Run it:  compress run {name} demo -o out      Check it:  compress check {name} demo
calibration: {{source: demo, samples: 128, length: 512}}   # or a .txt / .jsonl / .parquet file, or a data set id
evaluate: {{source: demo, max_increase: 10%}}              # a gate: above it the run fails with exit code 3
passes:                                                   # a list: order is execution order; see `compress list`
  - gptq: {{scheme: w4g64}}
export: [safetensors]
"""
