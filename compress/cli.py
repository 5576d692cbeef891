"""The command line: thin. Results on stdout, progress and errors on stderr; exit codes as in errors.py."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compress.checkpoint import opening
from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress language and image models after training: one pipeline file, measured after every pass.",
)

PipelineArg = Annotated[Path, typer.Argument(help="a pipeline file; `compress init` writes one")]
ModelArg = Annotated[str, typer.Argument(help="demo, a local folder, or a hub id")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


@app.command()
def run(
    pipeline: PipelineArg,
    model: ModelArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace an existing folder")] = False,
    fresh: Annotated[bool, typer.Option(help="forget what an interrupted run had finished")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a pipeline on a model and write the compressed folder. Interrupted, the same command continues."""
    from compress import progress
    from compress.api import run as api
    from compress.report import report

    existed = out.exists()
    result = api.run(pipeline, model, out, overwrite=overwrite, fresh=fresh, bars=progress.Bars())
    if existed and not overwrite:
        print(f"{out} holds this very run already; nothing was done", file=sys.stderr)
    if as_json:
        print(result.to_json(), end="")
        return
    console = _console()
    console.print(report.table(result, console.width))
    for text in result.fallbacks[:10]:
        console.print(f"note: {text}", soft_wrap=True)
    if len(result.fallbacks) > 10:
        console.print(f"note: {len(result.fallbacks) - 10} more in {out}/report.json")
    console.print(f"{out}: {_verified(result.verified)}", soft_wrap=True)
    for name, found in result.verified.items():
        if isinstance(found, dict):
            console.print(f"{out}/{name}: {_verified(found)}", soft_wrap=True)


def _verified(found: dict[str, Any]) -> str:
    text = f"{found['tensors_equal']} tensors read back equal"
    if "max_logit_difference" in found:
        text += f"; reloaded model's logits differ by {found['max_logit_difference']:.2g}"
    if "as_shipped" in found:
        shipped = found["as_shipped"]
        quality = "accuracy" if "accuracy" in shipped else "perplexity"
        text += (
            f"; as shipped by {shipped['max_logit_difference']:.2g}, KL {shipped['kl']:.2g}, "
            f"{quality} {shipped[quality]:.4g} for {shipped[f'packed_{quality}']:.4g}"
        )
    return text


@app.command()
def check(
    pipeline: PipelineArg, model: Annotated[str | None, typer.Argument(help="also check against this model")] = None
) -> None:
    """Check everything that can be checked without reading weights."""
    from compress.config.reading import load

    steps = load(pipeline)
    if model is not None:
        from compress.engine.merge import checks
        from compress.planning import plan

        opened = opening.open_model(model)
        plan.make(steps, opened.artifact.graph, opened.dtypes, str(pipeline))
        checks.check(steps, opened.artifact, str(pipeline))
    print(f"{pipeline}: fine" + (f" for {model}" if model else ""))


@app.command("plan")
def show_plan(
    pipeline: PipelineArg,
    model: ModelArg,
    with_shares: Annotated[
        bool, typer.Option("--shares", help="read the weights, and show how many of each block become zero")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what each pass will touch and cost, before any work. Only --shares reads weights."""
    from compress import progress
    from compress.config.reading import load
    from compress.engine.merge import checks
    from compress.planning import allocation_preview, plan
    from compress.report import plan as report

    opened = opening.open_model(model)
    steps = load(pipeline)
    made = plan.make(steps, opened.artifact.graph, opened.dtypes, str(pipeline))
    checks.check(steps, opened.artifact, str(pipeline))
    allocations, bars = allocation_preview.allocations(made), progress.Bars()
    with bars.shown():
        shares = allocation_preview.known_shares(allocations, opened.artifact, bars) if with_shares else {}
    shown = report.Shown(made, allocations, shares, f"{pipeline} on {model}")
    if as_json:
        print(report.as_json(shown))
        return
    console = _console()
    console.print(report.table(shown))
    for line in report.lines(shown, console.width, console.options.ascii_only):
        console.print(line, soft_wrap=True)
    if with_shares and not allocations:
        console.print("--shares: no pass gives layers different shares of zeros", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a compressed folder, or any model")],
    against: Annotated[str | None, typer.Option(help="the original, for the divergence")] = None,
    source: Annotated[
        str, typer.Option(help="demo, a .txt / .jsonl / .parquet file, a data set id; images: a .safetensors file")
    ] = "demo",
    samples: Annotated[int, typer.Option(help="windows, or images")] = 64,
    length: Annotated[int, typer.Option(help="tokens a window")] = 512,
    runtime: Annotated[str, typer.Option(help="transformers, or onnxruntime for a folder that holds ONNX")] = (
        "transformers"
    ),
    threads: Annotated[int, typer.Option(help="of onnxruntime; 0 leaves it the choice")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity (of an image model accuracy), divergence from the original, and size."""
    from typing import get_args

    from compress.api import evaluate as measuring
    from compress.config.pipeline import Evaluation
    from compress.report import report

    if samples < 1 or length < 2:
        raise UsageError(f"--samples {samples} --length {length}: at least one window of two tokens is needed")
    if runtime not in get_args(measuring.Runtime):
        raise UsageError(f"--runtime {runtime}: known: {', '.join(get_args(measuring.Runtime))}")
    section = Evaluation(source=source, samples=samples, length=length)
    found = measuring.measured(model, section, against=against, runtime=runtime, threads=threads)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if "accuracy" in found:
        said, unit, data = f"accuracy {found['accuracy']:.2%}", "images", f"{found['samples']} images"
    else:
        said, unit = f"perplexity {found['perplexity']:.3f}", "tokens"
        data = f"{samples} windows of {length}, {found['tokens']} tokens"
    kl = "" if found["kl"] is None else f", KL to {against} {found['kl']:.4f} on {found['kl_tokens']} {unit}"
    text = f"{model}: {said}{kl}, weights {report.size(found['bytes'])}"
    if found.get("load_memory") is not None:
        text += f", {report.size(found['load_memory'])} of memory to load"
    if found.get("tokens_per_second") is not None:
        text += f", {found['tokens_per_second']:.0f} tokens a second, one after the other"
    print(f"{text}\n({source}, {data})")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="a finished folder")],
    to: Annotated[list[str], typer.Option(help="a format, or one with options: onnx:mode=fast,accuracy_level=1")],
    as_json: JsonOption = False,
) -> None:
    """Write a finished folder in another format as well, from the same codes."""
    from compress import progress
    from compress.api import export as exporting
    from compress.config.reading import exporters

    found = exporting.export_to(out, exporters(to), bars=progress.Bars())
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, facts in found.items():
        _console().print(f"{out}/{name}: {_verified(facts)}", soft_wrap=True)


@app.command("apply-delta")
def apply_delta(
    base: Annotated[str, typer.Argument(help="the model that the delta was made from")],
    delta: Annotated[str, typer.Argument(help="a compressed delta: its folder, file or hub id")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace an existing folder")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model that a base and a compressed delta make, as a plain folder for transformers."""
    from compress import progress
    from compress.api import apply_delta as applying
    from compress.report import report

    found = applying.apply_delta(base, delta, out, overwrite=overwrite, bars=progress.Bars())
    text = f"{out}: {_verified(found)}; {report.said(found['delta'])}"
    print(json.dumps(found, indent=1) if as_json else text)


@app.command()
def inspect(out: Annotated[Path, typer.Argument(help="a compressed folder")], as_json: JsonOption = False) -> None:
    """List every stored weight: kind, bits, sparsity, error, bytes, and how its layer rounds its inputs."""
    from compress.encodings import Spec
    from compress.export.packed import read_quantization
    from compress.report import bars as draw
    from compress.report.report import size

    config = read_quantization(out)
    try:
        layers = json.loads((out / "report.json").read_text())["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out} is not a folder that compress wrote: {error}") from error
    rows = []
    for name, data in config["modules"].items():
        spec = Spec.from_json(data)
        weights, form = spec.shape[0] * spec.shape[1], spec.form
        notes = layers.get(name, {})
        rows.append({
            "layer": name, "shape": list(spec.shape),
            "encoding": form.family if form else None, "bits": form.bits if form else None,
            "group_size": spec.shape[1] // getattr(form, "groups", 1) if form else None,
            "sparsity": 1 - spec.kept / weights if spec.kept is not None else 0.0, "bytes": spec.num_bytes,
            "inputs": str(spec.inputs) if spec.inputs else None,
            "rank": spec.low_rank.rank if spec.low_rank else None,
            "adapter_bits": spec.low_rank.bits if spec.low_rank else None,
            "bits_per_weight": 8 * spec.num_bytes / weights, "passes": list(notes),
            "error": {p: n["error"] for p, n in notes.items()},
            "fallback": [n["fallback"] for n in notes.values() if "fallback" in n],
        })  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    rounded, corrected = any(row["inputs"] for row in rows), any(row["rank"] for row in rows)
    headings = ["layer", "shape", "encoding", "bits", "group", "sparsity", "bits/weight", "size", "error"]
    if corrected:
        headings.insert(5, "rank")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    if rounded:
        table.add_column("inputs", overflow="fold")
    for row in rows:
        errors = " ".join(f"{p} {e:.4f}" for p, e in row["error"].items())
        table.add_row(
            row["layer"] + (" (fallback)" if row["fallback"] else ""),
            "x".join(map(str, row["shape"])),
            *("" if row[key] is None else str(row[key]) for key in ("encoding", "bits", "group_size")),
            *([_rank(row)] if corrected else []),
            f"{row['sparsity']:.1%}",
            f"{row['bits_per_weight']:.3f}",
            size(row["bytes"]),
            errors,
            *([row["inputs"] or ""] if rounded else []),
        )
    console = _console()
    console.print(table)
    found = {row["layer"]: (row["shape"][0] * row["shape"][1], row["sparsity"]) for row in rows}
    if draw.uneven(found):
        console.print(
            "zeros by block", draw.zeros(found, console.width, console.options.ascii_only), sep="\n", soft_wrap=True
        )


def _rank(row: dict[str, Any]) -> str:
    """Of a layer's correction."""
    bits = f" x {row['adapter_bits']} bit" if row["adapter_bits"] else ""
    return f"{row['rank']}{bits}" if row["rank"] else ""


@app.command("list")
def list_methods() -> None:
    """List methods with their options, formats and ready-made pipelines."""
    from dataclasses import MISSING, fields

    from compress.config.pipeline import FORMATS, PACKED, PRESETS
    from compress.passes import PASSES, Pass
    from compress.passes.quantize.activations import ActivationOptions

    every = [f.name for f in fields(Pass)]
    quantizers = [f.name for f in fields(ActivationOptions) if f.name not in every]
    for pass_ in PASSES:
        first = (pass_.__doc__ or "").strip().splitlines()[0]
        own = [f for f in fields(pass_) if f.name not in (*every, *quantizers) and f.default is not MISSING]
        print(f"{pass_.key:18}{first}\n{'':18}{', '.join(f'{f.name}={f.default}' for f in own)}")
    print(f"\npipelines:        {', '.join(sorted(p.stem for p in PRESETS.glob('*.yaml')))}", end="")
    print(f"\nevery method:     {', '.join(every)}\nevery quantizer:  {', '.join(quantizers)}")
    print(f"export:           {', '.join((PACKED, *map(_signature, FORMATS.values())))}")


def _signature(exporter: Any) -> str:
    """The name of a format, with its options."""
    from dataclasses import fields

    options = ", ".join(f"{f.name}={f.default}" for f in fields(exporter))
    return f"{exporter.key} ({options})" if options else str(exporter.key)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write the pipeline")] = Path("pipeline.yaml"),
    force: Annotated[bool, typer.Option(help="replace an existing file")] = False,
    from_mergekit: Annotated[Path | None, typer.Option(help="a mergekit configuration to write as a pipeline")] = None,
) -> None:
    """Write a commented pipeline to start from, or one that merges as a mergekit configuration does.

    Editors that know YAML complete and explain its options by the schema that is written beside it.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another name, or --force")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"no such folder: {path.parent}")
    from compress.config import template

    if from_mergekit is None:
        template.write(path, template.TEMPLATE.format(name=path))
        print(path)
        return
    from compress.config.mergekit import convert

    found = convert(from_mergekit)
    template.write(path, found.text.replace("PIPELINE", str(path), 1))
    print(f"{path}: compress run {path} {found.model} -o OUT")


@app.command()
def schema() -> None:
    """Print the JSON schema of pipeline files, for editors."""
    from compress.config.schema import schema as make

    print(json.dumps(make(), indent=1))


def _console() -> Console:
    wide = None if sys.stdout.isatty() else 160
    return Console(width=wide, no_color="NO_COLOR" in os.environ or None, highlight=False)


def main() -> None:
    """The console script."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_guarded(app))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _guarded(command: Callable[..., Any]) -> int:
    try:
        code = command(standalone_mode=False)
        if code == 130:  # how the parser reports Ctrl-C
            raise KeyboardInterrupt
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; use fewer or shorter calibration samples", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4 if error.errno in (28, 122) else 1
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            return _usage(error)
        raise
    return code if isinstance(code, int) else 0


def _usage(error: Any) -> int:
    """Bad usage, as the command line parser words it."""
    if hasattr(error, "show"):
        error.show()
    return int(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
