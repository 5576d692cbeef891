"""Data from Python: everything that holds token ids or images is one thing, and what is not understood is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, LlamaForCausalLM

import compress
from compress import DataError
from compress.calibration.given import gathered, token_ids
from compress.calibration.surroundings import evaluating, undisturbed

WINDOWS = torch.randint(256, (6, 8), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(WINDOWS)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set that is only asked for one row after the other."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(WINDOWS):
            raise IndexError
        return {"input_ids": WINDOWS[number].tolist(), "attention_mask": [1] * 8, "text": "a row"}


def endless() -> Iterator[Tensor]:
    while True:
        yield torch.zeros(1 << 12, 1 << 12, dtype=torch.uint8)


SAME: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: WINDOWS,
    "an array": lambda: WINDOWS.numpy(),
    "an array of two bytes": lambda: WINDOWS.numpy().astype(">u2"),
    "an array that cannot be written to": lambda: np.frombuffer(WINDOWS.numpy().tobytes(), np.int64).reshape(6, 8),
    "a list of lists": lambda: WINDOWS.tolist(),
    "a list of windows": lambda: list(WINDOWS),
    "a list of arrays": lambda: list(WINDOWS.numpy()),
    "a list of batches": lambda: [WINDOWS[:1], WINDOWS[1:]],
    "a dict of a tokenizer": lambda: {"input_ids": WINDOWS, "attention_mask": MASK},
    "a tokenizer's output": lambda: BatchEncoding({"input_ids": WINDOWS.tolist(), "attention_mask": MASK.tolist()}),
    "texts tokenized one by one": lambda: [BatchEncoding({"input_ids": row.tolist()}) for row in WINDOWS],
    "labels that are the tokens": lambda: {"input_ids": WINDOWS, "labels": WINDOWS, "token_type_ids": MASK * 0},
    "a data loader": lambda: DataLoader(TensorDataset(WINDOWS), batch_size=4),
    "a loader of dicts": lambda: DataLoader([{"input_ids": row} for row in WINDOWS], batch_size=4),  # type: ignore[arg-type]
    "a generator": lambda: (row for row in WINDOWS),
    "a data set": Rows,
    "one source by name": lambda: {"maths": {"input_ids": WINDOWS, "attention_mask": MASK}},
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_the_same_windows_in_any_wrapping_are_the_same_tokens(make: Callable[[], Any]) -> None:
    found = token_ids("calibration", gathered("calibration", make(), "tokens").inputs, 256)
    assert found.dtype == torch.int64
    assert torch.equal(found, WINDOWS)


def test_one_text_of_a_tokenizer_is_one_window() -> None:
    assert gathered("calibration", {"input_ids": WINDOWS[0].tolist()}, "tokens").inputs.shape == (1, 8)


def padded(rows: Tensor = WINDOWS) -> dict[str, Tensor]:
    mask = torch.ones_like(rows)
    mask[2, 5:] = 0
    return {"input_ids": rows, "attention_mask": mask}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "padding": (padded, "leaves out 3 of 8 positions of window 2, which is padded"),
    "padding in a source": (lambda: {"maths": padded()}, "'maths': attention_mask leaves out 3"),
    "padding in a loader": (lambda: [padded()], "item 0: attention_mask leaves out 3"),
    "a mask alone": (lambda: {"attention_mask": MASK}, "no input_ids"),
    "a mask of another shape": (lambda: {"input_ids": WINDOWS, "attention_mask": MASK[:, :3]}, r"is \(6, 3\)"),
    "a loader of unnamed masks": (lambda: DataLoader(TensorDataset(WINDOWS, MASK)), "item 0 is 2 tensors"),
    "changed labels": (lambda: {"input_ids": WINDOWS, "labels": WINDOWS * 0}, "labels is not what the model has"),
    "other positions": (lambda: {"input_ids": WINDOWS, "position_ids": WINDOWS}, "position_ids is not what"),
    "other inputs": (lambda: {"input_ids": WINDOWS, "image_sizes": WINDOWS}, "image_sizes is not used"),
    "a loader that turns lists round": (
        lambda: DataLoader([{"input_ids": row.tolist()} for row in WINDOWS], batch_size=6),  # type: ignore[arg-type]
        "changed round",
    ),
    "windows of different length": (lambda: [WINDOWS[0], WINDOWS[1, :5]], "different length .8, 5 tokens"),
    "lists of different length": (lambda: [[1, 2, 3], [1, 2]], "different length .3, 2 tokens"),
    "padding forgotten": (lambda: {"input_ids": [[1, 2, 3], [1, 2]]}, "different length .3, 2"),
    "a name": (lambda: "demo", "the text 'demo'.*compress.load_tokens"),
    "texts": (lambda: ["one text", "another"], "item 0 is the text 'one text'.*compress.load_tokens"),
    "texts of a tokenizer": (lambda: {"input_ids": ["one", "two"]}, "input_ids is a list of texts"),
    "a number": (lambda: 3, "of type int"),
    "nothing": (lambda: [], "empty"),
    "no source": (lambda: {}, "names no source"),
    "objects": (lambda: np.array([object()]), "no array of numbers"),
    "a sparse tensor": (lambda: WINDOWS.to_sparse(), "plain tensor"),
    "a tensor without values": (lambda: WINDOWS.to("meta"), "plain tensor"),
    "labels of a language model": (lambda: (WINDOWS, WINDOWS[:, 0]), "without labels"),
    "what never ends": (endless, "goes on after"),
    "two types": (lambda: [WINDOWS[0], WINDOWS[1].int()], "give one type"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_understood_is_refused_in_words(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        gathered("calibration", make(), "tokens")
    assert str(caught.value).startswith("calibration")


IDS: dict[str, tuple[Tensor, str]] = {
    "one token": (WINDOWS[:, :1], "at least two tokens"),
    "one window without its dimension": (WINDOWS[0], r"a single window is \(1, length\)"),
    "complex numbers": (WINDOWS.to(torch.complex64), "integer token ids"),
    "padding marks": (WINDOWS.masked_fill(WINDOWS > 200, -100), r"0\.\.255, such as -100"),
    "another vocabulary": (WINDOWS + 200, r"0\.\.255, such as 4"),
}


@pytest.mark.parametrize(("tokens", "words"), IDS.values(), ids=IDS.keys())
def test_token_ids_that_cannot_be_measured_are_refused(tokens: Tensor, words: str, tiny_llama: nn.Module) -> None:
    for call in (
        lambda: compress.evaluate(tiny_llama, tokens),
        lambda: compress.apply(tiny_llama, [compress.Rtn()], evaluation=tokens),
        lambda: compress.apply(tiny_llama, [compress.Rtn()], evaluation={"a": tokens, "b": tokens}),
    ):
        with pytest.raises(DataError, match=words):
            call()


def test_calibrating_with_windows_of_one_token_is_possible_where_nothing_is_predicted(tiny_llama: nn.Module) -> None:
    assert compress.apply(tiny_llama, [compress.Gptq()], WINDOWS[:, :1]).weights


def test_images_and_other_inputs_pass_the_same_gate() -> None:
    images, labels = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 1, 0])
    pairs = TensorDataset(images, labels)
    for given in (
        (images, labels),
        (images.numpy(), labels.numpy()),
        (list(images), labels.tolist()),
        {"pixel_values": images, "labels": labels},
        DataLoader(pairs, batch_size=3),
        [pairs[i] for i in range(4)],
    ):
        found = gathered("evaluation", given, "images")
        assert torch.equal(found.inputs, images)
        assert found.labels is not None
        assert torch.equal(found.labels, labels)
    assert gathered("calibration", [torch.ones(3), torch.zeros(3)], "inputs").inputs.shape == (2, 3)
    with pytest.raises(DataError, match="no pixel_values"):
        gathered("calibration", {"input_ids": WINDOWS}, "images")
    with pytest.raises(DataError, match="different shapes"):
        gathered("calibration", [images[0], images[0, :, 1:]], "images")


# --- the caller's mode and settings -----------------------------------------------------------------------------------


def test_dropout_is_off_while_measuring_and_every_part_keeps_its_mode(llama_maker: Callable[..., Any]) -> None:
    model = llama_maker(attention_dropout=0.5)
    right = compress.evaluate(model, WINDOWS)
    model.train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    assert compress.evaluate(model, WINDOWS, against=model).perplexity == right.perplexity
    result = compress.apply(model, [compress.Rtn(bits=8)], evaluation=WINDOWS)
    assert result.report.rows[0].perplexity == right.perplexity
    assert [part.training for part in model.modules()] == modes
    compress.apply(model, [compress.Rtn(bits=8)], inplace=True)
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [part.training for part in model.modules()] == modes


def caller_settings() -> dict[str, Any]:
    return {
        "no gradients": torch.no_grad(),
        "inference mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "another device": torch.device("meta"),
    }


@pytest.mark.parametrize("setting", caller_settings())
def test_what_the_caller_has_switched_on_changes_no_result(setting: str, tiny_llama: LlamaForCausalLM) -> None:
    passes = [compress.Magnitude(sparsity=0.5), compress.Perp(steps=2)]

    def results() -> tuple[Any, ...]:
        measured = compress.evaluate(tiny_llama, WINDOWS)
        return measured, [
            row.perplexity for row in compress.apply(tiny_llama, passes, WINDOWS, evaluation=WINDOWS).report.rows
        ]

    wanted = results()
    with caller_settings()[setting]:
        assert results() == wanted


def test_the_callers_default_type_and_exactness_are_set_aside_and_given_back() -> None:
    torch.set_default_dtype(torch.bfloat16)
    with undisturbed():
        assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_dtype() == torch.bfloat16
