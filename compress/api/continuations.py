"""What models go on with after a prompt, for people to read beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from compress.api.output_folder import refuse_changed
from compress.calibration.surroundings import undisturbed
from compress.checkpoint.opening import load_measured
from compress.errors import DataError, UsageError
from compress.models import adapters
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


@undisturbed()
def continuations(model: str, prompts: Sequence[str], tokens: int = 48) -> list[str]:
    """What a model holds for most likely after each prompt, token by token.

    Args:
        model: `demo`, a folder, a hub id or an adapter; a compressed folder too.
        prompts: texts, one or more.
        tokens: to go on with, at most.

    Raises:
        UsageError: no such model, or one that writes no text.
        DataError: a prompt without a token, or with more than the model takes.
    """
    found = adapters.locate(model)
    for folder in found.folders:
        refuse_changed(folder)
    loaded: Any = load_measured(model)
    if not (isinstance(loaded, transformers.PreTrainedModel) and loaded.can_generate()):
        raise UsageError(f"{model} is a {type(loaded).__name__}, which writes no text; leave --prompt out")
    tokenizer = load_tokenizer(found.folder, "prompts")
    return [_goes_on(loaded, tokenizer, prompt, tokens) for prompt in prompts]


def _goes_on(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids.numel():
        raise DataError("a prompt of no token; write some text")
    if longest is not None and ids.shape[1] + tokens > longest:
        raise DataError(
            f"a prompt of {ids.shape[1]} tokens and {tokens} more are over the {longest} that the model takes; write "
            "less"
        )
    settings = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    with torch.no_grad():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
