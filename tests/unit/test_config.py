"""Configuration files, and what is said of bad ones."""

from pathlib import Path

import pytest

from services.common.config import ConfigError, convert, load
from services.common.settings import TelemetrySettings
from services.common.settings_gateway import GatewaySettings
from services.common.settings_worker import WorkerSettings

PROCESS = {"name": "it", "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0"}
WORKER = {
    **PROCESS,
    "advertise": "127.0.0.1:50061",
    "routers": ["127.0.0.1:50051"],
    "model": {"name": "sim"},
    "engine": "sim",
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sample_seconds": 0.01}, ["sample_seconds", ">= 0.1", "0.01"]),
        ({"sample_seconds": "often"}, ["sample_seconds", "float", "'often'"]),
        ({"listen": "localhost"}, ["listen", "'localhost'"]),
        ({"listen": 50051}, ["listen", "str", "50051"]),
        ({"log_level": "loud"}, ["log_level", "'loud'"]),
        ({"name": "a name"}, ["name", "'a name'"]),
        ({"samples_second": 1}, ["samples_second"]),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_was_expected(change: dict[str, object], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        convert({**PROCESS, **change}, TelemetrySettings, where="telemetry.yaml")

    assert str(refused.value).startswith("telemetry.yaml: ")
    assert [words for words in said if words not in str(refused.value)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"routers": ["127.0.0.1:1", "nowhere"]}, ["routers[1]", "'nowhere'"]),
        ({"model": {"name": ""}}, ["model.name", "''"]),
        ({"sim": {"block_size": 0}}, ["sim.block_size", ">= 1", "0"]),
        ({"sim": []}, ["sim", "array"]),
    ],
)
def test_a_bad_value_deep_inside_is_named_by_its_path(change: dict[str, object], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        convert({**WORKER, **change}, WorkerSettings, where="worker.yaml")

    assert [words for words in said if words not in str(refused.value)] == []


def test_routers_that_do_not_all_say_where_they_take_sessions_are_refused() -> None:
    routers = {"routers": ["127.0.0.1:1", "127.0.0.1:2"], "router_sessions": ["127.0.0.1:3"]}
    with pytest.raises(ConfigError, match="router_sessions: expected one for each of the 2 routers"):
        convert({**PROCESS, "http": "127.0.0.1:0", "database": "keys.db", **routers}, GatewaySettings, where="x")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="listen"):
        convert({"name": "it", "metrics": "127.0.0.1:0"}, TelemetrySettings, where="x")


def test_yaml_and_json_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: it\nlisten: 127.0.0.1:0\nmetrics: 127.0.0.1:0\nsample_seconds: 2\n")
    (tmp_path / "a.json").write_text(
        '{"name": "it", "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "sample_seconds": 2}'
    )

    settings = load(tmp_path / "a.yaml", TelemetrySettings)

    assert settings == load(tmp_path / "a.json", TelemetrySettings)
    assert (settings.sample_seconds, settings.redis_url) == (2.0, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "not YAML"),
        ("", "missing required field"),
        ("just words", "Expected `object`"),
        ("- a\n- list", "Expected `object`"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as refused:
        load(path, GatewaySettings)

    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        load(tmp_path / "nothing.yaml", GatewaySettings)


def test_a_file_of_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")

    with pytest.raises(ConfigError):
        load(path, GatewaySettings)


def test_what_is_known_only_where_it_runs_counts_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.yaml"
    path.write_text("{name: telemetry, listen: '127.0.0.1:0', metrics: '127.0.0.1:0', node: here}")

    settings = load(path, TelemetrySettings, over=["node=7", "name=agent-1"])

    assert (settings.node, settings.name) == ("7", "agent-1")


@pytest.mark.parametrize(("over", "said"), [("node", "--set: expected KEY=TEXT"), ("nodes=a", "unknown field `nodes`")])
def test_what_is_set_must_be_a_key_and_a_text(tmp_path: Path, over: str, said: str) -> None:
    path = tmp_path / "telemetry.yaml"
    path.write_text("{name: telemetry, listen: '127.0.0.1:0', metrics: '127.0.0.1:0'}")

    with pytest.raises(ConfigError, match=said):
        load(path, TelemetrySettings, over=[over])
