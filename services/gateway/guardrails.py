"""What tenants' prompts and answers must not have: filters on the way in and on the way out."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenloom.inference.v1 import generation_pb2, inference_pb2

from services.common.errors import MeshError, Reason
from services.common.settings_guardrails import (
    FilterSettings,
    GuardrailSettings,
    GuardSettings,
    ModerationFilter,
    PatternsFilter,
    PersonalDataFilter,
    SizeFilter,
)
from services.gateway.decoding import invalid
from services.gateway.guard_filters import PatternFilter, PiiFilter
from services.gateway.guard_output import OutputGuard, said_by
from services.gateway.guard_text import BlockedError, Rule, filtered
from services.gateway.moderation import Moderator
from services.gateway.pieces import Piece

__all__ = ["Guard", "Guardrails", "log_content"]

_log = logging.getLogger(__name__)


class Guard:
    """The filters of one tenant."""

    def __init__(self, settings: GuardSettings) -> None:
        """Raises ValueError: the key of a moderation service isn't there."""
        self.log_content = settings.log_content
        self._sizes = [each.max_characters for each in settings.input if isinstance(each, SizeFilter)]
        self._input = _rules(settings.input)
        self._output = _rules(settings.output)
        self._asks_before = _moderators(settings.input)
        self._asks_after = _moderators(settings.output)

    @property
    def filters(self) -> bool:
        """Whether anything is filtered, and not only logged."""
        return bool(self._sizes or self._input or self._output or self._asks_before or self._asks_after)

    async def check(self, request: generation_pb2.GenerateRequest) -> None:
        """Masks in a request what is to be masked.

        Raises:
            MeshError: INVALID_REQUEST, code "content_policy_violation"; NO_READY_WORKER when a moderation service that
                must be asked does not answer.
        """
        if (self._output or self._asks_after) and _shows_tokens(request):
            message = "logprobs: not together with the output filters of this tenant, and neither are tokens"
            raise invalid("logprobs", message)
        if self.filters and request.HasField("token_ids"):
            raise _unfiltered("prompt")
        if self._input:
            for said in request.chat.messages:
                _join_texts(said)
        await self._check(list(_texts(request)))

    async def check_texts(self, request: inference_pb2.EmbedRequest | inference_pb2.ScoreRequest) -> None:
        """The same for a request that generates nothing. Raises as `check` does."""
        if self.filters and isinstance(request, inference_pb2.EmbedRequest) and request.token_ids:
            raise _unfiltered("input")
        texts = [_Text(request.texts, index, "input") for index in range(len(request.texts))]
        if isinstance(request, inference_pb2.ScoreRequest):
            texts.append(_Text(request, "query", "query"))
        await self._check(texts)

    async def _check(self, texts: Sequence["_Text"]) -> None:
        size = sum(len(text.value) for text in texts)
        for bound in self._sizes:
            if size > bound:
                message = f"the prompt has {size} characters; {bound} is the most that this tenant may send"
                raise invalid(texts[0].field if texts else None, message, "string_above_max_length")
        if self._input:
            for text in texts:
                text.value = _checked(text, self._input)
        whole = "\n".join(text.value for text in texts)
        for moderator in self._asks_before:
            if await moderator.flags(whole):
                raise _refused(None, "moderation")

    def output(self) -> OutputGuard | None:
        """What an answer goes through; None: nothing."""
        if not self._output and not self._asks_after:
            return None
        return OutputGuard(self._output, self._asks_after)

    async def close(self) -> None:
        """Closes connections with moderation services."""
        for moderator in (*self._asks_before, *self._asks_after):
            await moderator.close()


class Guardrails:
    """The filters of every tenant. An async context manager that closes their connections."""

    def __init__(self, settings: GuardrailSettings) -> None:
        """Raises ValueError as `Guard` does."""
        self._default = _guard(settings.default)
        self._tenants: Mapping[str, Guard | None] = {tenant: _guard(each) for tenant, each in settings.tenants.items()}

    def of(self, tenant: str) -> Guard | None:
        """A tenant's; None where nothing is filtered or logged."""
        return self._tenants.get(tenant, self._default)

    async def __aenter__(self) -> "Guardrails":
        return self

    async def __aexit__(self, *_: object) -> None:
        for guard in (self._default, *self._tenants.values()):
            if guard is not None:
                await guard.close()


def log_content(request_id: str, request: generation_pb2.GenerateRequest, said: Sequence[str | Piece]) -> None:
    """Writes a prompt and its answer to the log, as the tenant's guard lets them through."""
    prompt = [f"{text.field}: {text.value}" for text in _texts(request)]
    _log.info("content", extra={"request": request_id, "prompt": prompt, "answer": "".join(map(said_by, said))})


class _Text:
    """One text of a request, in its place."""

    def __init__(self, holder: Any, place: str | int, field: str) -> None:
        self._holder = holder
        self._place = place
        self.field = field

    @property
    def value(self) -> str:
        found = self._holder[self._place] if isinstance(self._place, int) else getattr(self._holder, self._place)
        return str(found)

    @value.setter
    def value(self, text: str) -> None:
        if isinstance(self._place, int):
            self._holder[self._place] = text
        else:
            setattr(self._holder, self._place, text)


def _texts(request: generation_pb2.GenerateRequest) -> Iterator[_Text]:
    if request.HasField("text"):
        yield _Text(request, "text", "prompt")
    for index, message in enumerate(request.chat.messages):
        where = f"messages[{index}].content"
        yield _Text(message, "content", where)
        for part in message.parts:
            if part.HasField("text"):
                yield _Text(part, "text", where)
        for number, call in enumerate(message.tool_calls):
            yield _Text(call, "arguments_json", f"messages[{index}].tool_calls[{number}].function.arguments")


def _join_texts(message: generation_pb2.ChatMessage) -> None:
    """Makes one part of texts that follow each other: else what is spread over two would be seen by the model alone."""
    parts, last = list(message.parts), None
    del message.parts[:]
    for part in parts:
        if last is not None and last.HasField("text") and part.HasField("text"):
            # As templates that know no parts join them.
            last.text = f"{last.text}\n{part.text}"
        else:
            last = message.parts.add()
            last.CopyFrom(part)


def _checked(text: _Text, rules: Sequence[Rule]) -> str:
    try:
        return filtered(text.value, rules)
    except BlockedError as blocked:
        raise _refused(text.field, blocked.rule) from None
    except TimeoutError:
        _log.warning("a guardrail's pattern took too long", extra={"field": text.field})
        raise _refused(text.field, "unreadable") from None


def _refused(field: str | None, rule: str) -> MeshError:
    where = f"{field}: " if field else ""
    return invalid(field, f"{where}refused by the filter {rule!r}", "content_policy_violation")


def _unfiltered(field: str) -> MeshError:
    return MeshError(
        Reason.INVALID_REQUEST,
        f"{field}: token ids can't be filtered, as this tenant's must be; send text",
        field=field,
    )


def _shows_tokens(request: generation_pb2.GenerateRequest) -> bool:
    sampling = request.sampling
    return request.echo or sampling.HasField("logprob_count") or sampling.HasField("prompt_logprob_count")


def _guard(settings: GuardSettings | None) -> Guard | None:
    if settings is None or not (settings.input or settings.output or settings.log_content):
        return None
    return Guard(settings)


def _rules(filters: Sequence[FilterSettings]) -> list[Rule]:
    rules = []
    for each in filters:
        match each:
            case PatternsFilter():
                rules.append(Rule(PatternFilter(each.name, each.patterns), each.action))
            case PersonalDataFilter():
                rules.append(Rule(PiiFilter(each.entities, region=each.phone_region), each.action))
    return rules


def _moderators(filters: Sequence[FilterSettings]) -> list[Moderator]:
    found = []
    for each in filters:
        if isinstance(each, ModerationFilter):
            key = None if each.api_key_variable is None else os.environ.get(each.api_key_variable)
            if each.api_key_variable is not None and key is None:
                raise ValueError(f"the environment has no {each.api_key_variable}, the key of {each.url}")
            found.append(Moderator(each, key))
    return found
