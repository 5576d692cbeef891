"""What is damaged, which commands then read it, and what must still be true."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mutations
import yaml

Command = Sequence[str]
EVAL = ("eval", "{}", "--source", "words.txt", "--samples", "4", "--length", "8", "--json")


@dataclass(frozen=True)
class Target:
    """A file, or the words of a command line.

    Attributes:
        name: for messages, and to choose it.
        file: that is damaged.
        mutation: how.
        commands: run one after the other; the first that is refused is the last.
        writes: names at the top of the folder that the commands may change.
        result: what must be the same after a command that succeeds as it is without damage; None: damage makes other
            input, of which there is nothing to say but that it is read or refused.
    """

    name: str
    file: str
    mutation: mutations.Mutation
    commands: tuple[Command, ...]
    writes: tuple[str, ...] = ()
    result: Callable[[Path], Any] | None = None


def run(pipeline: str, model: str, out: str = "new") -> Command:
    return ("run", pipeline, model, "-o", out)


def measure(model: str, *more: str) -> Command:
    return (*(word.format(model) for word in EVAL), *more)


def weights_of(name: str, file: str) -> Callable[[Path], bytes]:
    return lambda folder: (folder / name / file).read_bytes()


def perplexity(folder: Path) -> Any:
    """What the last `eval --json` printed."""
    found = json.loads((folder / "printed").read_text())
    return found.get("perplexity")


def only_passes(folder: Path) -> Any:
    """The keys of a pipeline that was made of another program's file."""
    return sorted(yaml.safe_load((folder / "new.yaml").read_text()))


NEW = ("new", "new.work")
OUT, HALF = ("out", "out.work"), ("half", "half.work")
ONNX = ("eval", "onnx", "--runtime", "onnxruntime", *measure("")[2:])
INIT = ("init", "new.yaml", "--from-mergekit", "merge.yaml")

TARGETS = (
    Target("pipeline", "p.yaml", mutations.of_lines, (("check", "p.yaml"), ("plan", "p.yaml", "model"))),
    Target("mergekit", "merge.yaml", mutations.of_lines, (INIT, ("check", "new.yaml")),
           ("new.yaml", "compress.schema.json"), only_passes),
    Target("config", "model/config.json", mutations.of_json, (run("rtn.yaml", "model"),), NEW),
    Target("weights", "model/model.safetensors", mutations.of_header, (run("rtn.yaml", "model"),), NEW),
    Target("index", "shards/model.safetensors.index.json", mutations.of_json, (run("rtn.yaml", "shards"),), NEW),
    Target("adapter", "adapter/adapter_model.safetensors", mutations.of_header, (run("rtn.yaml", "adapter"),), NEW),
    Target("adapter's configuration", "adapter/adapter_config.json", mutations.of_json, (run("rtn.yaml", "adapter"),),
           NEW),
    Target("generation", "model/generation_config.json", mutations.of_json, (run("rtn.yaml", "model"),), NEW),
    Target("tokenizer", "model/tokenizer.json", mutations.of_json, (measure("model"),)),
    Target("tokenizer's configuration", "model/tokenizer_config.json", mutations.of_json, (measure("model"),)),
    Target("text", "words.txt", mutations.of_lines, (measure("model"),)),
    Target("json lines", "words.jsonl", mutations.of_lines, (measure("model", "--source", "words.jsonl"),)),
    Target("table", "words.parquet", mutations.of_bytes, (measure("model", "--source", "words.parquet"),)),
    Target("images", "images.safetensors", mutations.of_header, (measure("model", "--source", "images.safetensors"),)),
    Target("result's configuration", "out/config.json", mutations.of_json,
           (("inspect", "out"), measure("out")), OUT, perplexity),
    Target("result's weights", "out/compress.safetensors", mutations.of_header, (("inspect", "out"), measure("out")),
           OUT, perplexity),
    Target("entropy-coded configuration", "out/entropy/config.json", mutations.of_json,
           (("inspect", "out/entropy"), measure("out/entropy")), OUT, perplexity),
    Target("entropy-coded weights", "out/entropy/compress.safetensors", mutations.of_bytes,
           (("inspect", "out/entropy", "--statistics"), measure("out/entropy")), OUT, perplexity),
    Target("result's report", "out/report.json", mutations.of_json,
           (("inspect", "out"), run("p.yaml", "model", "out")), OUT),
    Target("result's pipeline", "out/pipeline.yaml", mutations.of_lines, (("export", "out", "--to", "hf"),), OUT),
    Target("delta", "delta/delta.safetensors", mutations.of_header, (("apply-delta", "model", "delta", "-o", "new"),),
           NEW, weights_of("new", "model.safetensors")),
    Target("unfinished unit", "half.work/s00-b0000.safetensors", mutations.of_header, (run("p.yaml", "model", "half"),),
           HALF, weights_of("half", "compress.safetensors")),
    Target("unfinished row", "half.work/original.json", mutations.of_json, (run("p.yaml", "model", "half"),),
           HALF, weights_of("half", "compress.safetensors")),
    Target("unfinished row of a pass", "half.work/s00.json", mutations.of_json, (run("p.yaml", "model", "half"),),
           HALF, weights_of("half", "compress.safetensors")),
    Target("manifest", "out/manifest.json", mutations.of_json, (measure("out"), run("p.yaml", "model", "out")), OUT,
           weights_of("out", "compress.safetensors")),
    Target("mark of unfinished work", "half.work/lock.json", mutations.of_json, (run("p.yaml", "model", "half"),), HALF,
           weights_of("half", "compress.safetensors")),
    Target("what unfinished work depends on", "half.work/dependencies.json", mutations.of_json,
           (run("p.yaml", "model", "half"),), HALF, weights_of("half", "compress.safetensors")),
    Target("onnx", "onnx/model.onnx", mutations.of_bytes, (ONNX,)),
    Target("words", "", mutations.of_bytes, ()),
)  # fmt: skip

WORDS = (
    "", " ", "-", "--", "-o", "-x", "--to", "--jump", "--samples", "--length", "--source", "--against", "--runtime",
    "--json", "--threads", "--shares", "--fresh", "--force", "--from-mergekit", "-v", "-q", "model", "out", "p.yaml",
    "rtn-w4", "demo2", "gpqt-w4", "words.txt", "delta", "onnx", "no/such", "a/b/c", ".", "..", "~", "./",
    "x" * 300, "x/" * 300, "[/x]", "[red]x", "\n", "a\nb", "\x1b[31m", "ü", "😀", "*", "%s", "{}", "{0}", "=", ":",
    "passes[0].rtn.bits=3", "passes[0].rtn.bits=[", "passes[9]=rtn", "seed.a=1", "--set", "--for", "W4A16", "Q4_K_M",
    "hf", "onnx:", "hf:", "onnx:mode=", "onnx:=", "onnx:mode=fast,mode=fast", "onnx:mode=[[[", "onnx:mode=&a",
    "onnx:a.b=1", "gguf:x={", ",", "gptq.", "wanda[2:4]", "0", "-1", "1e9", "99999999999999999999", "nan", "true",
    "null", "transformers", "onnxruntime", "adapter", "model+adapter", "model+", "+",
)  # fmt: skip
MAKERS = ("run", "quantize", "prune", "merge", "sweep")  # which name a folder themselves where none is named
COMMANDS = (
    *MAKERS,
    "advise",
    "check",
    "plan",
    "eval",
    "export",
    "apply-delta",
    "extract-lora",
    "inspect",
    "list",
    "init",
    "schema",
    "walk",
    "",
)
STARTS: tuple[Command, ...] = (
    ("run", "rtn.yaml", "model", "-o"), ("check",), ("plan", "rtn.yaml"), ("export", "out", "--to"), ("inspect",),
    ("apply-delta", "model", "delta", "-o"), ("eval", "out", "--samples"), ("eval", "--source", "words.txt"),
    ("extract-lora", "model", "tuned", "-o", "new", "--rank"), ("init", "new.yaml", "--from-mergekit"),
    ("run", "rtn.yaml"), ("eval", "out", "--runtime"), ("run", "rtn.yaml", "model", "--set"), ("list",),
    ("quantize", "model", "--data", "none", "--evaluate", "none", "--bits"), ("advise", "model", "--minutes"),
    ("merge", "model", "tuned", "--evaluate", "none", "--weights"), ("prune", "model", "--data", "none", "--sparsity"),
)  # fmt: skip


def words(rng: Random) -> Command:
    """A command line."""
    if rng.random() < 0.6:
        return (*rng.choice(STARTS), *rng.choices(WORDS, k=rng.choice((1, 1, 2))))
    return (rng.choice(COMMANDS), *rng.choices(WORDS, k=rng.randrange(4)))
