"""Train the bundled model: a small Llama that writes Python documentation.

    python -m venv corpus && corpus/bin/pip install -r scripts/train_demo_corpus.txt --no-deps
    python scripts/train_demo.py --corpus corpus/lib/python3.11/site-packages --out compress/demo/model --steps 6000

It reads the docstrings of every package under --corpus and of the calibration modules of the standard library, drops
every text that shares a long line with an evaluation text, trains a byte-level BPE tokenizer on the rest, then the
model. Evaluation modules of the standard library are never seen. Nothing of the text is kept; `training.json` beside
the model records what was seen and the loss curve. Runs on a CPU (bfloat16 where it has the instructions) or a GPU.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.demo import data

CONTEXT = 512
SHORT = 256  # attention is the larger half of the work on a CPU: most steps use short windows, the last fifth full ones
END = "<|end|>"
SHARED_LINE = 50  # a line this long standing in an evaluation text too makes a training text unusable
LONGEST_TEXT = 20_000


def training_texts(corpus: Path) -> list[str]:
    seen = {line for text in data.texts("evaluation") for line in text.splitlines() if len(line) >= SHARED_LINE}
    found = dict.fromkeys(data.texts("calibration"))
    for _, path in data.modules(corpus):
        found.update(dict.fromkeys(data.docstrings(path)))
    bodies: dict[str, str] = {}
    for text in found:
        body = text.partition("\n\n")[2]
        if len(text) <= LONGEST_TEXT and text.isascii() and seen.isdisjoint(text.splitlines()):
            bodies.setdefault(body, text)
    texts = sorted(bodies.values())
    random.Random(0).shuffle(texts)
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts[:60_000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """One stream: the end token, a text, the end token, a text, ..."""
    end = tokenizer.convert_tokens_to_ids(END)
    pieces = []
    for start in range(0, len(texts), 1000):
        for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            pieces.append(np.array([end, *ids], dtype=np.uint16))
    return np.concatenate(pieces)


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: np.ndarray, device: str) -> float:
    windows = torch.from_numpy(stream[: len(stream) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    total = 0.0
    for x in windows.split(8):
        x = x.to(device)
        logits = model(input_ids=x).logits.float()
        total += cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(windows) * (CONTEXT - 1)))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, constant, then linear decay to zero over the last 40 %."""
    return peak * min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of installed packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {SHORT} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--save-every", type=int, default=500, help="steps between snapshots in OUT-snapshot")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    texts = training_texts(args.corpus)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    stream = encode(tokenizer, texts)
    held_out = encode(tokenizer, data.texts("evaluation"))
    print(f"{len(texts)} texts, {len(stream)} tokens; evaluation {len(held_out)} tokens", flush=True)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    generator = np.random.default_rng(0)
    curve: list[dict[str, float]] = []
    started = time.time()
    running = 0.0
    for step in range(args.steps):
        # One random cut a sequence; epochs are approximate, which a shuffled corpus allows.
        width = SHORT if step < 0.8 * args.steps else CONTEXT
        starts = generator.integers(0, len(stream) - CONTEXT, args.batch * SHORT // width)
        x = torch.from_numpy(np.stack([stream[s : s + width] for s in starts]).astype(np.int64)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = compiled(input_ids=x, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()  # moving average
        if (step + 1) % 100 == 0 or step < 3:
            tokens = (step + 1) * args.batch * SHORT
            rate = tokens / (time.time() - started)
            print(f"step {step + 1} loss {running:.3f} tokens {tokens / 1e6:.1f}M {rate:.0f}/s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            with torch.autocast(device, dtype=torch.bfloat16):
                value = perplexity(model.eval(), held_out, device)
            model.train()
            tokens = (step + 1) * args.batch * SHORT
            curve.append({"tokens": tokens, "loss": round(running, 4), "perplexity": round(value, 3)})
            print(f"== {curve[-1]}", flush=True)
            final = step + 1 == args.steps
            save(model, tokenizer, args.out if final else args.out.with_name(args.out.name + "-snapshot"))
    record = {
        "parameters": parameters,
        "training_texts": len(texts),
        "corpus_tokens": len(stream),
        "evaluation_tokens": len(held_out),
        "tokens_seen": args.steps * args.batch * SHORT,
        "packages": sorted({name.split(".")[0] for name, _ in data.modules(args.corpus)}),
        "minutes": round((time.time() - started) / 60, 1),
        "curve": curve,
        "arguments": {"steps": args.steps, "batch": args.batch, "lr": args.lr, "vocabulary": args.vocabulary},
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model in bfloat16 (training arithmetic was bfloat16 too), its tokenizer, nothing else."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
