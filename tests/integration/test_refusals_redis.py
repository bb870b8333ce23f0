"""A gateway that shares its limits through a real Redis, and a key that goes on asking when it may not."""

import time
from pathlib import Path

import httpx
from redis import Redis

from services.common.quota import KeyLimits
from services.common.settings_worker import SimSettings
from tests.support.openai_lane import openai_lane
from tests.support.redis import redis_server

FAST = SimSettings(decode_step_ms=1, decode_step_ms_per_sequence=0)
BODY = {"model": "sim", "prompt": "hi", "max_tokens": 1}
PASSING = ("retry-after", "x-ratelimit-reset-requests", "x-request-id")


def asked(redis: Redis) -> int:
    return int(redis.info("commandstats")["cmdstat_evalsha"]["calls"])


async def test_a_key_that_hammers_is_refused_in_the_same_words_without_asking_redis_each_time(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, Redis.from_url(server.url) as redis:
        async with openai_lane(tmp_path, FAST, redis_url=server.url) as lane:
            key = await lane.make_key("hammer", limits=KeyLimits(rpm=1))
            headers = {"authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(base_url=lane.base_url, headers=headers, timeout=10) as client:
                # A busy machine may take Redis for slow, and what is decided alone is not what is tested.
                until = time.monotonic() + 20
                while time.monotonic() < until:
                    before = asked(redis)
                    first = await client.post("/v1/completions", json=BODY)
                    if first.status_code == 429 and asked(redis) > before:
                        break
                before, began = asked(redis), time.monotonic()
                answers = [await client.post("/v1/completions", json=BODY) for _ in range(50)]
                # Gateways tell Redis now and then that they are there.
                assert asked(redis) - before <= 1 + (time.monotonic() - began)
    assert {answer.status_code for answer in answers} == {429}
    assert {answer.content for answer in answers} == {first.content}
    lasting = [{name: value for name, value in each.headers.items() if name not in PASSING} for each in answers]
    assert all(each == lasting[0] for each in lasting)
    assert lasting[0]["x-ratelimit-remaining-requests"] == "0"
    assert set(answers[0].headers) == set(first.headers)
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers)
