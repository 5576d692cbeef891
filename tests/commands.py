"""The command line inside this process, and small folders, texts and pipelines to use it on."""

import contextlib
import functools
import io
import logging
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compress import cli
from compress.cli import commands
from compress.demo import MODEL_DIR
from compress.engine.ledger import FolderLedger

PIPELINE = """\
calibration: {{source: {text}, samples: 4, length: 32}}
evaluate: {{source: {text}, samples: 2, length: 32}}
passes:
  - {entry}
"""
COMMAND = typer.main.get_command(commands.app)  # what a process makes once


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def compress_command(*arguments: object, level: int = logging.WARNING, unexpected: bool = False) -> Ended:
    """`compress ARGUMENTS` as the console script runs it, without lines of progress.

    Args:
        arguments: of the command.
        level: of the log records that are printed.
        unexpected: an exception that nobody foresaw is what the test is about.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        app = functools.partial(COMMAND, [str(a) for a in arguments], prog_name="compress", standalone_mode=False)
        code = cli.guarded(app, level=level)
    assert unexpected or "error: unexpected" not in err.getvalue(), err.getvalue()
    return Ended(code, out.getvalue(), err.getvalue())


def stop_at_state(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """From now on a run ends, as by Ctrl-C, when so many states of training are kept; their names, as they come."""
    save, kept = FolderLedger.commit_tensors, list[str]()

    def commit(self: FolderLedger, unit: str, key: str, tensors: dict[str, Tensor]) -> None:
        save(self, unit, key, tensors)
        kept.append(unit)
        if len(kept) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderLedger, "commit_tensors", commit)
    return kept


def make_text_model(folder: Path, **changes: object) -> Path:
    """A tiny random Llama that takes the tokens of the bundled model's tokenizer."""
    torch.manual_seed(3)
    options = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**options)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder / name)
    return folder


def write_text(path: Path, seed: int = 0, words: int = 4000) -> Path:
    """Enough words for a few windows of tokens."""
    chosen = random.Random(seed).choices(
        ["return", "the", "path", "of", "a", "list", "with", "value", "string"], k=words
    )
    path.write_text(" ".join(chosen))
    return path


def write_pipeline(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_changed(folder: Path, source: Path, seed: int, size: float = 1e-3) -> Path:
    """A model folder like another, a little noise on every tensor: what a short fine-tuning leaves."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    values = load_file(folder / "model.safetensors")
    changed = {
        name: value + (size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value + 1
        for name, value in values.items()
    }
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder
