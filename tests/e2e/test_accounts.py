"""Limits and the ledger on both lanes of a whole mesh, and what becomes of them when things are killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, redirect_stdout
from io import StringIO
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import status_pb2
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common.database import Database
from services.common.errors import Reason
from services.common.status import DETAILS_KEY, error_from_status
from services.common.tables import COUNTERS, KEYS, USAGE
from services.common.typed_calls import EDGE_ACCOUNT
from services.gateway.journal import read_entries, segments_of
from services.mesh.__main__ import main
from tests.support.mesh import Mesh, running_mesh
from tests.support.waiting import wait_until

pytestmark = pytest.mark.beside_others
SIM = ("--engine", "sim", "--workers", "1", "--sim", "decode_step_ms=10,max_num_seqs=64,max_model_len=4096")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(tmp_path_factory.mktemp("accounts") / "state", *SIM) as running:
        yield running


def tokenloom(mesh: Mesh, *arguments: str) -> str:
    """What a command prints; in this process, which spares the start of another one."""
    with redirect_stdout(StringIO()) as printed:
        assert main([*arguments, "--state-dir", str(mesh.state_dir)]) == 0
    return printed.getvalue()


def make_key(mesh: Mesh, name: str, *options: str) -> str:
    """A key of the command line's, once it works."""
    key = str(json.loads(tokenloom(mesh, "keys", "create", "--name", name, "--json", *options))["key"])
    headers = {"authorization": f"Bearer {key}"}
    wait_until(lambda: httpx.get(f"{mesh.edge}/v1/models", headers=headers).status_code == 200, within=1)
    return key


def rows(mesh: Mesh, tenant: str) -> list[dict[str, Any]]:
    with Database(mesh.state_dir / "keys.db") as database, database.reading() as connection:
        query = USAGE.select().where(USAGE.c.tenant == tenant).order_by(USAGE.c.time)
        return [dict(row) for row in connection.execute(query).mappings()]


def generate(mesh: Mesh, key: str, *, tokens: int = 5, within: float = 10) -> Any:
    channel = grpc.insecure_channel(mesh.edge_target)
    mesh.clients.enter_context(closing(channel))
    request = pb.GenerateRequest(model="sim", text="x" * 40)
    request.sampling.max_tokens, request.sampling.ignore_eos = tokens, True
    metadata = (("authorization", f"Bearer {key}"),)
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=within, metadata=metadata)


def _status(error: Any) -> status_pb2.Status:
    details = next(value for key, value in error.trailing_metadata() if key == DETAILS_KEY)
    return status_pb2.Status.FromString(details)


def rest(mesh: Mesh, key: str, tokens: int = 5) -> httpx.Response:
    body = {"model": "sim", "text": "x" * 40, "sampling": {"max_tokens": tokens, "ignore_eos": True}}
    return httpx.post(f"{mesh.edge}/api/v1/generate", json=body, headers={"authorization": f"Bearer {key}"})


def test_both_forms_of_the_typed_lane_have_rows_that_say_what_they_took(mesh: Mesh) -> None:
    key = make_key(mesh, "typed")
    events = list(generate(mesh, key))
    assert rest(mesh, key).status_code == 200
    wait_until(
        lambda: len(rows(mesh, "typed")) == 2 and all(r["outcome"] == "ok" for r in rows(mesh, "typed")), within=5
    )
    for row in rows(mesh, "typed"):
        assert (row["lane"], row["endpoint"], row["model"], row["worker"]) == ("typed", "generate", "sim", "worker-0")
        assert row["prompt_tokens"] == events[0].started.prompt_token_count
        assert row["output_tokens"] == 5
        assert 0 < row["gpu_seconds"] < 1
        assert 0 < row["ttft_seconds"] < row["duration_seconds"]
        assert len(row["request_id"]) > 8


def test_a_typed_client_that_leaves_pays_for_what_passed(mesh: Mesh) -> None:
    key = make_key(mesh, "typed-left")
    call = generate(mesh, key, tokens=2000)
    for number, _ in enumerate(call):
        if number == 20:
            call.cancel()
            break
    wait_until(lambda: any(row["outcome"] == "client_left" for row in rows(mesh, "typed-left")), within=5)
    (row,) = rows(mesh, "typed-left")
    assert 15 <= row["output_tokens"] <= 60
    assert row["prompt_tokens"] > 0


def test_one_limit_holds_on_both_lanes_and_tells_each_in_its_own_words(mesh: Mesh) -> None:
    key = make_key(mesh, "both", "--rpm", "3")
    list(generate(mesh, key))
    assert rest(mesh, key).headers["x-ratelimit-limit-requests"] == "3"
    body = {"model": "sim", "prompt": "x", "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=headers).status_code == 200
    refused = httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    over_rest = rest(mesh, key)
    assert (over_rest.status_code, over_rest.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(over_rest.headers["retry-after"]) <= 20
    with pytest.raises(grpc.RpcError) as caught:
        list(generate(mesh, key))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_status(_status(caught.value))
    assert error.reason is Reason.RATE_LIMIT_EXCEEDED
    assert error.retry_after_seconds is not None
    assert 0 < error.retry_after_seconds <= 20


def test_typed_tokens_are_settled_when_the_call_is_over(mesh: Mesh) -> None:
    key = make_key(mesh, "typed-tokens", "--tpm", "600", "--concurrency", "1")
    running = generate(mesh, key, tokens=300)
    next(iter(running))
    with pytest.raises(grpc.RpcError) as caught:
        list(generate(mesh, key))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    list(running)
    wait_until(lambda: [row["outcome"] for row in rows(mesh, "typed-tokens")] == ["ok"], within=5)
    list(generate(mesh, key, tokens=10))
    left = rest(mesh, key)
    # 310 tokens and two prompts are gone, some have come back since, and this one has reserved what it may take.
    assert left.status_code == 429 or int(left.headers["x-ratelimit-remaining-tokens"]) < 300


def test_the_command_line_reports_and_erases_usage(mesh: Mesh) -> None:
    key = make_key(mesh, "reported")
    assert rest(mesh, key).status_code == 200
    wait_until(lambda: len(rows(mesh, "reported")) == 1, within=5)
    (line,) = json.loads(tokenloom(mesh, "usage", "--tenant", "reported", "--json"))
    assert (line["requests"], line["output_tokens"], line["model"]) == (1, 5, "sim")
    assert "reported" in tokenloom(mesh, "usage")
    assert tokenloom(mesh, "usage", "erase", "--tenant", "reported").strip() == "1 row of 'reported' is erased"
    assert rows(mesh, "reported") == []
    assert "usage.erase" in tokenloom(mesh, "audit")


def test_a_killed_gateway_loses_no_row(mesh: Mesh) -> None:
    key = make_key(mesh, "killed")
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "sim", "prompt": "x", "max_tokens": 3}
    done = [httpx.post(f"{mesh.edge}/v1/completions", json=body, headers=headers) for _ in range(5)]
    assert all(answer.status_code == 200 for answer in done)
    typed = generate(mesh, key, tokens=150, within=20)
    next(iter(typed))
    cut = subprocess.Popen(
        [sys.executable, "-c", _STREAM, mesh.edge, key], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert cut.stdout is not None
    cut.stdout.readline()
    os.kill(mesh.process("gateway")["pid"], signal.SIGKILL)
    list(typed)  # no gateway stands between it and its worker
    cut.wait(10)
    cut.stdout.close()
    wait_until(lambda: len(rows(mesh, "killed")) == 7, within=20)
    wait_until(
        lambda: sum(row["lane"] == "typed" and row["outcome"] == "ok" for row in rows(mesh, "killed")) == 1,
        within=10,
    )
    found = rows(mesh, "killed")
    assert sorted(row["outcome"] for row in found) == ["lost", *["ok"] * 6]
    assert sorted(row["output_tokens"] for row in found) == [0, 3, 3, 3, 3, 3, 150]
    ids = {answer.headers["x-request-id"] for answer in done}
    assert ids <= {row["request_id"] for row in found}


def over_one_connection(
    mesh: Mesh, key: str, *, tokens: int = 5, forged: Mapping[str, str] | None = None
) -> Callable[[], httpx.Response]:
    """Calls over REST that meet one of the edge's threads, each of which remembers for itself."""
    headers = {"authorization": f"Bearer {key}", **(forged or {})}
    client = mesh.clients.enter_context(httpx.Client(headers=headers, timeout=10))
    body = {"model": "sim", "text": "x" * 40, "sampling": {"max_tokens": tokens, "ignore_eos": True}}
    return lambda: client.post(f"{mesh.edge}/api/v1/generate", json=body)


def test_calls_of_a_remembered_key_have_rows_like_those_that_were_asked_about(mesh: Mesh) -> None:
    forged = {"x-tokenloom-tenant": "forged", "x-tokenloom-key": "forged", "x-tokenloom-account": "gateway.1"}
    ask = over_one_connection(mesh, make_key(mesh, "remembered"), forged=forged)
    ids = [ask().headers["x-request-id"] for _ in range(20)]
    wait_until(lambda: [row["outcome"] for row in rows(mesh, "remembered")] == ["ok"] * 20, within=10)
    found = rows(mesh, "remembered")
    assert {row["request_id"] for row in found} == set(ids)
    by_edge = [row for row in found if EDGE_ACCOUNT in row["id"]]
    assert 0 < len(by_edge) < 20
    same = ("lane", "endpoint", "tenant", "key_id", "model", "worker", "prompt_tokens", "output_tokens", "month")
    assert len({tuple(row[name] for name in same) for row in found}) == 1
    for row in by_edge:
        assert 0 < row["gpu_seconds"] < 1
        assert 0 < row["ttft_seconds"] < row["duration_seconds"]
    assert rows(mesh, "forged") == []


def test_a_key_that_gets_limits_is_held_to_them_although_it_was_remembered(mesh: Mesh) -> None:
    ask = over_one_connection(mesh, make_key(mesh, "limited-later"))
    assert "x-ratelimit-limit-requests" not in ask().headers
    with Database(mesh.state_dir / "keys.db") as database, database.writing() as connection:
        connection.execute(KEYS.update().where(KEYS.c.name == "limited-later").values(rpm=2))
        connection.execute(COUNTERS.update().where(COUNTERS.c.name == "keys").values(value=COUNTERS.c.value + 1))
    wait_until(lambda: ask().status_code == 429, within=5)
    assert ask().headers["x-ratelimit-limit-requests"] == "2"


def test_a_remembered_key_stops_with_its_revocation(mesh: Mesh) -> None:
    made = json.loads(tokenloom(mesh, "keys", "create", "--name", "revoked", "--json"))
    ask = over_one_connection(mesh, str(made["key"]))
    wait_until(lambda: ask().status_code == 200, within=5)
    assert ask().status_code == 200
    tokenloom(mesh, "keys", "revoke", made["id"])
    # Within 1 s, on a machine that has time for it.
    wait_until(lambda: ask().status_code == 401, within=3)
    # And for good: no call of it has made the memory longer.
    assert [ask().status_code for _ in range(5)] == [401] * 5


def test_while_the_gateway_is_away_every_remembered_call_is_kept_account_of(mesh: Mesh) -> None:
    ask = over_one_connection(mesh, make_key(mesh, "gateway-away"), tokens=1)
    assert ask().status_code == 200
    os.kill(mesh.process("gateway")["pid"], signal.SIGKILL)
    done = 1
    while ask().status_code == 200:
        done += 1
    wait_until(lambda: len(rows(mesh, "gateway-away")) >= done, within=30)
    assert [row["outcome"] for row in rows(mesh, "gateway-away")].count("ok") >= done - 1


def test_a_killed_edge_leaves_rows_of_the_remembered_calls_that_were_under_way(mesh: Mesh) -> None:
    wait_until(lambda: httpx.get(f"{mesh.edge}/readyz").status_code == 200, within=30)
    metadata = (("authorization", f"Bearer {make_key(mesh, 'edge-killed')}"),)
    request = pb.GenerateRequest(model="sim", text="x" * 40)
    request.sampling.max_tokens, request.sampling.ignore_eos = 4000, True

    def noted() -> list[str]:
        files = segments_of(mesh.state_dir / "journal-gateway")
        entries = [entry for _, path in files for entry, _ in read_entries(path, 0)]
        return [entry.row.id for entry in entries if entry.row.tenant == "edge-killed" and entry.kind == "open"]

    with grpc.insecure_channel(mesh.edge_target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        running: list[Any] = []
        while sum(EDGE_ACCOUNT in account for account in noted()) < 3:
            assert len(running) < 30
            running.append(stub.Generate(request, timeout=60, metadata=metadata))
            next(iter(running[-1]))
            wait_until(lambda: len(noted()) == len(running), within=10)
        for name in ("envoy", "gateway"):
            os.kill(mesh.process(name)["pid"], signal.SIGKILL)
        for call in running:
            with pytest.raises(grpc.RpcError):
                list(call)
    wait_until(lambda: [row["outcome"] for row in rows(mesh, "edge-killed")] == ["lost"] * len(running), within=30)
    assert sum(EDGE_ACCOUNT in row["id"] for row in rows(mesh, "edge-killed")) == 3


_STREAM = """
import httpx, sys
body = {"model": "sim", "prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True}
with httpx.stream("POST", sys.argv[1] + "/v1/completions", json=body,
                  headers={"authorization": "Bearer " + sys.argv[2]}, timeout=30) as answer:
    for line in answer.iter_lines():
        print(line, flush=True)
"""
