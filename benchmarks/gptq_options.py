"""What gptq's options cost and bring on one matrix: processor time to solve it, and its error on the inputs.

    python benchmarks/gptq_options.py [--rows 1536 --columns 1536 --bits 3]

One thread, random weights, correlated random inputs of unequal size. The time to sum up the Gram matrix of as many
tokens as a usual calibration has is shown beside, because all of them pay it once.
"""

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

import torch

import compress
from compress.calibration.statistics import Statistics
from compress.passes.base import Target

CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "weighted": {"scale_search": "weighted"},
    "weighted, 1 round": {"scale_search": "weighted", "rounds": 1},
    "weighted, 4 rounds": {"scale_search": "weighted", "rounds": 4},
}
TOKENS = 128 * 256


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--bits", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(args.rows, args.columns)
    mixed = torch.eye(args.columns) + 0.3 * torch.randn(args.columns, args.columns) / args.columns**0.5
    size = 3 * torch.rand(args.columns)
    statistics = Statistics(args.columns, "gram")
    seconds = 0.0
    for _ in range(TOKENS // 4096):
        inputs = torch.randn(4096, args.columns) @ mixed * size
        start = time.process_time()
        statistics.update(inputs, "inputs")
        seconds += time.process_time() - start
    print(f"Gram matrix of {TOKENS} tokens: {seconds:.2f} s")
    gram = statistics.gram
    assert gram is not None
    for name, options in CASES.items():
        start = time.process_time()
        edit = compress.Gptq(bits=args.bits, group_size=64, **options).run(Target(weight, None, statistics))
        seconds = time.process_time() - start
        assert edit.encoding is not None
        lost = weight - edit.encoding.dequantize()
        error = ((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()
        print(f"{name}: {seconds:.2f} s, relative error {float(error):.5f}")


if __name__ == "__main__":
    main()
