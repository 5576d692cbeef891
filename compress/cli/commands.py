"""The commands: what they are given, and which part of the package does it. Results go to stdout."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import logs
from compress.cli import comparing, completion, pushing, ranks, running, shortcuts, sweeping
from compress.cli.options import (
    DeviceOption,
    FreshOption,
    JsonOption,
    ModelArg,
    OutOption,
    OverwriteOption,
    PipelineArg,
    PluginOption,
    QuietOption,
    SetOption,
    VerboseOption,
    bars_for,
    console_for_stdout,
)
from compress.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from compress.encodings.format import version

        print(f"compress {version()}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Compress language and image models after training: one pipeline file, measured after every pass."""
    ranks.refuse_alone(context.invoked_subcommand)
    bars_for(verbose, quiet)


@app.command()
def run(
    pipeline: PipelineArg,
    model: ModelArg,
    out: OutOption = None,
    changes: SetOption = None,
    plugins: PluginOption = None,
    overwrite: OverwriteOption = False,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a pipeline on a model and write the compressed folder. Interrupted, the same command continues."""
    shown = running.Shown.of(device, as_json, verbose, quiet)
    running.know(plugins)
    folder = running.folder_for(out, model, pipeline.stem, overwrite)
    steps = running.read(pipeline, changes or (), folder, overwrite)
    running.run_and_show(steps, model, folder, shown, overwrite=overwrite, fresh=fresh)


for shortcut in (shortcuts.quantize, shortcuts.prune, shortcuts.merge, shortcuts.advise):
    app.command()(shortcut)


@app.command()
def fit(
    model: ModelArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    size: Annotated[str | None, typer.Option(help="the largest file of weights, such as 1.2GB")] = None,
    bits: Annotated[float | None, typer.Option(help="or the most stored bits per weight of the layers, as 3.2")] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="a pipeline of one quantizer, and its data  [default: gptq on the bundled text]")
    ] = None,
    options: Annotated[str, typer.Option(help="between which is chosen: bits, and columns that share a scale")] = (
        "w2g64,w3g64,w4g64,w5g64,w6g64,w8g64"
    ),
    groups: Annotated[
        str | None,
        typer.Option(help="layers with one option: site (each its own), fused (same inputs), block  [default: site]"),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--for", help="what runs the result, such as vllm: its options, groups and container")
    ] = None,
    sensitivity: Annotated[str, typer.Option(help="how losses are measured: kl, fisher, error")] = "fisher",
    work: Annotated[Path | None, typer.Option(help="the folder of the sweep  [default: OUT.fit]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write OUT.fit/pipeline.yaml, and run nothing")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace an existing folder")] = False,
    fresh: Annotated[bool, typer.Option(help="forget what an interrupted run, or an earlier sweep, had found")] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose bits for each layer under a budget of bytes, and run the pipeline with them."""
    from compress.cli.fitting import fit_and_show

    asked: dict[str, Any] = {"size": size, "bits": bits, "pipeline": pipeline, "groups": groups, "work": work}
    asked["runtime"] = runtime
    asked |= {"sensitivity": sensitivity, "options": [o.strip() for o in options.split(",") if o.strip()]}
    asked |= {"dry_run": dry_run, "overwrite": overwrite, "fresh": fresh, "device": device}
    fit_and_show(model, out, asked, as_json, bars_for(verbose, quiet), console_for_stdout())


@app.command()
def check(
    pipeline: PipelineArg,
    model: Annotated[str | None, typer.Argument(help="also check against this model")] = None,
    changes: SetOption = None,
    plugins: PluginOption = None,
) -> None:
    """Check everything that can be checked without reading weights."""
    running.know(plugins)
    from compress.config.reading import load_pipeline

    steps = load_pipeline(pipeline, changes or ())
    notes: list[str] = []
    if model is not None:
        from compress.api.amounts import check_on
        from compress.checkpoint.opening import open_model

        notes = check_on(steps, open_model(model), str(pipeline))
    _say(f"{pipeline}: fine" + (f" for {model}" if model else ""))
    for note in notes:
        _say(f"note: {note}")


@app.command("plan")
def show_plan(
    pipeline: PipelineArg,
    model: ModelArg,
    changes: SetOption = None,
    plugins: PluginOption = None,
    with_shares: Annotated[
        bool, typer.Option("--shares", help="read the weights, and show how many of each block become zero")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what each pass will touch and cost, before any work. Only --shares reads weights."""
    running.know(plugins)
    shown = running.Shown.of(device, as_json, verbose, quiet)
    from compress.config.reading import load_pipeline

    running.plan_and_show(load_pipeline(pipeline, changes or ()), str(pipeline), model, shown, with_shares)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a compressed folder, or any model")],
    against: Annotated[str | None, typer.Option(help="the original, for the divergence")] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="demo, a .txt / .jsonl / .parquet file, a data set id; images: rows, or .safetensors; several as "
            "NAME=SOURCE each  [default: what the folder's own run measured on, else demo]"
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="the field or column with the text, or the messages of a chat  [default: text]")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="the configuration name of a data set id")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="spread; or wikitext, for perplexities to be set beside published ones  [default: spread]"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="windows, images or rows; 0 for all  [default: 64, of wikitext all]")
    ] = None,
    length: Annotated[int | None, typer.Option(help="tokens per window  [default: 512, of wikitext 2048]")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="also run this task of lm-evaluation-harness, such as hellaswag; may be given again"
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="with YAML files of tasks of your own, in their place")
    ] = None,
    runtime: Annotated[str, typer.Option(help="transformers, or onnxruntime for a folder that holds ONNX")] = (
        "transformers"
    ),
    threads: Annotated[int, typer.Option(help="of onnxruntime; 0 leaves it the choice")] = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity (of an image model accuracy), divergence from the original, and size."""
    bars = bars_for(verbose, quiet)
    from typing import get_args

    from compress.api import evaluate as measuring
    from compress.config.measuring import measured_on
    from compress.report import sentences

    if runtime not in get_args(measuring.Runtime):
        raise UsageError(f"--runtime {runtime}: known: {', '.join(get_args(measuring.Runtime))}")
    given = {"field": field, "subset": subset, "protocol": protocol, "samples": samples, "length": length}
    section = measured_on(Path(model), source or (), given)
    options: dict[str, Any] = {"runtime": runtime, "threads": threads, "device": device}
    options |= {"tasks": tasks or (), "task_folder": task_folder}
    options["executor"] = ranks.executor()
    found = measuring.measure_model(model, section, against=against, bars=bars, **options)
    _say(json.dumps(found, indent=1) if as_json else sentences.evaluation_lines(model, found, against))


for several in (sweeping.sweep, comparing.compare):
    app.command()(several)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="a finished folder")],
    to: Annotated[
        list[str],
        typer.Option(
            help="a format, or one with options: onnx:mode=fast,accuracy_level=1", autocompletion=completion.formats
        ),
    ],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a finished folder in another format as well, from the same codes."""
    bars = bars_for(verbose, quiet)
    from compress.api import export as exporting
    from compress.config.reading import exporters
    from compress.report import sentences

    found = exporting.export_to(out, exporters(to), bars=bars)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, facts in found.items():
        _say(f"{out}/{name}: {sentences.verified(facts)}")


@app.command("apply-delta")
def apply_delta(
    base: Annotated[str, typer.Argument(help="the model that the delta was made from")],
    delta: Annotated[str, typer.Argument(help="a compressed delta: its folder, file or hub id")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    overwrite: Annotated[bool, typer.Option(help="replace an existing folder")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the model that a base and a compressed delta make, as a plain folder for transformers."""
    bars = bars_for(verbose, quiet)
    from compress.api import apply_delta as applying
    from compress.report import report, sentences

    found = applying.apply_delta(base, delta, out, overwrite=overwrite, bars=bars)
    text = f"{out}: {sentences.verified(found)}; {report.said(found['delta'])}"
    _say(json.dumps(found, indent=1) if as_json else text)


@app.command("extract-lora")
def extract_lora(
    base: Annotated[str, typer.Argument(help="the model that the fine-tune was made from")],
    tuned: Annotated[str, typer.Argument(help="the fine-tune: a folder or hub id")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the folder to write")],
    rank: Annotated[int | None, typer.Option(help="of every matrix, at most")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each matrix' squared changes to keep, 0 to 1")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace an existing folder")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write what a fine-tune adds to its base as a LoRA adapter, by rank or by energy."""
    bars = bars_for(verbose, quiet)
    from compress.api import extract_lora as extracting
    from compress.report import sentences

    options: dict[str, Any] = {"rank": rank, "energy": energy, "overwrite": overwrite}
    found = extracting.extract_lora(base, tuned, out, **options, bars=bars)
    _say(json.dumps(found, indent=1) if as_json else sentences.extracted(found, out))


app.command()(pushing.push)


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(help="a compressed folder")],
    statistics: Annotated[
        bool, typer.Option(help="read every weight: the shape of its distribution, and the entropy of its codes")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="write them into this file as well, for a spreadsheet")] = None,
    html: Annotated[Path | None, typer.Option(help="and a page with tables, charts and a heat map of errors")] = None,
    as_json: JsonOption = False,
) -> None:
    """List every stored weight: kind, bits, sparsity, error, bytes, and how its layer rounds its inputs."""
    from compress.api.output_folder import refuse_changed, refuse_file
    from compress.export.packed import packed_caches, packed_layers
    from compress.io.atomic import write_text
    from compress.report import layers

    for file in filter(None, (csv, html)):
        refuse_file(file, out)
    refuse_changed(out)
    rows = layers.layers(packed_layers(out), layers.notes_of(out), measured=statistics)
    if html:
        from compress.report.finished import Finished, read_report
        from compress.report.page import page

        write_text(html, page(Finished(out.resolve().name, read_report(out), rows)))
    if csv:
        write_text(csv, layers.as_csv(rows))
    if as_json:
        print(json.dumps(layers.as_json(rows), indent=1))
    else:
        layers.show(rows, console_for_stdout(), packed_caches(out))


@app.command("list")
def list_pipelines(
    words: Annotated[
        list[str] | None, typer.Argument(help="quantize, prune, merge, a method, a part of a name; or methods, for all")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="only those with codes of so many bits")] = None,
) -> None:
    """List ready-made pipelines with what they did to the bundled model; `list methods` lists methods."""
    from compress.report import methods

    if words == [methods.METHODS]:
        from compress.config.pipeline import FORMATS, PACKED
        from compress.passes import PASSES, Pass
        from compress.passes.quantize.activations import ActivationOptions

        formats = (PACKED, *map(methods.signature, FORMATS.values()))
        print(methods.methods(PASSES, formats, Pass, ActivationOptions))
        return
    from compress.config import measured

    print(methods.pipelines(methods.chosen(measured.rows(), words or [], bits)))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="where to write the pipeline")] = Path("pipeline.yaml"),
    force: Annotated[bool, typer.Option(help="replace an existing file")] = False,
    from_mergekit: Annotated[Path | None, typer.Option(help="a mergekit configuration to write as a pipeline")] = None,
) -> None:
    """Write a commented pipeline to start from, or one that merges as a mergekit configuration does.

    Editors that know YAML complete and explain its options by the schema that is written beside it.
    """
    if not str(path).isprintable():
        raise UsageError(f"{str(path)!r} holds control characters; give another name")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another name, or --force")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"no such folder: {path.parent}")
    from compress.config import template

    if from_mergekit is None:
        template.write_pipeline(path, template.TEMPLATE.format(name=shlex.quote(str(path))))
        print(path)
        return
    from compress.config.mergekit import convert

    found = convert(from_mergekit)
    template.write_pipeline(path, found.text.replace("PIPELINE", shlex.quote(str(path)), 1))
    for note in found.notes:
        logs.LOGGER.warning("%s", note)
    _say(f"{path}: compress run {shlex.quote(str(path))} {shlex.quote(found.model)} -o OUT")


@app.command()
def schema(plugins: PluginOption = None) -> None:
    """Print the JSON schema of pipeline files, for editors."""
    running.know(plugins)
    from compress.config.schema import schema as make

    print(json.dumps(make(), indent=1))


def _say(text: object) -> None:
    """Print a result; names in it may be anybody's."""
    print(logs.printable(str(text)))
