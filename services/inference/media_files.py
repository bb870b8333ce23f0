"""Files of conversations: what they claim to be compared with what they are, and bounded by their headers alone."""

import io
import wave
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from services.inference.checks import invalid
from services.inference.request import ChatMessage, Media

__all__ = ["File", "files_of", "opened", "said", "samples"]

_MAX_PIXELS: Final = 50_000_000
# Models scale the shorter side to a few hundred pixels, and the longer one with it: a line would become a gigabyte.
_MAX_ASPECT: Final = 100
_MAX_SECONDS: Final = 600
_SAMPLE_RATES: Final = range(4_000, 192_001)
_MAX_CHANNELS: Final = 8
# Pillow knows many more, whose readers hardly anybody looks at.
_FORMATS: Final[Mapping[str, str]] = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
}
# JPEG with further pictures behind the first one, as telephones make it.
_SAME_AS: Final = {"MPO": "JPEG"}
_WAV: Final = ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")


class File(NamedTuple):
    """A file of a conversation, and the field that it came in."""

    field: str
    media: Media


def files_of(messages: Sequence[ChatMessage]) -> list[File]:
    """The files of a conversation in the order in which it has them."""
    return [
        File(f"chat.messages[{at}].parts[{index}].{part.kind}", part)
        for at, message in enumerate(messages)
        for index, part in enumerate(message.parts)
        if isinstance(part, Media)
    ]


def opened(files: Sequence[File]) -> list[Image.Image | wave.Wave_read]:
    """The files with their headers read, and nothing decoded.

    Raises:
        MeshError: INVALID_REQUEST, one is not what it says, or they are too large.
    """
    found = [_opened_image(file) if file.media.kind == "image" else _opened_sound(file) for file in files]
    _check_pixels(files, found)
    _check_seconds(files, found)
    return found


def _opened_image(file: File) -> Image.Image:
    """The image with its header read and nothing else."""
    claimed = file.media.mime_type
    if claimed not in _FORMATS.values():
        raise invalid(f"{file.field}.mime_type", f"one of {', '.join(_FORMATS.values())}")
    try:
        image = Image.open(io.BytesIO(file.media.content), formats=tuple(_FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise invalid(file.field, f"at most {_MAX_PIXELS} pixels") from error
    except Exception as error:  # whatever a decoder raises is the file's fault
        raise invalid(file.field, f"is no image of the type {claimed}") from error
    kind = _FORMATS[_SAME_AS.get(image.format or "", image.format or "")]
    if kind != claimed:
        raise invalid(f"{file.field}.mime_type", f"says {claimed}, but the image is {kind}")
    return image


def _check_pixels(files: Sequence[File], opened: Sequence[Any]) -> None:
    left = _MAX_PIXELS
    for file, image in zip(files, opened, strict=True):
        if not isinstance(image, Image.Image):
            continue
        width, height = image.size
        if not width or not height:
            raise invalid(file.field, "the image has no pixels")
        left -= width * height
        if left < 0:
            message = f"at most {_MAX_PIXELS} pixels in all images of a request; this one has {width} x {height}"
            raise invalid(file.field, message)
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise invalid(file.field, f"at most {_MAX_ASPECT} times as long as wide, got {width} x {height}")


def _opened_sound(file: File) -> wave.Wave_read:
    """The sound with its header read and nothing else."""
    if file.media.mime_type not in _WAV:
        raise invalid(f"{file.field}.mime_type", f"only {_WAV[0]} is read here")
    try:
        sound = wave.open(io.BytesIO(file.media.content), "rb")  # noqa: SIM115  # of memory, which nobody has to close
    except (wave.Error, EOFError, ValueError) as error:
        raise invalid(file.field, f"is no sound of the type {_WAV[0]} in PCM: {said(error)}") from error
    if sound.getframerate() not in _SAMPLE_RATES:
        bounds = f"{_SAMPLE_RATES[0]} to {_SAMPLE_RATES[-1]}"
        raise invalid(file.field, f"{bounds} samples a second, got {sound.getframerate()}")
    if not 1 <= sound.getnchannels() <= _MAX_CHANNELS:
        raise invalid(file.field, f"1 to {_MAX_CHANNELS} channels, got {sound.getnchannels()}")
    if not sound.getnframes():
        raise invalid(file.field, "the sound has no samples")
    return sound


def _check_seconds(files: Sequence[File], opened: Sequence[Any]) -> None:
    left = float(_MAX_SECONDS)
    for file, sound in zip(files, opened, strict=True):
        if isinstance(sound, Image.Image):
            continue
        seconds = sound.getnframes() / sound.getframerate()
        left -= seconds
        if left < 0:
            message = f"at most {_MAX_SECONDS} seconds in all sounds of a request; this one has {seconds:.0f}"
            raise invalid(file.field, message)


def samples(file: File, sound: wave.Wave_read) -> tuple[np.ndarray[Any, Any], float]:
    """The samples of all channels together, -1 to 1, and how many there are in a second; raises MeshError as opened."""
    width, channels = sound.getsampwidth(), sound.getnchannels()
    raw = np.frombuffer(sound.readframes(sound.getnframes()), np.uint8)
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width)
    if not len(raw):
        raise invalid(file.field, "the sound has no samples")
    if width == 1:
        samples = (raw[:, 0].astype(np.float32) - 128) / 128
    else:
        # Little-endian of any width as the upper bytes of 32 bits.
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 4 - width :] = raw
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return samples.reshape(-1, channels).mean(axis=1), float(sound.getframerate())


def said(error: Exception) -> str:
    """What went wrong, for a message."""
    return str(error)[:200] or type(error).__name__
