"""One experiment with this package; prints one JSON line.

    python benchmarks/ours.py MODEL TOKENS.npz WHAT

Everything the experiment does not name is the pass's default. `seconds` is calibration and compression; reading the
model and evaluating it are left out. The model is changed in place, as the peer does.
"""

import time

import common

import compress


def the_pass(what: common.What) -> object:
    match what.method:
        case "rtn":
            return compress.Rtn(bits=what.bits, group_size=what.group_size)
        case "gptq":
            order = {} if what.act_order is None else {"act_order": what.act_order}
            return compress.Gptq(bits=what.bits, group_size=what.group_size, **order)
        case "flexround":
            return compress.FlexRound(bits=what.bits, group_size=what.group_size)
        case "wanda":
            return compress.Wanda(sparsity=what.sparsity)
        case "sparsegpt":
            return compress.SparseGpt(sparsity=what.sparsity)
    raise ValueError(f"no pass for {what}")


def main() -> None:
    args = common.arguments(__doc__)
    what = common.What.parse(args.what)
    model = common.load_model(args.model)
    calibration = common.load_tokens(args.tokens, "calib")
    seconds = 0.0
    if what.method != "base":
        started = time.perf_counter()
        model = compress.apply(model, [the_pass(what)], calibration=calibration, inplace=True).model
        seconds = time.perf_counter() - started
    value = common.perplexity(model, common.load_tokens(args.tokens, "eval"))
    common.report(
        tool="compress",
        what=args.what,
        perplexity=round(value, 5),
        seconds=round(seconds, 3),
        peak_mb=common.peak_mb(),
    )


if __name__ == "__main__":
    main()
