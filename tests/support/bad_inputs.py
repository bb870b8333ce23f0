"""Bad requests as rows of tables, the wire that sends them as they are, and the watch over everybody else."""

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any

import httpx
import psutil

from services.inference.sim_text import expected_text, tokenize
from tests.support.mesh import Mesh
from tests.support.waiting import wait_until

__all__ = ["Answer", "Asked", "Bad", "Wire", "ask_all", "assert_answered", "assert_harmless", "stream_text"]

_CHAT = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
_COMPLETION = {"model": "sim", "prompt": "hi", "max_tokens": 1}
_LONGEST_SECONDS = 1.0
_MOST_GROWTH_BYTES = 64 << 20
_BYSTANDER_TOKENS = 80
_EXPOSED = ("envoy", "gateway", "router")
_RUNNING = "tokenloom_inference_requests_running"
_BEGUN = "tokenloom_inference_time_to_first_token_seconds_count"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A request, and how it has to be answered."""

    number: int
    """Which kind of bad input it is; kinds are numbered through, over all tables."""
    status: int | tuple[int, ...] = 400
    code: str | None = None
    param: str | None = None
    path: str = "/v1/chat/completions"
    method: str = "POST"
    fields: dict[str, Any] = field(default_factory=dict)
    """What is added to, or, where it is `...`, left out of, a good request for that path."""
    content: bytes | None = None
    """The body, where it is not JSON made of `fields`."""
    headers: dict[str, str] = field(default_factory=dict)
    """Beside the key's and the content type's; "" leaves one of those out."""
    raw: bytes | None = None
    """All of the request as it is sent, headers and all; `%KEY%` stands for the key."""
    is_web: bool = False
    """Whether it is gRPC-Web, whose errors have no body."""
    by_worker: bool = False
    """Whether it takes a worker, which knows the model's tokens, to find it bad; its engine is not asked even so."""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        shown = self.raw or self.content or json.dumps({key: repr(value) for key, value in self.fields.items()})
        return f"{self.number}: {self.method} {self.path} {shown[:100]!r} {str(self.headers)[:100]}"

    def encoded(self, key: str) -> bytes:
        """The request as it is sent."""
        if self.raw is not None:
            return self.raw.replace(b"%KEY%", key.encode())
        content = body_of(self.path, self.fields) if self.content is None else self.content
        headers = {
            "host": "edge",
            "authorization": f"Bearer {key}",
            "content-type": "application/json",
            "content-length": str(len(content)),
            **self.headers,
        }
        lines = [
            f"{self.method} {self.path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items() if value),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes
    seconds: float


def body_of(path: str, fields: dict[str, Any]) -> bytes:
    """A good request's body with fields changed."""
    good = _COMPLETION if path == "/v1/completions" else _CHAT
    return json.dumps({name: value for name, value in {**good, **fields}.items() if value is not ...}).encode()


class Wire:
    """One connection to the edge, used again for as long as its answers allow it."""

    def __init__(self, mesh: Mesh) -> None:
        host, _, port = mesh.edge_target.rpartition(":")
        self._address = (host, int(port))
        self._key = mesh.key
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Closes the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, bad: Bad) -> Answer:
        """Sends a request and reads the answer.

        Raises:
            OSError: no answer, or nothing for five seconds.
            HTTPException: what came is not HTTP.
        """
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=5)
        began = time.monotonic()
        sender = threading.Thread(target=_send, args=(self._socket, bad.encoded(self._key)))
        sender.start()
        try:
            with HTTPResponse(self._socket, method=bad.method) as response:
                response.begin()
                content = response.read()
                seconds = time.monotonic() - began
                headers = {name.lower(): value for name, value in response.headers.items()}
                if response.will_close:
                    self.close()
                sender.join()
                return Answer(status=response.status, headers=headers, content=content, seconds=seconds)
        except BaseException:
            self.close()
            sender.join()
            raise


def _send(to: socket.socket, content: bytes) -> None:
    # Refused before all of it was sent: the answer is there already.
    with suppress(OSError):
        to.sendall(content)


@dataclass(slots=True)
class Asked:
    """What came of bad requests."""

    wrong: list[str] = field(default_factory=list)
    accepted: int = 0
    """How many of them an engine may begin, since they are none that has to be refused."""
    by_worker: int = 0
    """How many a worker refused."""
    may_begin: bool = False
    """Whether engines may have begun any number of them."""
    may_reach: bool = False
    """Whether any number of them may have got as far as a worker, whose engine was not asked."""


@contextmanager
def assert_harmless(mesh: Mesh) -> Iterator[Asked]:
    """Runs the block's bad requests beside a bystander, and fails when anybody is harmed.

    A bystander's streams are whole and right; engines begin nothing but them and what may be accepted; workers refuse
    only what takes a worker; a new request is answered within a second afterwards, and engines are idle after it; the
    processes that clients' bytes go through never take 64 MiB more than before.
    """
    processes = {name: psutil.Process(mesh.process(name)["pid"]) for name in _EXPOSED}
    begun, refused, asked = _sum(mesh, _BEGUN), _refused(mesh), Asked()
    bystander = _Bystander(mesh)
    with _growth_of(processes) as growth, bystander.reading():
        yield asked
    began = time.monotonic()
    assert stream_text(mesh, "fresh", 1) == expected_text(tokenize("fresh"), 1)
    seconds = time.monotonic() - began
    assert not asked.wrong, "\n".join(["", *asked.wrong])
    assert seconds < _LONGEST_SECONDS
    assert bystander.texts == [expected_text(tokenize("a bystander"), _BYSTANDER_TOKENS)] * len(bystander.texts)
    assert _settled(lambda: _sum(mesh, _RUNNING), 0) == 0, "running"
    if not asked.may_begin:
        expected = begun + len(bystander.texts) + 1 + asked.accepted
        assert _settled(lambda: _sum(mesh, _BEGUN), expected) == expected, "begun"
    if not (asked.may_begin or asked.may_reach):
        expected = refused + asked.by_worker
        assert _settled(lambda: _refused(mesh), expected) == expected, "refused by workers"
    assert {name: size for name, size in growth().items() if size > _MOST_GROWTH_BYTES} == {}


def _settled(read: Callable[[], float], expected: float) -> float:
    """A figure once it is as expected, or as it is after two seconds."""
    with suppress(TimeoutError):
        wait_until(lambda: read() == expected, within=2)
    return read()


def assert_answered(mesh: Mesh, rows: Sequence[Bad]) -> None:
    """Sends a table's requests, on one connection where they may; fails when an answer is wrong or anybody harmed."""
    with assert_harmless(mesh) as asked:
        ask_all(mesh, rows, asked)


def ask_all(mesh: Mesh, rows: Sequence[Bad], asked: Asked) -> None:
    """Sends a table's requests, and notes what is wrong with the answers."""
    wire = Wire(mesh)
    try:
        for row in rows:
            try:
                answers = [wire.ask(row)]
                while answers[0].seconds > _LONGEST_SECONDS and len(answers) < 3:
                    # The middle one of three: the machine may have had something else to do.
                    answers.append(wire.ask(row))
            except (OSError, HTTPException) as error:
                asked.wrong.append(f"{row.name}: no answer: {error!r}")
                continue
            if row.method == "POST":
                asked.accepted += sum(answer.status == 200 for answer in answers)
            asked.by_worker += row.by_worker * len(answers)
            if problem := _problem(row, answers):
                asked.wrong.append(f"{row.name}: {problem}: {answers[0].status} {answers[0].content[:300]!r}")
    finally:
        wire.close()


def _problem(row: Bad, answers: Sequence[Answer]) -> str:
    answer = answers[0]
    statuses = (row.status,) if isinstance(row.status, int) else row.status
    if (seconds := statistics.median(answer.seconds for answer in answers)) > _LONGEST_SECONDS:
        return f"took {seconds:.2f} s"
    if answer.status not in statuses:
        return f"expected {row.status}"
    if row.is_web:
        return "" if answer.headers.get("grpc-status", "0") != "0" else f"headers {answer.headers}"
    return "" if answer.status < 400 else _problem_of_error(row, answer)


def _problem_of_error(row: Bad, answer: Answer) -> str:
    # What can't be read is refused before there is a request that could have an id, and its connection is closed.
    unread = answer.status in (400, 431) and answer.headers.get("connection") == "close"
    if answer.headers.get("content-type") != "application/json" or not (unread or answer.headers.get("x-request-id")):
        return f"headers {answer.headers}"
    body = json.loads(answer.content)
    if body.keys() != {"error"} or body["error"].keys() != {"message", "type", "param", "code"}:
        return "not the one body of errors"
    error = body["error"]
    if (error["code"], error["param"]) != (row.code, row.param):
        return f"expected {row.code}, {row.param}"
    # Of a prompt that is too long the message speaks as "the prompt".
    if row.param is not None and row.code != "context_length_exceeded" and row.param not in error["message"]:
        return "its message does not name the field"
    return "an address in it" if "127.0.0.1" in error["message"] else ""


class _Bystander:
    """A client whose greedy streams run all the while."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stopped = threading.Event()
        self.texts: list[str] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reads one stream after the other until the block is left, and the last one to its end."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def _run(self) -> None:
        while not self.texts or not self._stopped.is_set():
            self.texts.append(stream_text(self._mesh, "a bystander", _BYSTANDER_TOKENS))


def stream_text(mesh: Mesh, prompt: str, tokens: int) -> str:
    """The text of a greedy stream; what breaks it is a part of the text."""
    body = {
        "model": "sim",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        with httpx.stream("POST", f"{mesh.edge}/v1/completions", json=body, headers=mesh.headers, timeout=20) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    except httpx.HTTPError as error:
        return repr(error)
    if lines[-1:] != ["[DONE]"]:
        return f"ended with {lines[-1:]}"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


@contextmanager
def _growth_of(processes: dict[str, psutil.Process]) -> Iterator[Callable[[], dict[str, int]]]:
    """Yields what tells, after the block, by how many bytes each process's memory grew in it at most."""
    first = {name: process.memory_info().rss for name, process in processes.items()}
    most = dict(first)
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.05):
            for name, process in processes.items():
                most[name] = max(most[name], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: {name: size - first[name] for name, size in most.items()}
    finally:
        stopped.set()
        watcher.join()


def _sum(mesh: Mesh, name: str) -> float:
    return sum(mesh.metric(f"worker-{index}", name) for index in range(2))


def _refused(mesh: Mesh) -> float:
    """Requests that workers refused so far, their engines unasked."""
    return _sum(mesh, "tokenloom_inference_requests_total") - _sum(mesh, _BEGUN)
