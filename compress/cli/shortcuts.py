"""Commands that build a pipeline from a line, and the one that says which to take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compress import logs
from compress.cli import running
from compress.cli.options import (
    DeviceOption,
    FreshOption,
    JsonOption,
    ModelArg,
    OutOption,
    OverwriteOption,
    QuietOption,
    SetOption,
    VerboseOption,
)

DataOption = Annotated[
    str, typer.Option(help="what it learns from: demo, a .txt / .jsonl / .parquet file, a data set id, self, or none")
]
SamplesOption = Annotated[int, typer.Option(help="windows of 512 tokens to learn from")]
EvaluateOption = Annotated[str, typer.Option(help="what quality is measured on: as --data; none measures size alone")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="print the pipeline and its plan, and run nothing")]
RuntimeOption = Annotated[
    str,
    typer.Option("--for", help="what runs the result: transformers, vllm, sglang, mlx, llama.cpp, onnxruntime"),
]


def quantize(
    model: ModelArg,
    out: OutOption = None,
    bits: Annotated[
        int | None, typer.Option(help="of every weight of the layers, 2 to 8  [default: 4]", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="columns that share a scale; 0 for a whole row  [default: 64; llama.cpp 32]")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="in their place a mixture of llama.cpp's K-quants: q4_k_m, q2_k, ...")
    ] = None,
    method: Annotated[str, typer.Option(help="a quantizer; auto: the one measured best at these bits")] = "auto",
    runtime: RuntimeOption = "transformers",
    data: DataOption = "demo",
    samples: SamplesOption = 128,
    evaluate: EvaluateOption = "demo",
    changes: SetOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize a model in one line.

    compress quantize MODEL --type q4_k_m --for llama.cpp
    """
    shown = running.Shown.of(device, as_json, verbose, quiet)
    from compress.config import mixtures, shortcuts

    learned = shortcuts.sections(data, samples, evaluate)
    if kind is None:
        name, values = shortcuts.quantizing(4 if bits is None else bits, group_size, method, runtime, learned)
    else:
        shortcuts.refuse_beside_type(kind, {"--bits": bits, "--group-size": group_size})
        name, values = shortcuts.mixing(kind, method, runtime, lambda: mixtures.blocks_of(model), learned)
    running.build_and_show(name, values, changes, model, out, shown, dry_run=dry_run, overwrite=overwrite, fresh=fresh)


def prune(
    model: ModelArg,
    out: OutOption = None,
    sparsity: Annotated[
        str, typer.Option(help="the share of weights that become zero, or N of every M as in 2:4")
    ] = "0.5",
    recover: Annotated[
        bool, typer.Option("--recover", help="train the kept weights afterwards, block by block")
    ] = False,
    method: Annotated[str, typer.Option(help="a pruner; auto: wanda with the kept weights refitted")] = "auto",
    data: DataOption = "demo",
    samples: SamplesOption = 128,
    evaluate: EvaluateOption = "demo",
    changes: SetOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prune a model in one line.

    compress prune MODEL --sparsity 2:4 --recover
    """
    shown = running.Shown.of(device, as_json, verbose, quiet)
    from compress.config import shortcuts

    name, values = shortcuts.pruning(sparsity, method, recover, shortcuts.sections(data, samples, evaluate))
    running.build_and_show(name, values, changes, model, out, shown, dry_run=dry_run, overwrite=overwrite, fresh=fresh)


def merge(
    base: ModelArg,
    models: Annotated[list[str], typer.Argument(help="what is merged with it: fine-tunes of the same base")],
    out: OutOption = None,
    method: Annotated[
        str, typer.Option(help="average, ties, task_arithmetic, dare, slerp, ...: `compress list merge`")
    ] = "ties",
    weights: Annotated[str, typer.Option(help="of each model, as 0.7,0.3; of average the base's stands first")] = "",
    data: DataOption = "demo",
    samples: SamplesOption = 128,
    evaluate: EvaluateOption = "demo",
    changes: SetOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge models in one line.

    compress merge BASE TUNED OTHER --method ties --weights 0.7,0.3
    """
    shown = running.Shown.of(device, as_json, verbose, quiet)
    from compress.config import shortcuts

    numbers = shortcuts.numbers_in("--weights", weights)
    name, values = shortcuts.merging(models, method, numbers, shortcuts.sections(data, samples, evaluate))
    running.build_and_show(name, values, changes, base, out, shown, dry_run=dry_run, overwrite=overwrite, fresh=fresh)


def advise(
    model: ModelArg,
    bits: Annotated[int, typer.Option(help="of every weight of the layers, 2 to 8")] = 4,
    minutes: Annotated[float | None, typer.Option(help="the most that it may take on two processor cores")] = None,
    runtime: RuntimeOption = "transformers",
    data: DataOption = "demo",
    as_json: JsonOption = False,
) -> None:
    """Say which method to take, why, and the command.

    By what was measured on the bundled model: compress advise MODEL --bits 3 --minutes 30 --for llama.cpp
    """
    from compress.config.advice import Wish
    from compress.config.advice import advise as advising
    from compress.planning.model_size import weights_of

    found = advising(model, Wish(bits, runtime, data, minutes), weights_of(model))
    if as_json:
        import json

        answer: dict[str, Any] = {"command": found.command, "reasons": list(found.reasons)}
        print(json.dumps(answer, indent=1))
        return
    for line in (*found.reasons, "", found.command):
        print(logs.printable(line))


__all__ = ["advise", "merge", "prune", "quantize"]
