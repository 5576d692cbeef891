"""Let a model write: `python -m compress.demo.speak FOLDER [PROMPT ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from compress.models import loading

PROMPTS = ("def read_csv(path, encoding='utf-8')\n\n", "class ConnectionPool\n\n")


def speak(folder: str, prompt: str, tokens: int = 80) -> str:
    """What a model in a folder, packed or not, writes after a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loading.load_model(Path(folder))
    ids = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    for text in sys.argv[2:] or PROMPTS:
        print(speak(sys.argv[1], text).rstrip())
        print("-" * 79)
