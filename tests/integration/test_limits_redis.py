"""Limits that gateways share through a real Redis, and what becomes of them when it is slow, away, or has forgotten."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic

import pytest
from redis.asyncio import Redis

from services.common.quota import KeyLimits
from services.gateway import limits_shared
from services.gateway.limits import Decision, Reservation
from services.gateway.limits_shared import SharedLimits
from tests.support.redis import RedisServer, redis_server
from tests.support.waiting import eventually

LIMITS = KeyLimits(rpm=100)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@asynccontextmanager
async def gateways(redis: RedisServer, count: int) -> AsyncIterator[list[SharedLimits]]:
    """Gateways that know of each other."""
    limiters = [SharedLimits(redis.url, f"gateway-{number}") for number in range(count)]
    async with AsyncExitStack() as stack:
        for limiter in limiters:
            task = asyncio.create_task(limiter.run())
            stack.push_async_callback(asyncio.wait, [task])
            stack.callback(task.cancel)
            await eventually(lambda limiter=limiter: limiter.is_shared, within=5)  # type: ignore[misc]  # bound now
        for limiter in limiters:
            await limiter._hello()  # sooner than it would
        yield limiters


async def admitted(limiters: list[SharedLimits], requests: int, limits: KeyLimits = LIMITS, key: str = "a") -> int:
    """How many of so many requests, spread over the gateways, pass."""
    tries = [limiters[turn % len(limiters)].admit(key, limits, 1) for turn in range(requests)]
    return sum(decision.allowed for decision, _ in await asyncio.gather(*tries))


async def timed(limiter: SharedLimits, limits: KeyLimits = LIMITS) -> tuple[float, Decision, Reservation]:
    began = monotonic()
    decision, reservation = await limiter.admit("timed", limits, 1)
    return monotonic() - began, decision, reservation


async def all_shared(limiters: list[SharedLimits]) -> None:
    await eventually(lambda: all(limiter.is_shared for limiter in limiters), within=5)


async def test_gateways_give_away_one_limit_together(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is tested is what Redis decides, however busy the machine is.
    monkeypatch.setattr(limits_shared, "_DEADLINE_SECONDS", 1.0)
    async with gateways(redis, 3) as limiters:
        # Some at a time: three gateways in one process would be slower than Redis, and take it for slow.
        passed = sum([await admitted(limiters, 30) for _ in range(10)])
        # On a busy machine a gateway may take Redis for slow, and go by its own part for a moment.
        assert 80 <= passed <= 120


async def test_tokens_that_were_not_used_come_back_to_every_gateway(redis: RedisServer) -> None:
    limits = KeyLimits(tpm=1000)
    async with gateways(redis, 2) as (one, two):
        _, reservation = await one.admit("a", limits, 1000)
        assert not (await two.admit("a", limits, 500))[0].allowed
        one.settle(reservation, 200)
        await asyncio.sleep(0.05)
        decision, _ = await two.admit("a", limits, 500)
        assert decision.allowed
        assert decision.tokens is not None
        assert 300 <= decision.tokens.left <= 305


async def test_requests_at_a_time_are_counted_over_all_gateways(redis: RedisServer) -> None:
    limits = KeyLimits(concurrency=2)
    async with gateways(redis, 2) as (one, two):
        _, first = await one.admit("a", limits, 1)
        await two.admit("a", limits, 1)
        assert (await two.admit("a", limits, 1))[0].which == "concurrency"
        one.settle(first, 1)
        await asyncio.sleep(0.05)
        assert (await two.admit("a", limits, 1))[0].allowed


async def test_a_round_trip_is_shared_by_who_comes_meanwhile(redis: RedisServer) -> None:
    async with gateways(redis, 1) as (one,), Redis.from_url(redis.url) as client:
        await admitted([one], 1)
        before = (await client.info("stats"))["total_commands_processed"]
        await admitted([one], 50, KeyLimits(rpm=1000))
        after = (await client.info("stats"))["total_commands_processed"]
        # Commands that scripts call are counted, too; the point is that nothing is asked twice.
        assert after - before < 50 * 8


@pytest.mark.parametrize("how", ["killed", "paused", "read-only"])
async def test_redis_going_away_under_load_costs_milliseconds_and_at_most_a_fifth_more(
    redis: RedisServer, how: str
) -> None:
    async with gateways(redis, 2) as limiters:
        passed = await admitted(limiters, 40)
        assert redis.process is not None
        pid = redis.process.pid
        await _break(redis, how)
        try:
            slowest = [max([(await timed(limiter))[0] for limiter in limiters]) for _ in range(20)]
            # The first may wait for the deadline; nobody after it.
            assert max(slowest) < 0.02
            assert sorted(slowest)[10] < 0.005
            passed += await admitted(limiters, 300)
            assert 90 <= passed <= 120
        finally:
            await _repair(redis, how, pid)
        await all_shared(limiters)
        # What was given away meanwhile is not given away again.
        assert passed + await admitted(limiters, 300) <= 125


async def _break(redis: RedisServer, how: str) -> None:
    assert redis.process is not None
    if how == "killed":
        redis.kill()
    elif how == "paused":
        redis.process.send_signal(signal.SIGSTOP)
    else:
        async with Redis.from_url(redis.url) as client:
            await client.replicaof("127.0.0.1", 1)


async def _repair(redis: RedisServer, how: str, pid: int) -> None:
    if how == "killed":
        redis.start()
    elif how == "paused":
        os.kill(pid, signal.SIGCONT)
    else:
        async with Redis.from_url(redis.url) as client:
            await client.replicaof("NO", "ONE")


async def test_what_redis_forgot_is_set_there_again(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is tested is what Redis decides, however busy the machine is.
    monkeypatch.setattr(limits_shared, "_DEADLINE_SECONDS", 1.0)
    async with gateways(redis, 2) as limiters, Redis.from_url(redis.url) as client:
        assert 80 <= await admitted(limiters, 100) <= 100
        await client.flushall()
        passed = await admitted(limiters, 2)
        await asyncio.sleep(0.1)
        assert passed + await admitted(limiters, 200) <= 40


async def test_a_dead_gateway_s_running_requests_count_no_longer_than_it_is_missed(redis: RedisServer) -> None:
    limits = KeyLimits(concurrency=1)
    async with gateways(redis, 1) as (one,):
        async with gateways(redis, 1) as (dead,):
            assert (await dead.admit("a", limits, 1))[0].allowed
        assert not (await one.admit("a", limits, 1))[0].allowed
        async with Redis.from_url(redis.url) as client:
            # As if ten seconds had passed since it was last heard of.
            await client.zadd("tokenloom:gateways", {dead._name: 0})
        assert (await one.admit("a", limits, 1))[0].allowed


async def test_a_gateway_that_never_reached_redis_gives_away_its_part() -> None:
    limiter = SharedLimits("redis://127.0.0.1:1/0", "gateway", replicas=4)
    task = asyncio.create_task(limiter.run())
    assert await admitted([limiter], 100) == 25
    task.cancel()
    await asyncio.wait([task])


async def commands(redis: RedisServer) -> int:
    async with Redis.from_url(redis.url) as client:
        return int((await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0))


async def refused(limiter: SharedLimits, limits: KeyLimits, key: str = "a") -> Decision:
    """Asks until Redis has refused; by itself a gateway decides only while it takes Redis for slow."""
    while True:
        decision, reservation = await limiter.admit(key, limits, 1)
        if reservation.is_shared and not decision.allowed:
            return decision
        await asyncio.sleep(0.01)


async def test_a_gateway_that_heard_of_a_refusal_says_so_itself_until_it_may_end(redis: RedisServer) -> None:
    limits = KeyLimits(rpm=30)
    async with gateways(redis, 2) as (one, two):
        while await admitted([one], 1, limits):
            pass
        # The other one has heard nothing yet.
        assert two.refusal("a", limits) is None
        heard = await refused(two, limits)
        before = await commands(redis)
        told = [two.refusal("a", limits) for _ in range(100)]
        assert await commands(redis) == before
        assert {each.which for each in told if each is not None} == {"requests"}
        assert all(each is not None and each.wait_seconds <= heard.wait_seconds for each in told)
        # Under other limits it is for Redis to say, and of other keys it was not about.
        assert two.refusal("a", KeyLimits(rpm=31)) is None
        assert two.refusal("b", limits) is None
        await eventually(lambda: two.refusal("a", limits) is None, within=5)
        await all_shared([one, two])
        assert await eventually_admitted(two, limits)


async def eventually_admitted(limiter: SharedLimits, limits: KeyLimits) -> bool:
    async with asyncio.timeout(10):
        while not (await limiter.admit("a", limits, 1))[0].allowed:
            await asyncio.sleep(0.05)
    return True


async def test_what_may_come_free_at_any_time_is_asked_for_each_time(redis: RedisServer) -> None:
    async with gateways(redis, 2) as (one, two):
        for key, limits in (("places", KeyLimits(concurrency=1)), ("tokens", KeyLimits(tpm=1))):
            _, reservation = await one.admit(key, limits, 1)
            await refused(two, limits, key)
            assert two.refusal(key, limits) is None
            one.settle(reservation, 0)
            async with asyncio.timeout(5):
                while not (await two.admit(key, limits, 1))[0].allowed:
                    await asyncio.sleep(0.01)


async def test_what_redis_has_said_is_forgotten_when_it_goes_away(redis: RedisServer) -> None:
    limits = KeyLimits(rpm=1)
    async with gateways(redis, 1) as (one,):
        await refused(one, limits)
        assert one.refusal("a", limits) is not None
        redis.kill()
        await one.admit("b", KeyLimits(rpm=5), 1)
        await eventually(lambda: not one.is_shared, within=5)
        assert not one._standing
