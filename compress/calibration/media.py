"""Images and sounds that rows of files name or hold: found, opened and read, or refused with the row and the file."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.texts import called
from compress.errors import DataError
from compress.lazy import np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

EXTRA = "pip install 'compress-pipeline[images]'"
FETCHED = ("http://", "https://", "s3://", "gs://", "hf://", "data:")
PCM = 2  # bytes of a sample of 16 bits


@dataclass(frozen=True)
class Medium:
    """An image or a sound that is not read yet.

    Attributes:
        place: the row that names it, for messages.
        source: its file, or what is in such a file.
    """

    place: str
    source: Path | bytes

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"{self.place}: {f'the {len(self.source)} bytes' if isinstance(self.source, bytes) else self.source}"

    def opened(self) -> Path | io.BytesIO:
        """What libraries read it from."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source


def media_in(value: Any, folder: Path, place: str, key: str) -> tuple[Medium, ...]:
    """What a field of a row names or holds.

    Args:
        value: a path, from `folder` on; bytes; {bytes, path} as data sets store it; a list of these; or null for none.
        folder: of the file with the rows.
        place: the row, for messages.
        key: the field, for messages.

    Raises:
        DataError: another kind of value, an address, or no such file.
    """
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(found for each in value for found in media_in(each, folder, place, key))
    return (_medium(value, folder, place, key),)


def _medium(value: Any, folder: Path, place: str, key: str) -> Medium:
    if isinstance(value, Mapping):
        held = value.get("bytes")
        value = value.get("path") if held is None else held
    if isinstance(value, bytes):
        if not value:
            raise DataError(f"{place}: {key!r} is empty: it holds no bytes")
        return Medium(place, value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: {key!r} is {called(value)}; it must be the path of a file, or {{bytes, path}}")
    if value.lower().startswith(FETCHED):
        shown = value if len(value) <= 80 else f"{value[:80]}..."
        raise DataError(f"{place}: {key!r} is the address {shown}, and nothing is fetched: give the path of a file")
    path = folder / value.removeprefix("file://")
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: {key!r} cannot be looked up: {error}") from error
    if not there:
        raise DataError(f"{place}: {key!r} names {path}, and there is no such file; paths begin at {folder}")
    return Medium(place, path)


def refuse_without_pillow(source: str) -> None:
    """Refuse images where nothing can open them.

    Raises:
        DataError: says what to install.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(f"{source} names images, and reading them needs: {EXTRA}") from error


def check_images(images: Iterable[Medium]) -> None:
    """Read no more of images than says that they are images.

    Raises:
        DataError: names the first that is none.
    """
    for image in images:
        _open(image).close()


def read_image(image: Medium, grey: bool = False) -> Any:
    """An image of Pillow, upright, with three channels, or one if it is to be `grey`.

    Raises:
        DataError: it is damaged, or cut off.
    """
    import PIL.ImageOps

    try:
        with _open(image) as opened:
            return PIL.ImageOps.exif_transpose(opened).convert("L" if grey else "RGB")
    except DataError:
        raise
    except Exception as error:  # decoders of every format have errors of their own
        said = f"{image.called} is an image that cannot be read: {error}"
        raise DataError(f"{said}; write it anew, or leave it out") from error


def _open(image: Medium) -> Any:
    import PIL.Image

    try:
        return PIL.Image.open(image.opened())
    except Exception as error:
        reason = "it is no image that Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
        raise DataError(f"{image.called} cannot be opened: {reason}") from error


def check_sounds(sounds: Iterable[Medium], rate: int) -> None:
    """Read no more of sounds than says that they can be used.

    Args:
        sounds: of the rows.
        rate: samples a second that the model is made for.

    Raises:
        DataError: names the first that cannot.
    """
    for sound in sounds:
        with _listen(sound, rate):
            pass


def read_sound(sound: Medium, rate: int) -> NDArray[np.float32]:
    """(samples,) numbers between -1 and 1, the mean of all channels. `rate`: as for `check_sounds`."""
    with _listen(sound, rate) as opened:
        try:
            frames, channels = opened.readframes(opened.getnframes()), opened.getnchannels()
        except (OSError, EOFError, RuntimeError, ValueError, wave.Error) as error:
            raise DataError(
                f"{sound.called} is damaged ({error or 'cut off'}); write it anew, or leave it out"
            ) from error
    whole = len(frames) // (PCM * channels) * PCM * channels
    if not whole:
        raise DataError(f"{sound.called} is a sound without samples")
    values = np.frombuffer(frames[:whole], dtype="<i2").reshape(-1, channels).astype(np.float32)
    mean: NDArray[np.float32] = (values / 32768).mean(axis=1)
    return mean


def _listen(sound: Medium, rate: int) -> wave.Wave_read:
    opened = sound.opened()
    try:
        found = wave.open(str(opened) if isinstance(opened, Path) else opened, "rb")  # noqa: SIM115
    except (OSError, EOFError, RuntimeError, ValueError, wave.Error) as error:  # what damaged headers end in
        raise DataError(
            f"{sound.called} is no .wav file of 16-bit numbers ({error or 'damaged'}); "
            f"ffmpeg -i FILE -ar {rate} -ac 1 OUT.wav makes one"
        ) from error
    if found.getsampwidth() != PCM:
        bits = 8 * found.getsampwidth()
        found.close()
        raise DataError(f"{sound.called} has numbers of {bits} bits; ffmpeg -i FILE -c:a pcm_s16le OUT.wav makes 16")
    if found.getframerate() != rate:
        own = found.getframerate()
        found.close()
        raise DataError(
            f"{sound.called} has {own} samples a second, and the model is made for {rate}; nothing is resampled here: "
            f"ffmpeg -i FILE -ar {rate} OUT.wav does it"
        )
    return found
