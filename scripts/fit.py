"""Measure what options chosen layer by layer bring at the bytes of uniform ones, and put the tables into docs/fit.md.

    python scripts/fit.py                                    # the bundled model, by every measure of losses
    python scripts/fit.py --model FOLDER --name SmolLM2-135M --calibrate c4.txt --evaluate wiki.txt \
        --length 256 --windows 8 --measures fisher           # a model of one's own, on texts of one's own

Numbers are kept in docs/fit.json, by model; the table between `<!-- fit -->` and `<!-- /fit -->` is made of them.
No number is typed by hand.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from results import ROOT, replace
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.calibration.metrics import Quality, measure
from compress.calibration.reference import Reference
from compress.config.reading import load_pipeline

OPTIONS = ("w2g64", "w2g32", "w3g64", "w4g64", "w5g64", "w6g64", "w8g64")
RIVALS = ("w2g32", "w3g64", "w4g64")  # uniform choices, at whose bytes layers are chosen for
KEPT = 1 << 29  # log-probabilities of the original: all of them
FILE = ROOT / "docs" / "fit.json"


def quality(model: Any, windows: Any, reference: Reference, keep: bool = False) -> Quality:
    """Perplexity and KL, computed in float32."""
    model = model.float()

    def logits(batch: Any) -> Any:
        return (model(input_ids=window[None]).logits[0, :-1] for window in batch)

    return measure(logits, windows, reference=reference, keep=keep)


def rows(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What every way of choosing makes at the bytes of every rival."""
    demo = asked.model == "demo"
    model = compress.demo.load()[0] if demo else AutoModelForCausalLM.from_pretrained(asked.model)
    tokenizer = compress.demo.load()[1] if demo else AutoTokenizer.from_pretrained(asked.model)
    data = {"samples": asked.samples, "length": asked.length}
    learned = compress.load_tokens(asked.calibrate, tokenizer, **data)
    seen = compress.load_tokens(asked.evaluate, tokenizer, samples=asked.windows, length=512, split="evaluation")
    steps = {"calibration": {"source": asked.calibrate, **data}, "passes": [{"gptq": {"group_size": 64}}]}
    reference = Reference(KEPT)
    found = [{"choice": "the original", "perplexity": quality(copy.deepcopy(model), seen, reference, True).perplexity}]

    def add(choice: str, rival: str, passes: list[compress.Gptq]) -> None:
        made = compress.apply(model, passes, calibration=learned)
        now, bits = quality(made.model, seen, reference), made.report.rows[-1].bits_per_weight
        found.append({"choice": choice, "rival": rival, "bits": bits, "perplexity": now.perplexity, "kl": now.kl})
        print(found[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for rival in RIVALS:
            bits, group = rival[1:].split("g")
            add(rival, rival, [compress.Gptq(bits=int(bits), group_size=int(group))])
            for name in asked.measures.split(","):
                options: dict[str, Any] = {"pipeline": steps, "options": OPTIONS, "sensitivity": name, "dry_run": True}
                made = compress.fit(asked.model, f"{folder}/{name}", bits=found[-1]["bits"] + 1e-9, **options)
                ((pass_,),) = load_pipeline(made.pipeline).passes
                assert isinstance(pass_, compress.Gptq)
                add(name, rival, [pass_])
    return found


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """Every model's rows."""
    lines = ["| model | options | bits per weight | perplexity | KL |", "|---|---|---:|---:|---:|"]
    for name, each in measured.items():
        for row in each:
            uniform = row["choice"] == row.get("rival")
            said = f"{row['choice']} everywhere" if uniform else row["choice"]
            said = said if "rival" not in row or uniform else f"chosen, `sensitivity: {said}`"
            bits, kl = (f"{row[key]:.{digits}f}" if key in row else "" for key, digits in (("bits", 3), ("kl", 4)))
            lines.append(f"| {name} | {said} | {bits} | {row['perplexity']:.3f} | {kl} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", default="the bundled model")
    parser.add_argument("--calibrate", default="demo")
    parser.add_argument("--evaluate", default="demo")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--measures", default="error,fisher,kl")
    parser.add_argument("--table", action="store_true", help="only make the table anew")
    asked = parser.parse_args()
    measured: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if not asked.table:
        measured[asked.name] = rows(asked)
        FILE.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    replace(Path(ROOT / "docs" / "fit.md"), "fit", table(measured))


if __name__ == "__main__":
    main()
