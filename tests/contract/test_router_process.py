"""python -m services.router as a process: it starts, says that it serves, and stops when it is asked to."""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.rpc import channel
from tests.support.ports import free_port


async def test_the_process_serves_and_stops_cleanly_with_streams_open(tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "router.json"
    settings = {"name": "router-0", "listen": f"127.0.0.1:{port}", "metrics": "127.0.0.1:0"}
    config.write_text(json.dumps(settings))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.router", "--config", str(config), stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with channel(f"127.0.0.1:{port}") as to_router:
            await asyncio.wait_for(to_router.channel_ready(), 20)
            health = health_pb2_grpc.HealthStub(to_router)
            for service in (
                "",
                "tokenloom.router.v1.RouterService",
                "tokenloom.router.v1.RouterAdminService",
                "envoy.service.ext_proc.v3.ExternalProcessor",
            ):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            session: Any = to_router.stream_stream("/tokenloom.router.v1.RouterService/Session")()
            await session.write(b"")
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            # A session that had only just begun is refused instead: gateways turn to another router either way.
            try:
                assert await asyncio.wait_for(session.read(), 10) is grpc.aio.EOF
            except grpc.aio.AioRpcError as refused:
                assert refused.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # noqa: PT017
            assert await asyncio.wait_for(process.wait(), 10) == 0
            assert time.monotonic() - asked < 3
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_bad_setting_ends_the_process_with_the_name_of_the_key(tmp_path: Path) -> None:
    config = tmp_path / "router.json"
    config.write_text(json.dumps({"name": "r", "listen": "x:1", "metrics": "x:2", "max_waiting": -1}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.router", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"max_waiting" in errors
