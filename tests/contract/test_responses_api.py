"""The Responses API over a real gateway, router and simulated worker, as the official SDK uses it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio
from openai.types.responses import ResponseInputParam

from services.common.errors import MeshError
from services.common.keystore import KeyStore
from services.common.settings_worker import SimSettings
from services.gateway.conversations import Conversations, MemoryShelf, RedisShelf, Turn, connect
from tests.support.openai_lane import Lane, openai_lane
from tests.support.redis import redis_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAST = SimSettings(prefill_tokens_per_second=1e6, decode_step_ms=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lane(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lane]:
    async with openai_lane(tmp_path_factory.mktemp("responses"), FAST) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(lane: Lane) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=lane.key, max_retries=0) as opened:
        yield opened


async def test_a_conversation_goes_on_from_what_was_said(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="sim", input="one", temperature=0, max_output_tokens=9)
    second = await client.responses.create(
        model="sim", input="two", previous_response_id=first.id, temperature=0, max_output_tokens=9
    )
    assert first.output_text
    assert second.previous_response_id == first.id
    assert first.usage
    assert second.usage
    assert second.usage.input_tokens > first.usage.input_tokens
    asked: ResponseInputParam = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "two"},
    ]
    spelled_out = await client.responses.create(model="sim", input=asked, temperature=0, max_output_tokens=9)
    assert spelled_out.output_text == second.output_text
    assert spelled_out.usage
    assert spelled_out.usage.input_tokens == second.usage.input_tokens


async def test_a_stream_tells_what_the_whole_answer_says(client: openai.AsyncOpenAI) -> None:
    whole = await client.responses.create(model="sim", input="stream", temperature=0, max_output_tokens=30)
    text, final = "", None
    stream = await client.responses.create(
        model="sim", input="stream", temperature=0, max_output_tokens=30, stream=True
    )
    async for event in stream:
        if event.type == "response.output_text.delta":
            text += event.delta
        elif event.type in ("response.completed", "response.incomplete"):
            final = event.response
            # The moment it is told, it can be built on.
            assert (await client.responses.retrieve(final.id)).output_text == text
    assert final is not None
    assert text == final.output_text == whole.output_text
    assert final.usage == whole.usage


async def test_the_sdks_own_stream_helper_follows(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="sim", input="help", temperature=0) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text


async def test_an_answer_can_be_looked_up_and_forgotten(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="sim", input="keep", max_output_tokens=4)
    assert (await client.responses.retrieve(made.id)).output_text == made.output_text
    items = await client.responses.input_items.list(made.id)
    assert [item.to_dict()["content"] for item in items.data] == [[{"type": "input_text", "text": "keep"}]]
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_what_is_not_to_be_stored_is_not(client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="sim", input="secret", max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="sim", input="x", previous_response_id=made.id)


async def test_nobody_sees_another_tenants_answers(lane: Lane, client: openai.AsyncOpenAI) -> None:
    made = await client.responses.create(model="sim", input="mine", max_output_tokens=4)
    with KeyStore(lane.keys) as store:
        _, key = store.create("stranger")
    async with openai.AsyncOpenAI(base_url=f"{lane.base_url}/v1", api_key=key, max_retries=0) as stranger:
        await asyncio.sleep(0.6)
        with pytest.raises(openai.NotFoundError) as caught:
            await stranger.responses.create(model="sim", input="x", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found"


async def test_a_bad_field_is_refused_by_name(lane: Lane) -> None:
    async with httpx.AsyncClient(base_url=lane.base_url, headers=lane.headers) as http:
        answer = await http.post("/v1/responses", json={"model": "sim", "input": [{"type": "x"}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].type")
        answer = await http.put("/v1/responses", json={})
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def turn(text: str, *earlier: str) -> Turn:
    output = msgspec.json.encode({"output": [{"said": text}]})
    return Turn(response=msgspec.Raw(output), input=[msgspec.Raw(b'{"asked":1}')], earlier=list(earlier))


async def test_gateways_share_what_was_said_through_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with connect(server.url) as one, connect(server.url) as two:
            here, there = Conversations(RedisShelf(one)), Conversations(RedisShelf(two))
            await here.save("t", "a", turn("one"))
            await here.save("t", "b", turn("two", "a"))
            earlier, items = await there.history("t", "b")
            assert earlier == ["a", "b"]
            said = [bytes(item) for item in items]
            assert said == [b'{"asked":1}', b'{"said":"one"}', b'{"asked":1}', b'{"said":"two"}']
            await there.forget("t", "a")
            with pytest.raises(MeshError, match="no response 'a'"):
                await there.turn("t", "a")


async def test_a_conversation_goes_on_at_its_gateway_while_redis_is_away(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        async with connect(server.url) as client:
            conversations = Conversations(RedisShelf(client))
            server.kill()
            await conversations.save("t", "a", turn("one"))
            assert (await conversations.turn("t", "a")).input
            with pytest.raises(MeshError) as caught:
                await conversations.turn("t", "elsewhere")
            assert caught.value.retry_after_seconds


async def test_memory_forgets_what_was_used_longest_ago_and_what_is_too_old() -> None:
    now = 0.0
    shelf = MemoryShelf(max_bytes=10, clock=lambda: now)
    await shelf.put("a", b"12345")
    await shelf.put("b", b"12345")
    await shelf.get(["a"])
    await shelf.put("c", b"1")
    assert await shelf.get(["a", "b", "c"]) == [b"12345", None, b"1"]
    now = 31 * 24 * 3600
    assert await shelf.get(["a", "c"]) == [None, None]
