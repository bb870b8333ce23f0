"""Images and sounds of conversations: checked by their headers, then decoded, where neither holds anybody up."""

import asyncio
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, Final

from PIL import Image
from vllm.multimodal.image import normalize_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from services.common.errors import MeshError, Reason
from services.inference.checks import invalid
from services.inference.engine import Capability
from services.inference.media_files import File, opened, said, samples

__all__ = ["MediaReader", "media_limits", "placeholder_ids"]

_READ_SECONDS: Final = 30.0
# Requests whose files are decoded at a time; each may take a few hundred megabytes meanwhile.
_READERS: Final = 2
_CAPABILITIES: Final = {"image": Capability.IMAGES, "audio": Capability.AUDIO}
# What vLLM's ways to change the samples a second are made with; it brings the first one along where there is a GPU.
_RESAMPLERS: Final = {"torchaudio": "torchaudio", "pyav": "av", "scipy": "scipy", "soxr": "soxr"}
# Windows at the ends of a sound count as heard however little of it is in them.
_UNHEARD_SECONDS: Final = 0.1
_PLACEHOLDERS: Final = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))


def media_limits(renderer: Any) -> dict[Capability, int]:
    """How many images and sounds a prompt may have, by what the model and its settings allow; empty: it takes none.

    `renderer` is vLLM's.
    """
    config = renderer.model_config
    if not config.supports_multimodal_inputs or config.is_encoder_decoder:
        return {}
    allowed = renderer.get_mm_processor().info.allowed_mm_limits
    return {capability: allowed[name] for name, capability in _CAPABILITIES.items() if allowed.get(name, 0) > 0}


def placeholder_ids(config: Any) -> frozenset[int]:
    """The tokens that stand for media in prompts; `config` is vLLM's of the model."""
    if not config.supports_multimodal_inputs:
        return frozenset()
    found = (getattr(config.hf_config, name, None) for name in _PLACEHOLDERS)
    return frozenset(token for token in found if isinstance(token, int))


class MediaReader:
    """Makes of a prompt and its files what vLLM's engine takes."""

    def __init__(self, renderer: Any) -> None:
        """`renderer` is vLLM's."""
        self._renderer = renderer
        self._turns = asyncio.Semaphore(_READERS)
        # Beside the deadline the bounds keep its threads from being busy for long: a thread can't be stopped.
        self._threads = ThreadPoolExecutor(_READERS, "media")
        configured = (renderer.model_config.multimodal_config.media_io_kwargs or {}).get("image", {})
        self._images = ImageMediaIO(**configured)
        self._info = renderer.get_mm_processor().info
        self._only_rate = _only_rate(self._info.data_parser.audio_resampler)

    async def prompt(self, tokens: Sequence[int], files: Sequence[File]) -> dict[str, Any]:
        """vLLM's engine input: the tokens with as many as each file takes in its place, and what the model sees there.

        Raises:
            MeshError: INVALID_REQUEST, a file is not what it says, too large, or can't be decoded; a sound has another
                rate than the model and nothing here can change that, or is longer than the model hears.
            ValueError: vLLM's processor refuses one of several files.
        """
        try:
            async with asyncio.timeout(_READ_SECONDS), self._turns:
                found = await asyncio.get_running_loop().run_in_executor(self._threads, self._read, files)
                data: dict[str, list[Any]] = {}
                for file, read in zip(files, found, strict=True):
                    data.setdefault(file.media.kind, []).append(read)
                # The other cache has the engine remember what was never sent to it when a request is refused by then.
                rendered = await self._renderer.process_for_engine_async(
                    {"prompt_token_ids": list(tokens), "multi_modal_data": data}, time.time(), skip_mm_cache=True
                )
        except TimeoutError as error:
            message = f"the images and sounds took more than {_READ_SECONDS:.0f} s to read"
            raise MeshError(Reason.NO_CAPACITY, message, field="chat.messages", retry_after_seconds=1.0) from error
        except ValueError as error:
            # It doesn't say which one.
            if len(files) > 1 or getattr(error, "parameter", None):
                raise
            raise invalid(files[0].field, said(error)) from error
        sounds = [(file, read) for file, read in zip(files, found, strict=True) if file.media.kind == "audio"]
        for (file, read), item in zip(sounds, rendered["mm_kwargs"].get("audio", ()), strict=True):
            self._check_heard(file, len(read[0]) / read[1], item)
        return dict(rendered)

    def close(self) -> None:
        """Lets its threads end; what they read still is lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, files: Sequence[File]) -> list[Any]:
        found = opened(files)
        for file, each in zip(files, found, strict=True):
            if isinstance(each, wave.Wave_read) and self._only_rate not in (None, each.getframerate()):
                message = f"only sounds of {self._only_rate} samples a second are taken here, got {each.getframerate()}"
                raise invalid(file.field, message)
        return [
            self._image(file, each) if isinstance(each, Image.Image) else samples(file, each)
            for file, each in zip(files, found, strict=True)
        ]

    def _check_heard(self, file: File, seconds: float, item: Any) -> None:
        """Refuses a sound whose end was cut off: the answer would be one about its beginning, and not say so."""
        mask = item.get("feature_attention_mask")
        if mask is None:
            return
        extractor = self._info.get_feature_extractor()
        heard = float(mask.data.sum()) * extractor.hop_length / extractor.sampling_rate
        if seconds > heard + _UNHEARD_SECONDS:
            raise invalid(
                file.field, f"this model hears {heard:.0f} seconds of a sound, and this one has {seconds:.1f}"
            )

    def _image(self, file: File, image: Image.Image) -> MediaWithBytes[Image.Image]:
        # As vLLM's own reader does it, which would open more formats.
        try:
            image = normalize_image(image)
            image.load()
            converted = self._images._convert_image_mode(image)
        except Exception as error:  # whatever a decoder raises is the file's fault
            raise invalid(file.field, f"the image can't be decoded: {said(error)}") from error
        changed = {"image_mode": self._images.image_mode, "rgba_background_color": self._images.rgba_background_color}
        return MediaWithBytes(converted, file.media.content, changed if converted is not image else None)


def _only_rate(resampler: Any) -> int | None:
    """The samples a second that sounds have to have; None: vLLM changes those of others, or the model takes them."""
    if resampler.target_sr is None or find_spec(_RESAMPLERS[resampler.method]) is not None:
        return None
    return int(resampler.target_sr)
