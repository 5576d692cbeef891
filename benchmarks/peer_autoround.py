"""One experiment with auto-round; prints one JSON line.

    python benchmarks/peer_autoround.py MODEL TOKENS.npz flexround:BITS:GROUP

Its learned rounding at its own defaults: 200 iterations per block, 8 samples per iteration, affine groups. `seconds` is
calibration and compression; reading the model and evaluating it are left out.
"""

import time

import common
from auto_round import AutoRound
from transformers import AutoTokenizer

ITERATIONS, BATCH = 200, 8


def main() -> None:
    args = common.arguments(__doc__)
    what = common.What.parse(args.what)
    model = common.load_model(args.model)
    calibration = common.load_tokens(args.tokens, "calib")
    started = time.perf_counter()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        bits=what.bits,
        group_size=what.group_size,
        sym=False,
        iters=ITERATIONS,
        batch_size=BATCH,
        seqlen=calibration.shape[1],
        nsamples=len(calibration),
        dataset=[{"input_ids": row[None]} for row in calibration],
        device_map="cpu",
    )
    model, _ = tuner.quantize()
    seconds = time.perf_counter() - started
    value = common.perplexity(model.float(), common.load_tokens(args.tokens, "eval"))
    common.report(
        tool="auto-round",
        what=args.what,
        perplexity=round(value, 5),
        seconds=round(seconds, 3),
        peak_mb=common.peak_mb(),
    )


if __name__ == "__main__":
    main()
