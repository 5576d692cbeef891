"""Rows with images, sounds and texts as samples of a model, by the processor that it was trained with.

Every sample is what the processor makes of one row: nothing is filled up, cut or resampled here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from compress.calibration.data import Dataset, of_samples
from compress.calibration.media import check_images, check_sounds, read_image, read_sound, refuse_without_pillow
from compress.calibration.rows import holds_media, may_hold_media, only_media
from compress.errors import DataError
from compress.lazy import torch, transformers
from compress.models.families.transformers_model import IMAGE_INPUT, TOKENS, called_with, decodes, first_token
from compress.models.named import PLACES, inputs_of, needs_several
from compress.models.positions import longest_window
from compress.models.processors import load_processor
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from compress.calibration.rows import Row
    from compress.calibration.texts import Ticking
    from compress.models.processors import Part

SOUND_INPUTS = ("input_features", "input_values")
MASKS = ("attention_mask", "pixel_mask")  # of ones, they say nothing
# What stands in a text for an image or a sound, by the names that processors have for it; the first one is written.
MEDIA = ("image", "audio")
TOKENS_FOR = {"image": ("boi_token", "image_token"), "audio": ("boa_token", "audio_token")}
# What the rows of a file are made into: images or sounds alone, or texts with these.
Kind = Literal["images", "sounds", "texts"]
PARTS: dict[Kind, Part] = {"images": "image_processor", "sounds": "feature_extractor", "texts": "all"}


def kind_of_rows(model: Any) -> Kind | None:
    """What a model takes of rows; None of one that takes neither images nor sounds."""
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    own, taken = called_with(model), inputs_of(model)
    if not taken & {IMAGE_INPUT, *SOUND_INPUTS}:
        return None
    if own in SOUND_INPUTS:
        return "sounds"
    if own == IMAGE_INPUT:
        return "texts" if TOKENS in taken else "images"
    return "texts" if own == TOKENS else None


def takes_rows(model: Any, source: str, field: str) -> bool:
    """Whether a source is a file whose rows a model takes one by one, with their images or sounds.

    Of a model that takes text alone as well, a file without images and sounds is text.

    Raises:
        DataError: it cannot be read; or it holds only what the model does not take.
    """
    if not may_hold_media(source):
        return False
    if kind_of_rows(model) is None:
        if _only_media(source, field):
            raise DataError(f"{source} holds images or sounds, and a {type(model).__name__} takes neither")
        return False
    return called_with(model) != TOKENS or needs_several(model) or holds_media(source, field)


def _only_media(source: str, field: str) -> bool:
    try:
        return only_media(source, field)
    except DataError:  # whoever reads it as a text says more
        return False


class Processing:
    """Makes samples of rows for one model.

    Raises:
        DataError: when it is made: the model takes no rows, its folder has no processor, or Pillow is missing.
    """

    def __init__(self, model: Any, folder: Path, source: str):
        """Loads the processor.

        Args:
            model: that the samples are for; its values are not looked at.
            folder: with the files of its processor.
            source: the file of the rows, for messages.
        """
        kind = kind_of_rows(model)
        if kind is None:
            raise DataError(f"{source}: a {type(model).__name__} takes neither images nor sounds")
        self.model, self.kind, self.folder = model, kind, folder
        if IMAGE_INPUT in inputs_of(model):
            refuse_without_pillow(source)
        self.processor = load_processor(folder, PARTS[kind])
        self.tokenizer = load_tokenizer(folder, "the text of a row") if kind == "sounds" and decodes(model) else None
        self.grey = getattr(model.config, "num_channels", None) == 1
        listens = kind != "images" and bool(inputs_of(model) & {*SOUND_INPUTS})
        self.extractor: Any = getattr(self.processor, "feature_extractor", self.processor) if listens else None

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse what is known to be wrong before anything is decoded.

        Raises:
            DataError: names the first row.
        """
        self._labels(rows)
        for row in rows:
            self._check(row)
            check_images(row.images)
            if row.sounds:
                check_sounds(row.sounds, self._rate)

    @property
    def _rate(self) -> int:
        """Samples of sound a second."""
        return int(getattr(self.extractor, "sampling_rate", 16000))

    def _check(self, row: Row) -> None:
        name, has = type(self.model).__name__, f"it has {', '.join(row.keys) or 'nothing'}"
        if row.images and IMAGE_INPUT not in inputs_of(self.model):
            raise DataError(f"{row.place} names an image, and a {name} takes none")
        if row.sounds and self.extractor is None:
            raise DataError(f"{row.place} names a sound, and a {name} takes none")
        if self.kind == "images" and len(row.images) != 1:
            said = f"names {len(row.images)} images, and a {name} takes one at a time" if row.images else (
                f"names no image: `image` is to hold its path; {has}"
            )  # fmt: skip
            raise DataError(f"{row.place} {said}")
        if self.kind == "sounds" and len(row.sounds) != 1:
            raise DataError(f"{row.place} must name one sound, by `audio`; it names {len(row.sounds)}, and {has}")
        worded = row.text is not None or row.messages is not None
        if self.kind == "texts" and not worded and called_with(self.model) == TOKENS:
            raise DataError(
                f"{row.place} has no text: a {name} takes images with `text` or `messages` (`field:` names another); "
                f"{has}"
            )
        if (needs_several(self.model) or called_with(self.model) == IMAGE_INPUT) and not row.images:
            raise DataError(f"{row.place} names no image, and a {name} needs one: `image` is to hold its path; {has}")

    def samples(self, rows: Sequence[Row], over: Ticking | None = None, label: str = "") -> Dataset:
        """The samples of rows, one of each; `over` draws progress, with `label`.

        Raises:
            DataError: names the row that cannot be read, or that the processor refuses.
        """
        self.check(rows)
        ticking = rows if over is None else over(rows, len(rows), label)
        made = [self._sample(row) for row in ticking]
        data = of_samples(made)
        own = called_with(self.model)
        shapes = {tuple(sample[own].shape[1:]) for sample in made if own in sample}
        if self.kind != "texts" and len(shapes) == 1 and all(sample.keys() == {own} for sample in made):
            data = Dataset(torch.cat([sample[own] for sample in made]))
        labels = self._labels(rows)
        return data if labels is None else replace(data, labels=labels)

    def _labels(self, rows: Sequence[Row]) -> Tensor | None:
        """(N,) numbers of classes; None of a model that tells none apart, or of rows without any."""
        labelled = [row for row in rows if row.label is not None]
        if not type(self.model).__name__.endswith("Classification") or not labelled:
            return None
        bare = next((row for row in rows if row.label is None), None)
        if bare is not None:
            raise DataError(
                f"{bare.place} has no label, and {len(labelled)} of {len(rows)} rows have; give all or none"
            )
        return torch.tensor([self._label(row) for row in rows])

    def _label(self, row: Row) -> int:
        numbers = getattr(self.model.config, "label2id", None) or {}
        label = numbers.get(row.label) if isinstance(row.label, str) else row.label
        count = getattr(self.model.config, "num_labels", None)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < (count or label + 1):
            names = ", ".join([*map(str, numbers)][:4])
            raise DataError(
                f"{row.place}: label {row.label!r} is none of the {count} classes of the model: a number from 0 on, or "
                f"a name in config.json, such as {names}"
            )
        return label

    def _sample(self, row: Row) -> dict[str, Tensor]:
        try:
            found = self._processed(row)
        except DataError:
            raise
        except Exception as error:  # processors of every model fail in their own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{row.place}: the model's {type(self.processor).__name__} cannot make inputs of it: {reason}"
            ) from error
        taken = inputs_of(self.model)
        values = {name: value for name, value in found.items() if name in taken and isinstance(value, torch.Tensor)}
        if self.kind != "texts":
            values = {n: v for n, v in values.items() if n not in MASKS or not bool(v.bool().all())}
        return self._fitting(row, values)

    def _fitting(self, row: Row, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sample that the model can be called with."""
        own = called_with(self.model)
        if own not in values:
            raise DataError(f"{row.place}: the model's {type(self.processor).__name__} made no {own} of it")
        tokens = values.get("decoder_input_ids", values.get(TOKENS))
        longest = longest_window(self.model)
        if tokens is not None and longest and tokens.shape[1] > longest:
            raise DataError(
                f"{row.place} becomes {tokens.shape[1]} tokens, and the model has {longest} positions: shorten its "
                "text, or leave it out"
            )
        places = [getattr(self.model.config, name, None) for name in PLACES if name.startswith("image")]
        known = [place for place in places if isinstance(place, int)]
        if (
            row.images
            and TOKENS in values
            and known
            and not bool(torch.isin(values[TOKENS], torch.tensor(known)).any())
        ):
            raise DataError(
                f"{row.place}: its text has no place for the image: the model's chat template, or `text`, leaves it out"
            )
        return values

    def _processed(self, row: Row) -> Mapping[str, Any]:
        """What the processor makes of a row."""
        images = [read_image(image, self.grey) for image in row.images]
        if self.kind == "images":
            part = getattr(self.processor, "image_processor", self.processor)
            return dict(part(images=images, return_tensors="pt"))
        sounds = [read_sound(sound, self._rate) for sound in row.sounds]
        if self.kind == "sounds":
            heard = dict(self.extractor(sounds[0], sampling_rate=self._rate, return_tensors="pt"))
            return heard if self.tokenizer is None or row.text is None else {**heard, **self._spoken(row.text)}
        given: dict[str, Any] = {"images": images} if images else {}
        given |= {"audio": sounds, "sampling_rate": self._rate} if sounds else {}
        text = self._text(row)
        if text is not None:
            begin = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
            given |= {"text": text}
            if begin and row.messages is not None and text.startswith(begin):  # as transformers has it: one is enough
                given |= {"add_special_tokens": False}
        return dict(self.processor(**given, return_tensors="pt"))

    def _spoken(self, text: str) -> dict[str, Tensor]:
        """What a decoder is shown that writes a text down: each token behind the one before it."""
        assert self.tokenizer is not None
        ids, start = list(self.tokenizer(text)["input_ids"]), first_token(self.model)
        ids = ids if ids[:1] == [start] else [start, *ids]
        return {"decoder_input_ids": torch.tensor([ids[:-1] or ids])}

    def _text(self, row: Row) -> str | None:
        """The text of a row, with a place for each image and sound where the model has such places."""
        if row.messages is None and row.text is None:
            return None
        parts = [part for message in row.messages or () for part in message["content"]]
        said = row.text or "\n".join(part["text"] for part in parts if part["type"] == "text")
        written = [part["type"] for part in parts]
        missing = [kind for kind in MEDIA for _ in range(self._missing(row, kind, said, written.count(kind)))]
        media = [{"type": kind} for kind in missing]
        if row.messages is not None:
            return self._rendered(_with_media(row, media))
        if not missing:
            return row.text
        if self._template:
            return self._rendered([{"role": "user", "content": [*media, {"type": "text", "text": said}]}])
        return "".join(self._tokens_for(kind)[0] for kind in missing) + said

    def _missing(self, row: Row, kind: str, said: str, written: int) -> int:
        """How many images, or sounds, of a row have no place in its text yet."""
        held = len(row.images if kind == "image" else row.sounds)
        tokens = self._tokens_for(kind)
        if not tokens:
            return held if self._template and not written else 0
        places = written or max(said.count(token) for token in tokens)
        if places not in (0, held):
            raise DataError(
                f"{row.place} holds {held} of {kind}, and its text has {places} places ({tokens[0]}) for them"
            )
        return held - places

    def _tokens_for(self, kind: str) -> list[str]:
        """What stands for an image or a sound in a text; none where the model is given it apart from the text."""
        if called_with(self.model) != TOKENS or needs_several(self.model):
            return []
        found = (getattr(self.processor, name, None) for name in TOKENS_FOR[kind])
        return [str(token) for token in found if token]

    @property
    def _template(self) -> bool:
        """Whether the processor has a chat template."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        return bool(getattr(self.processor, "chat_template", None) or getattr(tokenizer, "chat_template", None))

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        if not self._template:
            raise DataError(f"{self.folder} has no chat template to make a text of messages; give rows with `text`")
        owner = self.processor if getattr(self.processor, "chat_template", None) else self.processor.tokenizer
        return str(owner.apply_chat_template(messages, tokenize=False))


def _with_media(row: Row, media: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The messages of a row, with media that none has a place for in front of what the user says first."""
    messages = list(row.messages or ())
    if not media:
        return messages
    first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None:
        raise DataError(f"{row.place} has no message of the user that its {media[0]['type']} could stand in")
    messages[first] = {**messages[first], "content": [*media, *messages[first]["content"]]}
    return messages
