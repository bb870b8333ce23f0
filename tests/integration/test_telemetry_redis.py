"""GPU readings in a real Redis, and Redis being away."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from tokenloom.telemetry.v1 import telemetry_pb2 as pb
from tokenloom.telemetry.v1 import telemetry_pb2_grpc

from services.common.rpc import channel
from tests.support.nvml.agent import TelemetryAgent, telemetry_agent
from tests.support.nvml.stub import L40, RTX_4090, NvmlStub
from tests.support.redis import RedisServer, redis_server
from tests.support.waiting import wait_until

AWAY = "redis is away; GPU readings are not published"
BACK = "redis is back"
STREAM = "tokenloom:gpu:samples"


@pytest.fixture
def stub(tmp_path: Path) -> NvmlStub:
    stub = NvmlStub(tmp_path)
    stub.show([replace(L40, processes="12:4096 13:-", clock_reasons=0x44), RTX_4090])
    return stub


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def agent(tmp_path: Path, stub: NvmlStub, server: RedisServer) -> Iterator[TelemetryAgent]:
    with telemetry_agent(tmp_path, environment=stub.environment, redis_url=server.url) as agent:
        yield agent


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Any]:
    with Redis.from_url(server.url, decode_responses=True) as client:
        yield client


def failures(agent: TelemetryAgent) -> float:
    prefix = "tokenloom_telemetry_publish_failures_total "
    lines = httpx.get(agent.metrics_url).text.splitlines()
    return float(next(line for line in lines if line.startswith(prefix)).removeprefix(prefix))


async def sample_time(agent: TelemetryAgent) -> float:
    async with channel(agent.target) as connection:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(connection)
        fleet = await stub.ListGpus(pb.ListGpusRequest(), timeout=5)
        return float(fleet.gpus[0].sample_time.ToNanoseconds()) / 1e9


@pytest.mark.usefixtures("agent")
def test_a_hash_holds_the_latest_reading_for_a_few_seconds(redis: Any) -> None:
    wait_until(lambda: redis.exists("tokenloom:gpu:GPU-l40") == 1, within=5)

    values = redis.hgetall("tokenloom:gpu:GPU-l40")
    assert 4000 < redis.pttl("tokenloom:gpu:GPU-l40") <= 5000
    assert float(values.pop("sample_time")) > 1.7e9
    assert values == {
        "uuid": "GPU-l40",
        "index": "0",
        "name": "NVIDIA L40",
        "node": "node-1",
        "health": "degraded",
        "health_reason": "throttled by hw_thermal_slowdown",
        "utilization_percent": "10",
        "memory_utilization_percent": "5",
        "memory_used_bytes": str(1 << 30),
        "memory_total_bytes": str(45 << 30),
        "temperature_celsius": "40",
        "power_watts": "60.5",
        "power_limit_watts": "300.0",
        "sm_clock_mhz": "1500",
        "memory_clock_mhz": "9001",
        "uncorrected_ecc_error_count": "0",
        "throttle_reasons": "sw_power_cap,hw_thermal_slowdown",
        "processes": "[[12, 4096], [13, null]]",
    }
    assert "uncorrected_ecc_error_count" not in redis.hgetall("tokenloom:gpu:GPU-4090")


@pytest.mark.usefixtures("agent")
def test_a_field_that_is_not_reported_any_more_leaves_the_hash(redis: Any, stub: NvmlStub) -> None:
    wait_until(lambda: redis.hexists("tokenloom:gpu:GPU-4090", "power_watts"), within=5)

    stub.show([replace(RTX_4090, power_mw=None)])

    wait_until(lambda: not redis.hexists("tokenloom:gpu:GPU-4090", "power_watts"), within=5)
    assert redis.hget("tokenloom:gpu:GPU-4090", "temperature_celsius") == "40"


@pytest.mark.usefixtures("agent")
def test_the_stream_has_every_sample_in_order(redis: Any) -> None:
    wait_until(lambda: redis.xlen(STREAM) >= 8, within=5)

    entries = [values for _, values in redis.xrange(STREAM)]
    times = [float(values["sample_time"]) for values in entries if values["uuid"] == "GPU-l40"]
    assert times == sorted(set(times))
    assert {values["uuid"] for values in entries} == {"GPU-l40", "GPU-4090"}


async def test_redis_may_be_killed_and_come_back(agent: TelemetryAgent, server: RedisServer, redis: Any) -> None:
    wait_until(lambda: redis.xlen(STREAM) > 0, within=5)

    server.kill()
    wait_until(lambda: failures(agent) >= 3, within=5)
    before = await sample_time(agent)
    wait_until(lambda: failures(agent) >= 5, within=5)
    assert await sample_time(agent) > before
    assert (agent.logged(AWAY), agent.logged(BACK)) == (1, 0)

    server.start()
    wait_until(lambda: agent.logged(BACK) == 1, within=5)
    with Redis.from_url(server.url, decode_responses=True) as fresh:
        wait_until(lambda: fresh.exists("tokenloom:gpu:GPU-l40") == 1, within=5)
    assert agent.logged(AWAY) == 1


async def test_a_redis_that_hangs_delays_no_sample(agent: TelemetryAgent, server: RedisServer, redis: Any) -> None:
    wait_until(lambda: redis.xlen(STREAM) > 0, within=5)
    assert server.process is not None

    server.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: failures(agent) >= 1, within=5)
        before = await sample_time(agent)
        wait_until(lambda: failures(agent) >= 2, within=5)
        # One attempt takes a second, in which there are ten samples.
        assert await sample_time(agent) - before > 0.5
    finally:
        server.process.send_signal(signal.SIGCONT)

    wait_until(lambda: agent.logged(BACK) == 1, within=5)
    length = redis.xlen(STREAM)
    wait_until(lambda: redis.xlen(STREAM) > length, within=5)


async def test_an_agent_starts_without_its_redis(tmp_path: Path, stub: NvmlStub, server: RedisServer) -> None:
    server.kill()
    with telemetry_agent(tmp_path, environment=stub.environment, redis_url=server.url) as agent:
        assert await sample_time(agent) > 0
        wait_until(lambda: failures(agent) >= 1, within=5)
        assert agent.logged(AWAY) == 1


def test_a_bad_redis_url_ends_the_process_with_the_key_and_without_the_password(tmp_path: Path) -> None:
    config = tmp_path / "telemetry.json"
    settings = {"name": "telemetry", "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0"}
    config.write_text(json.dumps({**settings, "redis_url": "http://:secret@127.0.0.1"}))

    ended = subprocess.run(
        [sys.executable, "-m", "services.telemetry", "--config", str(config)],
        env=os.environ,
        capture_output=True,
        timeout=30,
        check=False,
    )

    assert ended.returncode == 2
    assert ended.stderr.startswith(b"redis_url: ")
    assert b"secret" not in ended.stderr + ended.stdout
