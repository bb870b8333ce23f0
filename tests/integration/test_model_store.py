"""Models in S3: what a worker fetches before its engine starts, and what is said of one that can't be had."""

import asyncio
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.config import ConfigError
from services.common.object_store import StoreAwayError
from services.inference.__main__ import main as run_worker
from services.inference.model_fetch import fetch_model, with_local_model
from services.mesh.__main__ import main
from tests.support.commands import command
from tests.support.demo_model import demo_model
from tests.support.engine_process import worker_settings
from tests.support.object_server import ObjectServer, object_server

URL = "s3://models/team/demo"
Usage = namedtuple("Usage", "total used free")  # as shutil has it
pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with object_server(tmp_path_factory.mktemp("store")) as server:
        server.make_bucket("models")
        server.put_folder("models", "team/demo", demo_model())
        server.put("models", "team/demo/pytorch_model.bin", b"the same weights once more")
        server.put("models", "team/no-model/readme.txt", b"nothing here")
        yield server


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


async def test_a_model_is_fetched_once_by_all_workers_and_is_what_was_put_there(
    tmp_path: Path,
) -> None:
    settings = worker_settings(URL, model_cache=str(tmp_path))
    first, second = await asyncio.gather(with_local_model(settings), with_local_model(settings))
    assert first.model.path is not None
    folder = Path(first.model.path)
    assert files(folder) == files(demo_model())
    kept = (folder / "model.safetensors").stat()
    again = await with_local_model(settings)
    assert first == second == again
    assert (folder / "model.safetensors").stat() == kept


async def test_a_fetch_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    folder = await fetch_model(URL, str(tmp_path))
    content = (folder / "model.safetensors").read_bytes()
    partial = folder.rename(folder.with_suffix(".partial"))
    # What is there is not asked for again, so these are in the file afterwards.
    (partial / "model.safetensors").unlink()
    (partial / "model.safetensors.part").write_bytes(b"x" * 1000)
    (partial / "config.json").write_bytes(b"kept")
    assert await fetch_model(URL, str(tmp_path)) == folder
    assert (folder / "model.safetensors").read_bytes() == b"x" * 1000 + content[1000:]
    assert (folder / "config.json").read_bytes() == b"kept"


async def test_another_version_in_the_store_is_another_folder_and_the_last_one_serves_while_the_store_is_away(
    store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("models", "team/changing/config.json", b"{}")
    url = "s3://models/team/changing/"
    first = await fetch_model(url, str(tmp_path))
    store.put("models", "team/changing/config.json", b'{"new": 1}')
    second = await fetch_model(url, str(tmp_path))
    assert second != first
    assert (first / "config.json").read_bytes() == b"{}"
    assert (second / "config.json").read_bytes() == b'{"new": 1}'
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert await fetch_model(url, str(tmp_path)) == second
    with pytest.raises(StoreAwayError, match="can't be reached"):
        await fetch_model(URL, str(tmp_path))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nowhere/team/demo", "there is no bucket 'nowhere'"),
        ("s3://models/team/other", "the bucket 'models' has nothing below that path"),
        ("s3://models/team/no-model", "there is no config.json, but readme.txt"),
    ],
)
async def test_what_is_no_model_is_named(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        await fetch_model(url, str(tmp_path))
    assert url in str(caught.value)


async def test_who_may_not_read_is_told_which_variables_say_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(ConfigError, match="refused with 403: see AWS_ACCESS_KEY_ID"):
        await fetch_model(URL, str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: expected http://HOST:PORT"):
        await fetch_model(URL, str(tmp_path))


async def test_a_disk_without_room_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10_000, 9_000, 1_000))
    with pytest.raises(ConfigError, match=r"model_cache: .* GiB more, and 0\.00 GiB are free there"):
        await fetch_model(URL, str(tmp_path))
    assert not files(tmp_path).keys() - {"models--team--demo/.lock"}


async def test_a_worker_ends_and_says_what_it_could_not_fetch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = worker_settings("s3://nowhere/team/demo", model_cache=str(tmp_path))
    assert await run_worker(settings, asyncio.Event()) == 2
    assert vars(caplog.records[-1])["cause"] == "s3://nowhere/team/demo: there is no bucket 'nowhere'"


def test_plan_reads_the_headers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", URL, "--gpu-memory", "24GiB", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)["models"][0]
    assert main(["plan", "--model", str(demo_model()), "--gpu-memory", "24GiB", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["models"][0]
    assert {**there, "name": ""} == {**here, "name": ""}
    assert there["parameters"] > 0
    assert main(["plan", "--model", "s3://nowhere/team/demo"]) == 2
    assert "there is no bucket 'nowhere'" in capsys.readouterr().err


def test_a_mesh_yaml_with_a_url_that_is_none_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "mesh.yaml"
    config.write_text(
        "models: [{name: m, path: 's3://only-a-bucket'}]\npools: [{name: p, serves: [m], workers: [{name: w}]}]\n"
    )
    ran = command("plan", "--config", str(config))
    assert ran.returncode == 2
    assert "models[0]: path: expected s3://BUCKET/PATH, got the value 's3://only-a-bucket'" in ran.stderr
