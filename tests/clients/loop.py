"""What the clients in Python have in common: scenarios asked for by lines of JSON, answered by lines of JSON.

A line that asks is {"scenario", "url", "key", "limited_key"}; one that answers {"scenario", "ok", "saw" or "error"}.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

__all__ = [
    "CHAT",
    "NAMED",
    "QUESTION",
    "THINKING",
    "WEATHER",
    "Attempts",
    "Target",
    "WeatherArguments",
    "refusal",
    "serve",
]

QUESTION = "How is the weather?"
CHAT: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]
THINKING: dict[str, Any] = {
    # What the model talks is nonsense otherwise, and never ends to think.
    "structured_outputs": {"grammar": '%llguidance {}\nstart: "Rain, perhaps." </think> "Fine."\n'},
    "chat_template_kwargs": {"thinking": True},
}
WeatherArguments = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather somewhere.", "parameters": WeatherArguments},
}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_weather"}}


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked."""

    url: str
    key: str
    limited_key: str
    """May have one request at a time."""

    @property
    def base_url(self) -> str:
        """Where the OpenAI API is."""
        return f"{self.url}/v1"


@dataclass(slots=True)
class Attempts:
    """The statuses that an SDK got while it tried, when it did, and what is to be done about the first bad one."""

    on_refusal: Callable[[], object] = lambda: None
    statuses: list[int] = field(default_factory=list)
    retry_after: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def client(self) -> httpx.Client:
        """An HTTP client that notes them."""
        return httpx.Client(event_hooks={"response": [self._note]}, timeout=60)

    def _note(self, response: Any) -> None:
        self.statuses.append(response.status_code)
        self.times.append(time.monotonic())
        if response.status_code >= 400:
            self.retry_after.append(response.headers.get("retry-after", ""))
            self.on_refusal()

    def saw(self) -> dict[str, Any]:
        """What happened."""
        waits = [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]
        return {"statuses": self.statuses, "retry_after": self.retry_after, "waits": waits}


def refusal(ask: Callable[[], object]) -> dict[str, Any]:
    """What the SDK's error says that a request ends with."""
    try:
        ask()
    except openai.APIStatusError as error:
        return {
            # A library's own class has the SDK's as its base.
            "class": next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "openai"),
            "status": error.status_code,
            "code": error.code,
            "param": error.param,
            "message": error.message,
            "request_id": bool(error.request_id),
        }
    raise AssertionError("no error")


def serve(scenarios: Mapping[str, Callable[[Target], Any]]) -> None:
    """Runs the scenarios that standard input asks for, until it ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked.pop("scenario")
        try:
            said = {"ok": True, "saw": scenarios[name](Target(**asked))}
        except Exception:  # noqa: BLE001  # whatever it is, the one who asked is told
            said = {"ok": False, "error": traceback.format_exc()}
        sys.stdout.write(json.dumps({"scenario": name, **said}) + "\n")
        sys.stdout.flush()
