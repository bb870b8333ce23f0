"""Images and sounds that come with a conversation are what they claim to be, and bounded before anything is decoded."""

import io
import struct
import wave
import zlib
from typing import Any

import pytest

from services.common.errors import MeshError, Reason
from services.inference.request import ChatMessage, Media

# It comes with vLLM.
Image = pytest.importorskip("PIL.Image")
media_files = pytest.importorskip("services.inference.media_files")

IMAGE, SOUND = "chat.messages[0].parts[1].image", "chat.messages[0].parts[1].audio"


def image(kind: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A file with one colour in it."""
    to = io.BytesIO()
    Image.new("RGB", size, (200, 40, 90)).save(to, kind)
    return to.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of an image of any size, which costs as much as a small one to send."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    chunks = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (body, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sound(*, rate: int = 16_000, channels: int = 1, width: int = 2, frames: bytes = b"\0\x40" * 100) -> bytes:
    """A WAV file."""
    to = io.BytesIO()
    with wave.open(to, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(frames)
    return to.getvalue()


def files(*media: tuple[str, bytes]) -> list[Any]:
    """A conversation's files, which follow a text."""
    parts = [Media(kind="audio" if kind[0] == "a" else "image", mime_type=kind, content=data) for kind, data in media]
    found: list[Any] = media_files.files_of([ChatMessage(role="user", content="", parts=("look:", *parts))])
    return found


def refused(*media: tuple[str, bytes]) -> tuple[str | None, str]:
    """Field and message of what opening them raises."""
    with pytest.raises(MeshError) as caught:
        media_files.opened(files(*media))
    assert caught.value.reason is Reason.INVALID_REQUEST
    return caught.value.field, caught.value.message


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_an_image_is_opened_without_being_decoded(kind: str) -> None:
    (opened,) = media_files.opened(files((f"image/{kind}", image(kind))))
    assert opened.size == (8, 6)


@pytest.mark.parametrize(
    ("kind", "content", "field", "says"),
    [
        ("image/png", b"not an image", IMAGE, "is no image of the type image/png"),
        ("image/png", b"", IMAGE, "is no image"),
        ("image/png", image()[:20], IMAGE, "is no image"),
        ("image/png", image("JPEG"), f"{IMAGE}.mime_type", "the image is image/jpeg"),
        ("image/jpeg", image(), f"{IMAGE}.mime_type", "the image is image/png"),
        ("image/svg+xml", b"<svg/>", f"{IMAGE}.mime_type", "one of image/png"),
        ("image/tiff", image("TIFF"), f"{IMAGE}.mime_type", "one of image/png"),
        ("image/png", image("TIFF"), IMAGE, "is no image"),
        ("image/png", png_header(100_000, 100_000), IMAGE, "at most 50000000 pixels"),
        ("image/png", png_header(8_000, 8_000), IMAGE, "at most 50000000 pixels"),
        ("image/png", png_header(1, 1_000), IMAGE, "at most 100 times as long as wide"),
        ("audio/wav", b"not a sound", SOUND, "is no sound of the type audio/wav"),
        ("audio/wav", sound()[:30], SOUND, "is no sound"),
        ("audio/wav", sound(frames=b""), SOUND, "has no samples"),
        ("audio/wav", sound(rate=2), SOUND, "4000 to 192000 samples a second, got 2"),
        ("audio/wav", sound(channels=9, frames=b"\0" * 180), SOUND, "1 to 8 channels, got 9"),
        ("audio/wav", sound(rate=4_000, width=1, frames=b"\0" * 2_404_000), SOUND, "at most 600 seconds"),
        ("audio/mpeg", b"ID3", f"{SOUND}.mime_type", "only audio/wav"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(kind: str, content: bytes, field: str, says: str) -> None:
    found, message = refused((kind, content))
    assert found == field
    assert says in message


def test_images_of_one_request_share_the_bound_on_pixels() -> None:
    large = ("image/png", png_header(5_000, 5_000))
    assert len(media_files.opened(files(large, large))) == 2
    field, message = refused(large, large, ("image/png", image()))
    assert field == "chat.messages[0].parts[3].image"
    assert "in all images of a request" in message


@pytest.mark.parametrize(
    ("width", "frames", "first"),
    [(1, b"\xc0\x80", 0.5), (2, b"\0\x40\0\x80", 0.5), (3, b"\0\0\xc0", -0.5), (4, b"\0\0\0\x20", 0.25)],
)
def test_samples_of_any_width_are_between_minus_one_and_one(width: int, frames: bytes, first: float) -> None:
    (file,) = files(("audio/wav", sound(width=width, frames=frames)))
    values, rate = media_files.samples(file, media_files.opened([file])[0])
    assert (values[0], rate) == (first, 16_000)


def test_channels_are_mixed() -> None:
    (file,) = files(("audio/wav", sound(channels=2, frames=b"\0\x40\0\x20" * 3)))
    values, _ = media_files.samples(file, media_files.opened([file])[0])
    assert list(values) == [0.375] * 3
