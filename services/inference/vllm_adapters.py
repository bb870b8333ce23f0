"""The LoRA adapters of one engine: checked, loaded, leased to generations, and unloaded when the last of these ends."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.safetensors_header import HeaderError
from services.common.settings_worker import ModelSettings
from services.inference.adapters import BaseModel, check_adapter, check_adapter_name, read_base_model
from services.inference.engine import Capability, EngineCard

if TYPE_CHECKING:
    # It imports vLLM.
    from services.inference.vllm_backend import Backend

__all__ = ["Adapters"]

_log = logging.getLogger(__name__)
_LOAD_SECONDS: Final = 120.0
_RETRY_SECONDS: Final = 1.0


@dataclass(slots=True, eq=False)
class _Adapter:
    name: str
    path: str
    number: int
    """The engine's name for it, never used twice: what was cached for one adapter must not serve another."""
    request: Any
    """vLLM's LoRARequest."""
    users: int = 0
    gone: bool = False
    """Unloaded; it stays in the engine while generations use it, which would load it again from disk, or die of it."""


class Adapters:
    """What is loaded outlives the engine process: a new one gets it again. For use on the engine's event loop."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._directory = None if settings.adapters_dir is None else Path(settings.adapters_dir)
        self._adapters: dict[str, _Adapter] = {}
        self._leaving: set[_Adapter] = set()
        self._numbers = count(1)
        self._changing = asyncio.Lock()
        self._base: BaseModel | None = None
        self._backend: Backend

    @property
    def cards(self) -> Sequence[EngineCard]:
        """The cards of the adapters, made from that of the model."""
        return [_card(self._backend.card, name) for name in self._adapters]

    async def open(self, backend: "Backend") -> None:
        """Loads into an engine that has just started what the settings list, or what the one before it had.

        Raises:
            ConfigError: at the first start, an adapter of the settings can't be loaded.
        """
        self._backend = backend
        self._leaving.clear()
        if self._directory is None:
            return
        if Capability.GENERATE not in backend.card.capabilities:
            raise ConfigError("model.adapters_dir: only for models that generate")
        if self._base is None:
            self._base = await asyncio.to_thread(self._read_base, backend)
            await self._load_listed()
            return
        before, self._adapters = self._adapters, {}
        for adapter in before.values():
            try:
                await self.load(adapter.name, adapter.path)
            except MeshError as error:
                if error.reason is Reason.NO_READY_WORKER:
                    # It died again, and the next one is to have them all.
                    self._adapters = before
                    raise
                _log.error("an adapter is lost", extra={"adapter": adapter.name, "cause": error.message})

    async def _load_listed(self) -> None:
        for index, listed in enumerate(self._settings.adapters):
            try:
                await self.load(listed.name, listed.path)
            except MeshError as error:
                if error.reason is Reason.NO_READY_WORKER:
                    raise
                raise ConfigError(f"model.adapters[{index}].{error.message}") from error

    def _read_base(self, backend: "Backend") -> BaseModel:
        model = backend.llm.model_config
        names = [self._settings.name, *self._settings.adapter_bases, model.model, model.hf_config.name_or_path]
        most = backend.llm.vllm_config.lora_config.max_lora_rank
        try:
            base = read_base_model(_folder(model.model), names=filter(None, names), max_rank=most)
        except (HeaderError, OSError) as error:
            raise ConfigError(f"model.path: {error}") from error
        if not base.shapes:
            _log.warning("this model has no safetensors files: adapters are checked by the engine alone")
        return base

    async def load(self, name: str, path: str) -> EngineCard:
        """Serves an adapter from now on.

        Raises:
            MeshError: ALREADY_EXISTS; FAILED_PRECONDITION, none can be taken; INVALID_REQUEST, this one can't;
                NO_READY_WORKER, the engine died meanwhile.
        """
        async with self._changing:
            directory, base = self._check_possible(name)
            folder, config = await asyncio.to_thread(check_adapter, path, directory, base)
            number = next(self._numbers)
            adapter = _Adapter(name, path, number, self._request(f"{name}#{number}", number, folder, config))
            await self._add(adapter)
            self._adapters[name] = adapter
            _log.info("an adapter is loaded", extra={"adapter": name})
            return _card(self._backend.card, name)

    def _check_possible(self, name: str) -> tuple[Path, BaseModel]:
        if self._directory is None or self._base is None or self._backend.llm is None:
            raise _starting_again()
        check_adapter_name(name)
        if name in self._adapters or name == self._settings.name:
            raise MeshError(Reason.ALREADY_EXISTS, f"name: the model {name!r} is there already", field="name")
        most = self._settings.max_adapters
        # One more, and the engine would drop the one that was used least, to load it again in the middle of a step.
        if len(self._adapters) + len(self._leaving) >= most:
            raise MeshError(
                Reason.FAILED_PRECONDITION, f"{most} adapters are loaded, which is the setting model.max_adapters"
            )
        return self._directory, self._base

    def _request(self, name: str, number: int, folder: Path, config: Mapping[str, Any]) -> Any:
        from vllm.lora.peft_helper import PEFTHelper  # noqa: PLC0415  # the environment has to be prepared first
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        try:
            # Features that it doesn't have: it knows best.
            PEFTHelper.from_dict(dict(config)).validate_legal(self._backend.llm.vllm_config.lora_config)
        except (ValueError, TypeError) as error:
            raise MeshError(Reason.INVALID_REQUEST, f"path: vLLM refuses it: {error}", field="path") from error
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder))

    async def _add(self, adapter: _Adapter) -> None:
        backend = self._backend
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                await backend.llm.add_lora(adapter.request)
        except backend.dead as error:
            raise _starting_again() from error
        except Exception as error:
            # It can be there by half, and then counts.
            await self._free(adapter)
            _log.warning("the engine refuses an adapter", exc_info=error)
            raise MeshError(Reason.INVALID_REQUEST, f"path: the engine refuses it: {error}", field="path") from error

    async def unload(self, name: str) -> None:
        """Serves an adapter no more; what runs with it goes on, and then its memory is free again.

        Raises:
            MeshError: NOT_FOUND.
        """
        async with self._changing:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                raise MeshError(Reason.NOT_FOUND, f"name: there is no adapter {name!r}", field="name")
            adapter.gone = True
            self._leaving.add(adapter)
            _log.info("an adapter is unloaded", extra={"adapter": name, "users": adapter.users})
            if not adapter.users:
                await self._free(adapter)

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Any]:
        """What vLLM is to be told of the model of a generation: None for the base model.

        Keep it until vLLM has released the generation.

        Raises:
            MeshError: MODEL_NOT_FOUND, it is no adapter, or was unloaded.
        """
        if model == self._settings.name:
            yield None
            return
        adapter = self._adapters.get(model)
        if adapter is None:
            raise MeshError(Reason.MODEL_NOT_FOUND, f"the model {model!r} does not exist", field="model")
        adapter.users += 1
        try:
            yield adapter.request
        finally:
            adapter.users -= 1
            if adapter.gone and not adapter.users:
                await self._free(adapter)

    async def _free(self, adapter: _Adapter) -> None:
        backend = self._backend
        try:
            if backend.llm is not None:
                async with asyncio.timeout(_LOAD_SECONDS):
                    await backend.llm.remove_lora(adapter.number)
        except backend.dead:
            _log.debug("nothing to free in a dead engine")
        except Exception:  # noqa: BLE001  # nobody waits for it
            _log.warning("an adapter can't be freed", extra={"adapter": adapter.name}, exc_info=True)
        finally:
            self._leaving.discard(adapter)


def _card(card: EngineCard, name: str) -> EngineCard:
    return replace(card, model=name, base_model=card.model)


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # comes with vLLM

    # vLLM has fetched it.
    return Path(snapshot_download(model, local_files_only=True))


def _starting_again() -> MeshError:
    return MeshError(Reason.NO_READY_WORKER, "the engine is starting again", retry_after_seconds=_RETRY_SECONDS)
