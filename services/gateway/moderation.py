"""A moderation service: anything that answers as OpenAI's POST /v1/moderations does."""

import logging

import httpx
import msgspec

from services.common.errors import MeshError, Reason
from services.common.settings_guardrails import ModerationFilter

__all__ = ["Moderator"]

_log = logging.getLogger(__name__)


class _Result(msgspec.Struct):
    flagged: bool


class _Answer(msgspec.Struct):
    results: list[_Result]


class Moderator:
    """Asks one service."""

    def __init__(self, settings: ModerationFilter, key: str | None) -> None:
        self._settings = settings
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx.AsyncClient(headers=headers, timeout=settings.timeout_seconds, follow_redirects=False)

    async def flags(self, text: str) -> bool:
        """Whether a text is not to pass.

        Raises:
            MeshError: NO_READY_WORKER: the service does not answer, and must be asked.
        """
        if not text.strip():
            return False
        question = {"input": text} | ({"model": self._settings.model} if self._settings.model else {})
        try:
            answer = await self._client.post(self._settings.url, json=question)
            answer.raise_for_status()
            return any(result.flagged for result in msgspec.json.decode(answer.content, type=_Answer).results)
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            _log.warning("a moderation service does not answer", extra={"cause": repr(error)})
            if self._settings.when_away == "pass":
                return False
            message = "what this tenant sends must be moderated, and the service for that does not answer"
            raise MeshError(Reason.NO_READY_WORKER, message, retry_after_seconds=5.0) from error

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.aclose()
