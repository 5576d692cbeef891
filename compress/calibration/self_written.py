"""Text that a language model writes itself, for calibration where no data may be used.

Shapes: N windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.calibration.texts import SELF
from compress.calibration.tokens import windows
from compress.errors import DataError
from compress.lazy import torch, transformers
from compress.models.architecture import predicts_next
from compress.models.logits import words
from compress.models.named import needs_several

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.texts import Ticking

AT_ONCE = 32  # texts
TOP_K = 50
SHORTEST = 16  # tokens of a text


def cannot_write(model: Any) -> str | None:
    """Why a model cannot write its own calibration text; None if it can."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if not predicts_next(model) or not callable(getattr(model, "generate", None)):
        return f"a {name} does not write text; give a file, or an id of a data set"
    if getattr(config, "is_encoder_decoder", False) or needs_several(model):
        return f"a {name} writes only about an input that it is given; give a file, or an id of a data set"
    return None


def self_written(
    model: Any, tokenizer: Any, samples: int, length: int, seed: int, over: Ticking | None = None
) -> Tensor:
    """Windows of token ids that a model samples from itself.

    Every text begins with the tokenizer's start token (else its end token, else any word), is sampled among the
    50 likeliest next tokens and goes on until the model ends it, for 16 tokens at least and `length` at most; windows
    are cut from the texts one behind the other, each with its end token. So texts have the lengths that the model gives
    them.

    Source: Liu et al., "LLM-QAT", 2023, arXiv 2305.17888; Williams et al., "Self-calibration for Language Model
    Quantization and Pruning", NAACL 2025, arXiv 2410.17170. Differs from the papers in: the likeliest 50 at a
    temperature of 1 from the first token on, where the one takes three to five likeliest tokens first and the other
    lowers the temperature over them; texts that end early are not thrown away.

    Args:
        model: of transformers that predicts next tokens, with its weights in memory; it is run as it stands.
        tokenizer: the model's.
        samples: number of windows.
        length: tokens per window.
        seed: of all choices; the same seed, device and number of threads give the same tokens.
        over: draws progress over the windows: (rounds, how many or None, label).

    Returns:
        (N, length) int64 on the processor.

    Raises:
        DataError: the model does not write.
    """
    why = cannot_write(model)
    if why:
        raise DataError(why)
    stream: list[Tensor] = []
    rounds = _until_enough(stream, samples * length)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in rounds if over is None else over(rounds, None, "the model writes: rounds"):
            stream += _texts(model, tokenizer, min(AT_ONCE, samples), length)
    return windows(torch.cat(stream), samples, length, SELF)


def _until_enough(stream: list[Tensor], tokens: int) -> Any:
    number = 0
    while sum(map(len, stream)) < tokens:
        yield number
        number += 1


def _texts(model: Any, tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """(T,) ids of so many texts, their start tokens left out and their end tokens kept."""
    end = tokenizer.eos_token_id
    settings = transformers.GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        temperature=1.0,  # said as well, for what is not said is taken from the model's own settings
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        min_new_tokens=min(SHORTEST, length),
        eos_token_id=end,
        pad_token_id=end,
    )
    begin = _starts(model, tokenizer, count).to(model.device)
    with torch.no_grad():
        written = model.generate(begin, attention_mask=torch.ones_like(begin), generation_config=settings).cpu()[:, 1:]
    if end is None:
        return list(written)
    return [_ended(text, end) for text in written]


def _ended(text: Tensor, end: int) -> Tensor:
    """A text up to its end token, which one that was cut off is given."""
    ends = (text == end).nonzero()
    return text[: int(ends[0]) + 1] if len(ends) else torch.cat([text, torch.tensor([end])])


def _starts(model: Any, tokenizer: Any, count: int) -> Tensor:
    """(count, 1) first tokens."""
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if start is not None:
        return torch.full((count, 1), start)
    return torch.randint(words(model) or len(tokenizer), (count, 1))
