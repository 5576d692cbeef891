"""Written folders as a process reads them that has transformers and not this package."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

SCRIPT = """
import json
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
tokens = load_file("tokens.safetensors")["tokens"]
found = {}
for key, (folder, options) in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        found[key] = model(tokens).logits
assert not [name for name in sys.modules if name.split(".")[0] == "compress"]
save_file(found, "logits.safetensors")
"""


def logits_alone(
    folder: Path, asked: Mapping[str, tuple[str, dict[str, Any]]], tokens: Tensor, python: str | Path = sys.executable
) -> dict[str, Tensor]:
    """Logits of models that `AutoModelForCausalLM` loads without a complaint.

    Args:
        folder: to work in.
        asked: name of what is found -> a folder in it, and options of `from_pretrained`.
        tokens: (N, T) that every model is given.
        python: another one, with its own versions.
    """
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    ended = subprocess.run(
        [python, "-c", SCRIPT, json.dumps(asked)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    for complaint in ("newly initialized", "MISMATCH", "MISSING", "UNEXPECTED"):
        assert complaint not in ended.stderr
    found: dict[str, Tensor] = load_file(folder / "logits.safetensors")
    return found
