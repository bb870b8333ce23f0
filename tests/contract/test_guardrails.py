"""Guardrails over a real gateway, router and simulated worker: what a tenant sends and gets is filtered."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.common.settings_guardrails import (
    GuardrailSettings,
    GuardSettings,
    ModerationFilter,
    PatternsFilter,
    PersonalDataFilter,
    SizeFilter,
)
from services.common.settings_worker import SimSettings
from services.inference.sim_text import expected_text, tokenize
from tests.support.openai_lane import Lane, openai_lane

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAST = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=1)
SAID = expected_text(tokenize("one"), 60)
# A phrase from the middle of what the model will say.
FIRST, PHRASE = SAID[:40], SAID[40:52]


class Service:
    """A moderation service that flags texts with "bad" in them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        question = json.loads(await reader.readexactly(length))
        self.asked.append(question["input"])
        body = json.dumps({"results": [{"flagged": "bad" in question["input"]}]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()


@asynccontextmanager
async def moderation() -> AsyncIterator[tuple[Service, str]]:
    service = Service()
    server = await asyncio.start_server(service.answer, "127.0.0.1", 0)
    async with server:
        yield service, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/moderations"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Lane, Service]]:
    async with moderation() as (service, url):
        guardrails = GuardrailSettings(
            tenants={
                "careful": GuardSettings(
                    input=[
                        SizeFilter(max_characters=200),
                        PersonalDataFilter(),
                        PatternsFilter(name="secrets", patterns=[r"project-\w+", r"sword\s+fish"]),
                    ],
                    output=[PatternsFilter(name="phrase", patterns=[re.escape(PHRASE)])],
                ),
                "masked": GuardSettings(
                    output=[PatternsFilter(name="phrase", patterns=[re.escape(PHRASE)], action="mask")],
                    log_content=True,
                ),
                "moderated": GuardSettings(input=[ModerationFilter(url=url)], output=[ModerationFilter(url=url)]),
                "closed": GuardSettings(input=[ModerationFilter(url="http://127.0.0.1:9/")]),
                "open": GuardSettings(input=[ModerationFilter(url="http://127.0.0.1:9/", when_away="pass")]),
            }
        )
        async with openai_lane(tmp_path_factory.mktemp("guarded"), FAST, guardrails=guardrails) as lane:
            yield lane, service


@asynccontextmanager
async def client(lane: Lane, tenant: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {lane.new_key(tenant)}"}
    async with httpx.AsyncClient(base_url=lane.base_url, headers=headers, timeout=10) as opened:
        async with asyncio.timeout(5):
            while (await opened.get("/v1/models")).status_code == 401:
                await asyncio.sleep(0.05)
        yield opened


def completion(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "sim", "prompt": prompt, "max_tokens": 60, "ignore_eos": True, "temperature": 0} | more


def streamed(text: str) -> tuple[str, str | None]:
    chunks = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


async def test_a_prompt_is_masked_before_any_worker_sees_it(served: tuple[Lane, Service]) -> None:
    lane, _ = served
    async with client(lane, "careful") as careful, httpx.AsyncClient(base_url=lane.base_url) as plain:
        asked = (await careful.post("/v1/completions", json=completion("mail a@b.example", max_tokens=9))).json()
        same = completion("mail <EMAIL_ADDRESS>", max_tokens=9)
        expected = (await plain.post("/v1/completions", json=same, headers=lane.headers)).json()
        assert asked["choices"][0]["text"] == expected["choices"][0]["text"]


async def test_what_is_spread_over_parts_of_a_message_is_seen_as_the_model_would_see_it(
    served: tuple[Lane, Service],
) -> None:
    parts = [{"type": "text", "text": text} for text in ("it is sword", "fish", "or not")]
    body = {"model": "sim", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    async with client(served[0], "careful") as careful:
        refused = await careful.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content"
        del parts[1]
        assert (await careful.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (completion("about project-x"), "prompt", "content_policy_violation"),
        (completion("x" * 201), "prompt", "string_above_max_length"),
        (completion("one") | {"prompt": [1, 2]}, "prompt", "invalid_value"),
        (completion("one", logprobs=1), "logprobs", "invalid_value"),
        (completion("one", echo=True), "logprobs", "invalid_value"),
    ],
)
async def test_a_prompt_that_must_not_pass_is_refused_by_name(
    served: tuple[Lane, Service], body: dict[str, Any], param: str, code: str
) -> None:
    async with client(served[0], "careful") as careful:
        answer = await careful.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_ends_before_what_it_must_not_say(served: tuple[Lane, Service], stream: bool) -> None:
    async with client(served[0], "careful") as careful:
        answer = await careful.post("/v1/completions", json=completion("one", stream=stream))
    if stream:
        said, finish = streamed(answer.text)
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        said, finish = (answer.json()["choices"][0][name] for name in ("text", "finish_reason"))
    assert (said, finish) == (FIRST, "content_filter")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_masked_in_an_answer_leaves_the_rest_as_it_is(
    served: tuple[Lane, Service], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with client(served[0], "masked") as masked:
            answer = await masked.post("/v1/completions", json=completion("one", stream=stream))
    said = streamed(answer.text)[0] if stream else answer.json()["choices"][0]["text"]
    assert said == SAID.replace(PHRASE, "<PHRASE>")
    logged = [record.__dict__ for record in caplog.records if record.message == "content"]
    assert [(entry["prompt"], entry["answer"]) for entry in logged] == [(["prompt: one"], said)]


async def test_nothing_is_logged_of_what_tenants_say_unless_they_want_it(
    served: tuple[Lane, Service], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="services"):
        async with client(served[0], "careful") as careful:
            await careful.post("/v1/completions", json=completion("unmistakable", max_tokens=5))
    assert not [record for record in caplog.records if "unmistakable" in str(record.__dict__)]


async def test_a_moderation_service_is_asked_before_and_after(served: tuple[Lane, Service]) -> None:
    lane, service = served
    async with client(lane, "moderated") as moderated:
        refused = await moderated.post("/v1/completions", json=completion("something bad"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_policy_violation")
        service.asked.clear()
        answer = await moderated.post("/v1/completions", json=completion("one", stream=True))
        assert streamed(answer.text)[0] == SAID
        assert service.asked == ["one", SAID]


async def test_a_moderation_service_that_is_away_stops_whom_it_must(served: tuple[Lane, Service]) -> None:
    async with client(served[0], "closed") as closed, client(served[0], "open") as opened:
        refused = await closed.post("/v1/completions", json=completion("one", max_tokens=3))
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert (await opened.post("/v1/completions", json=completion("one", max_tokens=3))).status_code == 200


async def test_a_refused_prompt_of_one_tenant_is_anothers_good_one(served: tuple[Lane, Service]) -> None:
    lane, _ = served
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers) as anybody:
        answer = await anybody.post("/v1/completions", json=completion("about project-x", max_tokens=3))
        assert answer.status_code == 200


async def test_the_way_around_the_gateway_is_closed_to_filtered_tenants(served: tuple[Lane, Service]) -> None:
    lane, _ = served
    for tenant, status in (("careful", 403), ("plain", 200)):
        headers = {"authorization": f"Bearer {lane.new_key(tenant)}", "x-tokenloom-right": "inference"}
        async with httpx.AsyncClient(base_url=lane.base_url, headers=headers) as edge, asyncio.timeout(5):
            while (answer := await edge.post("/authz/x")).status_code == 401:
                await asyncio.sleep(0.05)
        assert answer.status_code == status
