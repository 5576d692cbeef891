"""Packed linear layers on a graphics processor, as they are after loading: time of a call, and its error.

    python benchmarks/gpu_kernels.py [--smoke] [--only PART ...] [--seconds 600]

Parts: `layers` (an H100 takes a minute, most of it compiling), `shapes`, `yardsticks` (the same products in bfloat16,
and torch's own 4-bit kernel), `step` (one decoded token of four blocks of a Llama of 8 B). Random weights of the
shape that is named, inputs in bfloat16. Times are of CUDA graphs in which calls go round layers enough that
their weights come out of memory, not out of its cache: microseconds a call, the median of seven. Errors are
||y - y64|| / ||y64|| with y64 the product of the dequantized weight in float64. `--smoke` computes small shapes once,
under Triton's interpreter on the processor.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent)]

from compress.encodings import Codebooks, OutlierVictim, Power, Uniform, Weight, pack  # noqa: E402
from compress.runtime.linear import PackedLinear  # noqa: E402

RESULTS = ROOT / "results" / "gpu_kernels.json"
ENCODINGS = (
    "uniform 4", "uniform 2", "uniform 3", "uniform 8", "codebook 4", "codebook 4 tables", "power 4", "olive 4",
    "codebook 8", "olive 8",
)  # fmt: skip
ALL_INPUTS = ("uniform 4", "codebook 4", "olive 4")  # measured with many inputs too
SHAPES = ((4096, 14336), (4096, 4096), (1024, 4096))
CACHE = 300e6  # bytes to go round, several times what a cache holds
GROUP, CONTEXT = 128, 256
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def weight(name: str, rows: int, columns: int) -> Weight:
    """Random codes: `uniform` and `power` in groups of 128, `codebook` with one table or several, `olive` pairs."""
    kind, width, *rest = name.split()
    bits = int(width)
    scale = (torch.rand(rows, columns // GROUP, device=DEVICE) * 0.02 + 0.01).half()
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, device=DEVICE)
    if kind == "uniform":
        zero = torch.randint(2**bits, scale.shape, dtype=torch.uint8, device=DEVICE)
        return Weight(encoding=Uniform(codes, scale, zero, bits, False))
    if kind == "power":
        exponent = torch.tensor([0.7], device=DEVICE)
        return Weight(encoding=Power(codes.clamp(max=2**bits - 2), scale, exponent, bits, "zero"))
    if kind == "codebook":
        tables = 5 if rest else 1
        table = torch.randn(tables, 2**bits, device=DEVICE).sort(1).values.half()
        row_group = torch.randint(tables, (rows,), dtype=torch.uint8, device=DEVICE)
        return Weight(encoding=Codebooks(codes, table, row_group))
    victim = 2 ** (bits - 1)
    pairs = codes.view(rows, -1, 2)
    pairs[pairs == victim] = 3
    outlier, first = (torch.rand(rows, columns // 2, device=DEVICE) < share for share in (0.05, 0.5))
    for side, chosen in ((0, outlier & first), (1, outlier & ~first)):
        pairs[..., side].masked_fill_(chosen, victim)
    return Weight(encoding=OutlierVictim(codes, scale[:, :1].contiguous(), "int4" if bits == 4 else "int8"))


def layer(name: str, rows: int, columns: int) -> PackedLinear:
    """As loaded."""
    spec, tensors = pack(weight(name, rows, columns))
    with torch.device(DEVICE):
        made = PackedLinear(spec, bias=False, transposed=False, dtype=torch.bfloat16)
    made.load_state_dict(tensors)
    if not CUDA:
        made.choose_kernel()  # under the interpreter; elsewhere it does so by itself
    return made


def timed(calls: Sequence[Callable[[], object]], rounds: int = 3) -> float:
    """Microseconds of a call, going round all of them."""
    calls[0]()
    if not CUDA:
        return float("nan")
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(8):  # the first is not counted
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (rounds * len(calls)))
    return sorted(times[1:])[3]


def measured(name: str, rows: int, columns: int, inputs: Sequence[int]) -> Iterator[dict[str, Any]]:
    made = layer(name, rows, columns)
    dense = made.dequantize().double()
    packed = sum(t.numel() * t.element_size() for t in made.stored().values())
    copies = [made, *(copy.deepcopy(made) for _ in range(int(CACHE // packed) if CUDA else 0))]
    for count in inputs:
        x = torch.randn(count, columns, device=DEVICE).bfloat16()
        expected = x.double() @ dense.T
        error = float((made(x).double() - expected).norm() / expected.norm())
        time_of = timed([lambda m=m, x=x: m(x) for m in copies])
        yield {"what": f"{name}, {rows} x {columns}, {count} inputs", "us": time_of, "gb_s": packed / time_of / 1e3,
               "error": error}  # fmt: skip


def layers() -> Iterator[dict[str, Any]]:
    rows, columns = (14336, 4096) if CUDA else (64, 512)
    for name in ENCODINGS:
        yield from measured(name, rows, columns, (1, 4, 16, 64, 128) if name in ALL_INPUTS else (1,))


def shapes() -> Iterator[dict[str, Any]]:
    for rows, columns in SHAPES if CUDA else ((32, 256),):
        yield from measured("uniform 4", rows, columns, (1,))


def yardsticks() -> Iterator[dict[str, Any]]:
    rows, columns = (14336, 4096) if CUDA else (64, 512)
    weights = [torch.randn(rows, columns, device=DEVICE).bfloat16() for _ in range(4)]
    for count in (1, 16, 64, 128):
        x = torch.randn(count, columns, device=DEVICE).bfloat16()
        yield {"what": f"bfloat16, {count} inputs", "us": timed([lambda w=w, x=x: linear(x, w) for w in weights])}
    if not CUDA:
        return
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(10)]
    scales = torch.rand(columns // GROUP, rows, 2, device=DEVICE).bfloat16()
    for count in (1, 16, 128):
        x = torch.randn(count, columns, device=DEVICE).bfloat16()
        calls = [lambda p=p, x=x: torch.ops.aten._weight_int4pack_mm(x, p, GROUP, scales) for p in packed]
        yield {"what": f"torch's 4-bit kernel, {count} inputs", "us": timed(calls)}


class Block(nn.Module):
    """A block of a Llama that decodes one token, with a cache of fixed size."""

    def __init__(self, width: int, mlp: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.each = heads, kv_heads, width // heads
        for name, out in (("q", width), ("k", kv_heads * self.each), ("v", kv_heads * self.each), ("o", width)):
            self.add_module(name, nn.Linear(width, out, bias=False))
        self.gate, self.up = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, turn: Tensor) -> Tensor:
        normed = self.before(x)
        q, k, v = (getattr(self, name)(normed).view(1, 1, -1, self.each).transpose(1, 2) for name in "qkv")
        q, k = (t * turn[0] + t.roll(self.each // 2, -1) * turn[1] for t in (q, k))
        keys[:, :, CONTEXT // 2 : CONTEXT // 2 + 1] = k
        values[:, :, CONTEXT // 2 : CONTEXT // 2 + 1] = v
        seen = scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + self.o(seen.transpose(1, 2).reshape(1, 1, -1))
        normed = self.between(x)
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """Some blocks, between an embedding and a head."""

    def __init__(self, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, count: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.blocks = nn.ModuleList(Block(width, mlp, heads, kv_heads) for _ in range(count))
        self.norm = nn.RMSNorm(width)
        self.register_buffer("cache", torch.empty(2, count, 1, kv_heads, CONTEXT, width // heads))
        self.register_buffer("turn", torch.empty(2, width // heads))

    def forward(self, token: Tensor, blocks: Sequence[Callable[..., Tensor]]) -> Tensor:
        """The blocks are given: they may be compiled ones."""
        x = self.embed(token)
        for block, keys, values in zip(blocks, self.cache[0], self.cache[1], strict=True):
            x = block(x, keys, values, self.turn)
        logits: Tensor = self.head(self.norm(x))
        return logits


def step() -> Iterator[dict[str, Any]]:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Decoder(*((4096, 14336, 32, 8, 32_000, 4) if CUDA else (256, 512, 4, 2, 320, 2)))
    torch.set_default_dtype(torch.float32)
    model.to_empty(device=DEVICE).requires_grad_(False)
    for values in (*model.parameters(), *model.buffers()):
        values.normal_(0, 0.02)
    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    for kind in ("bfloat16", "packed to 4 bits", "packed, the head to 8 bits"):
        for name, module in list(model.blocks.named_modules()) if kind == "packed to 4 bits" else ():
            if isinstance(module, nn.Linear):
                model.blocks.set_submodule(name, layer("uniform 4", *module.weight.shape))
        if kind == "packed, the head to 8 bits":
            model.head = layer("uniform 8", *model.head.weight.shape)
        plain: list[Callable[..., Tensor]] = list(model.blocks)
        yield {"what": f"a decoded token, {kind}, as it is", "us": timed([lambda b=plain: model(token, b)])}
        torch.compiler.reset()
        compiled = [torch.compile(block, fullgraph=True) for block in model.blocks]
        yield {"what": f"a decoded token, {kind}, compiled blocks", "us": timed([lambda b=compiled: model(token, b)])}


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "layers": layers, "shapes": shapes, "yardsticks": yardsticks, "step": step,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes, on the processor")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=600, help="stop after the row that ends later")
    chosen, begun = parser.parse_args(), time.monotonic()
    assert CUDA or chosen.smoke, "no CUDA device; --smoke computes on the processor, with TRITON_INTERPRET=1"
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for part in chosen.only:
            for row in PARTS[part]():
                rows.append(row)
                rest = "".join(f"  {key} {row[key]:.3g}" for key in ("gb_s", "error") if key in row)
                print(f"{row['what']:52} {row['us']:8.1f} us{rest}", flush=True)
                if time.monotonic() - begun > chosen.seconds:
                    break
    if CUDA:
        device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        RESULTS.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
