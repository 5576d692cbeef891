"""The processor of a model's folder: what makes inputs of images, sounds and texts, as the model was trained with."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import DataError
from compress.lazy import transformers

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("processor_config.json", "preprocessor_config.json")
NAMING = (*FILES, "tokenizer_config.json", "config.json")  # files that may say which class it is
VIDEOS = "video_processor"
Part = Literal["image_processor", "feature_extractor", "all"]
AUTO: dict[Part, str] = {
    "image_processor": "AutoImageProcessor", "feature_extractor": "AutoFeatureExtractor", "all": "AutoProcessor",
}  # fmt: skip


def processor_folder(*folders: Path) -> Path:
    """The first folder with the files of a processor; the first at all where none has them."""
    return next((folder for folder in folders if any((folder / name).is_file() for name in FILES)), folders[0])


def load_processor(folder: Path, part: Part) -> Any:
    """The processor of a folder, or its part for images or for sounds; code that comes with it is never run.

    Without torchvision transformers takes the image processors that compute with Pillow. Processors that have one for
    videos, too, which only torchvision can run, are loaded without it: no row holds a video.

    Raises:
        DataError: there is none that can be used here, and why.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise DataError(
            f"{folder} has no processor, which makes the model's inputs of images or sounds: it holds neither of "
            f"{', '.join(FILES)}; copy them from where the model was published"
        )
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        made = getattr(transformers, AUTO[part])
        try:
            found = made.from_pretrained(folder, **options)
        except Exception:  # older versions of transformers do not say what is missing
            whole = _without_videos(folder) if part == "all" and find_spec("torchvision") is None else None
            if whole is None:
                raise
            found = whole.from_pretrained(folder, **options)
    except Exception as error:  # each class, and the libraries below, fail in their own way
        raise DataError(f"{folder} has no processor that can be used: {_reason(error)}") from error
    if part == "all" and not (hasattr(found, "image_processor") or hasattr(found, "feature_extractor")):
        raise DataError(f"{folder} has a {type(found).__name__}, and no processor of images or sounds")
    return found


def _without_videos(folder: Path) -> Any:
    """The class of a folder's processor, less what it has for videos; None where that is not what it lacks."""
    named = _class_named(folder)
    whole = getattr(transformers, named, None)
    if whole is None or getattr(whole, "is_dummy", False) or VIDEOS not in whole.get_attributes():
        return None
    attributes = [name for name in whole.get_attributes() if name != VIDEOS]

    def check(self: Any, name: str, given: Any) -> Any:
        return None if name == VIDEOS else whole.check_argument_for_proper_class(self, name, given)

    parts = {
        "get_attributes": classmethod(lambda cls: list(attributes)),
        "check_argument_for_proper_class": check,
        VIDEOS: None,
    }
    return type(named, (whole,), parts)


def _class_named(folder: Path) -> str:
    """What the processor's class is called; empty where nothing says it."""
    for name in NAMING:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(found, str):
            return found
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    known: Any = transformers.models.auto.processing_auto
    found = known.PROCESSOR_MAPPING_NAMES.get(config.model_type)
    return found if isinstance(found, str) else ""


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, ImportError) and "orchvision" in str(error):
        return f"{first.split(' requires')[0]} computes with torchvision; pip install torchvision"
    return first
