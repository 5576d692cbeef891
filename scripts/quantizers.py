"""Run every quantizer at 4, 3 and 2 bits on the bundled model and put the table into docs/results.md.

    python scripts/quantizers.py [--only flexround ...]

Two settings: one scale (or, for codebooks, as many stored bits) a row, which every method has; and groups of 64
columns, for the methods on a uniform grid. 128 windows of 256 calibration tokens, 64 windows of 512 to measure on.
Writes docs/quantizers.json after every run, so an interrupted one goes on with `--missing`.
"""

import argparse
import json
from typing import Any

import results

import compress

STORE = results.ROOT / "docs" / "quantizers.json"
METHODS = {
    "rtn": compress.Rtn,
    "gptq": compress.Gptq,
    "adaround": compress.AdaRound,
    "flexround": compress.FlexRound,
    "powerquant": compress.PowerQuant,
    "nupes": compress.Nupes,
    "codebook": compress.Codebook,
    "jlcm": compress.Jlcm,
    "olive": compress.Olive,
}
GROUPED = ("rtn", "gptq", "adaround", "flexround")
BITS = (4, 3, 2)


def settings() -> list[tuple[str, int, int | None]]:
    """(method, bits, group size) of every run."""
    rows = [(m, bits, None) for m in METHODS for bits in (BITS if m != "olive" else (4,))]
    return rows + [(m, bits, 64) for m in GROUPED for bits in BITS]


def measure(method: str, bits: int, group_size: int | None) -> dict[str, Any]:
    model, tokenizer = compress.demo.load()
    calibration = compress.load_tokens("demo", tokenizer, samples=128, length=256)
    evaluation = compress.load_tokens("demo", tokenizer, samples=64, length=512, split="evaluation")
    options = {"bits": bits} if group_size is None else {"bits": bits, "group_size": group_size}
    made = compress.apply(model, [METHODS[method](**options)], calibration, evaluation=evaluation, inplace=True)
    row = made.report.rows[-1]
    return {
        "method": method, "bits": bits, "group_size": group_size, "bits_per_weight": row.bits_per_weight,
        "perplexity": row.perplexity, "kl": row.kl, "seconds": row.seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """One line per method and setting; for each width perplexity, KL, stored bits per weight and seconds."""
    found = {(r["method"], r["group_size"], r["bits"]): r for r in rows}
    lines = [
        "| quantizer | " + " | ".join(f"{b} bits: perplexity | KL | bits/weight | s" for b in BITS) + " |",
        "|---|" + "---:|" * 4 * len(BITS),
    ]
    for method, group_size in dict.fromkeys((r["method"], r["group_size"]) for r in rows):
        cells = []
        for bits in BITS:
            r = found.get((method, group_size, bits))
            cells += (
                ["", "", "", ""]
                if r is None
                else [f"{r['perplexity']:.2f}", f"{r['kl']:.4f}", f"{r['bits_per_weight']:.2f}", f"{r['seconds']:.0f}"]
            )
        name = f"[{method}](methods/{method}.md)" + (f", groups of {group_size}" if group_size else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="methods to run again; the others' results are kept")
    parser.add_argument("--missing", action="store_true", help="run only what has no result yet")
    args = parser.parse_args()
    rows = json.loads(STORE.read_text()) if STORE.exists() else []
    known = {(r["method"], r["bits"], r["group_size"]): r for r in rows}
    for setting in settings():
        if (args.only and setting[0] not in args.only) or (args.missing and setting in known):
            continue
        known[setting] = measure(*setting)
        print(known[setting], flush=True)
        rows = [known[s] for s in settings() if s in known]
        STORE.write_text(json.dumps(rows, indent=1) + "\n")
    results.replace(results.PAGE, "quantizers", table(rows))


if __name__ == "__main__":
    main()
