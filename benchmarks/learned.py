"""Learned rounding: our flexround beside auto-round, which runs in an environment of its own.

    python benchmarks/learned.py --peer-python .venv-autoround/bin/python

Same model, calibration tokens and evaluation as quality.py; the tools take turns. Writes results/learned.json.
"""

import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import quality
import runner

FILE = "learned.json"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-autoround/bin/python"))
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="pairs of runs (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2))
    args = parser.parse_args()
    rows = []
    about = {
        "machine": runner.machine(),
        "model": "demo",
        "calibration": quality.CALIBRATION,
        "evaluation": quality.EVALUATION,
        "repeats": args.repeats,
        "ours": runner.versions(sys.executable, "torch", "transformers"),
        "peer": runner.versions(args.peer_python, "auto-round", "torch", "transformers"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        tokens, model = Path(scratch) / "tokens.npz", quality.demo_model()
        quality.write_tokens(tokens, model)
        for bits in args.bits:
            what = f"flexround:{bits}:64"
            print(what, file=sys.stderr, flush=True)
            rows.append(quality.compare(what, model, tokens, args.peer_python, args.repeats, "peer_autoround.py"))
            runner.write(FILE, about | {"rows": rows})
    print(quality.show(rows))


if __name__ == "__main__":
    main()
