"""Which database the commands take that look at a mesh's keys, usage and audit."""

import json
from pathlib import Path

import msgspec
import pytest

from services.common.keystore import KeyStore
from services.mesh.books import SETTINGS_VARIABLE
from services.mesh.compose import compose_file
from services.mesh.config import MeshConfig
from services.mesh.config_file import load_mesh
from services.mesh.k8s import manifests
from services.mesh.k8s_pods import Wishes
from services.mesh.state import State
from tests.support.commands import command

MESH = "models: [{name: sim}]\npools: [{name: p, serves: [sim], workers: [{name: w, engine: sim}]}]\n"


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state")
    made.make()
    return made


def names_in(database: Path) -> list[str]:
    if not database.exists():
        return []
    with KeyStore(database) as store:
        return [record.name for record in store.list()]


def create(state: State, name: str) -> tuple[int, str]:
    ran = command("keys", "create", "--name", name, "--json", "--state-dir", str(state.folder))
    return ran.returncode, ran.stderr


def mesh_with(database: Path, folder: Path) -> MeshConfig:
    (folder / "mesh.yaml").write_text(f"{MESH}gateways: 2\ndatabase_url: sqlite:///{database}\n")
    return load_mesh(folder / "mesh.yaml")


def test_keys_go_where_the_running_mesh_told_its_gateways_whatever_an_earlier_one_left(
    state: State, tmp_path: Path
) -> None:
    now, before = tmp_path / "now.db", tmp_path / "before.db"
    # What an earlier run left: of one gateway, with another database.
    state.config("gateway").write_text(json.dumps({"database": str(before)}))
    with state.lock():
        state.write_database(f"sqlite:///{now}")
        assert create(state, "ada") == (0, "")
    assert (names_in(now), names_in(before), names_in(state.keys)) == (["ada"], [], [])


def test_while_a_mesh_has_not_said_its_database_that_of_the_last_one_is_not_taken(state: State, tmp_path: Path) -> None:
    last = tmp_path / "last.db"
    state.database_file.write_text(json.dumps({"database": str(last), "launcher": 1}))
    with state.lock():
        code, said = create(state, "ada")
    assert code == 1
    assert "it is starting" in said
    assert not last.exists()


def test_after_a_mesh_its_database_is_taken_and_named_without_its_password(state: State, tmp_path: Path) -> None:
    state.write_database(f"sqlite:///{tmp_path}/last.db")
    code, said = create(state, "ada")
    assert (code, names_in(tmp_path / "last.db")) == (0, ["ada"])
    assert f"no mesh runs in {state.folder}" in said
    state.write_database("postgresql://me:secret@127.0.0.1:1/none?connect_timeout=1")
    assert "secret" not in command("doctor", "--no-requests", "--json", "--state-dir", str(state.folder)).stdout


def test_a_key_may_be_made_before_a_mesh_runs_in_the_folder_that_is_named(state: State, tmp_path: Path) -> None:
    new = State(tmp_path / "new")
    returned, said = create(new, "ada")
    assert returned == 0
    assert f"no mesh has run in {new.folder} yet; one takes this from {new.keys}" in said
    assert names_in(new.keys) == ["ada"]
    # Where one has run, its database is known.
    state.write_database(str(tmp_path / "last.db"))
    assert create(state, "eve")[0] == 0
    assert (names_in(tmp_path / "last.db"), names_in(state.keys)) == (["eve"], [])


def test_a_key_for_no_mesh_that_is_named_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("keys", "create", "--name", "ada")
    assert (ran.returncode, list(tmp_path.iterdir())) == (1, [])
    assert "nothing says where its keys are" in ran.stderr


@pytest.mark.parametrize("arguments", [("keys", "list"), ("usage",), ("audit",)])
def test_where_nothing_says_which_database_it_is_there_is_an_error_and_none_is_made(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    ran = command(*arguments, "--state-dir", str(tmp_path / "nowhere"))
    assert ran.returncode == 1
    assert "nothing says where its keys are" in ran.stderr
    assert SETTINGS_VARIABLE in ran.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_is_said_before_the_action_is_the_one_that_counts(state: State, tmp_path: Path) -> None:
    own = State(tmp_path / "own")
    for each in (state, own):
        each.make()
        each.write_database(str(each.keys))
        assert create(each, each.folder.name)[0] == 0
    listed = command("keys", "--json", "--state-dir", str(own.folder), "list")
    assert [key["name"] for key in json.loads(listed.stdout)] == ["own"]
    erased = command("usage", "--state-dir", str(own.folder), "erase", "--tenant", "own")
    assert str(own.keys) in erased.stderr


def test_in_a_composed_gateway_it_is_the_gateways_own(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "shared.db"
    composed = compose_file(mesh_with(database, tmp_path))
    for name in ("gateway-0", "gateway-1"):
        service = composed["services"][name]
        file = dict(each.split("=") for each in service["environment"])[SETTINGS_VARIABLE]
        [config] = [one["source"] for one in service["configs"] if one["target"] == file]
        settings = tmp_path / f"{name}.json"
        settings.write_text(composed["configs"][config]["content"].replace("$$", "$"))
        monkeypatch.setenv(SETTINGS_VARIABLE, str(settings))
        assert create(state, name) == (0, "")
    assert names_in(database) == ["gateway-0", "gateway-1"]
    assert not any("environment" in composed["services"][name] for name in ("router", "w"))


def test_in_a_gateways_pod_it_is_the_gateways_own(tmp_path: Path) -> None:
    made = manifests(mesh_with(tmp_path / "shared.db", tmp_path), Wishes())
    settings = next(each for each in made if each["kind"] == "Secret")["stringData"]
    [pod] = [each for each in made if each["kind"] == "StatefulSet" and each["metadata"]["name"] == "gateway-1"]
    [container] = pod["spec"]["template"]["spec"]["containers"]
    [said] = [each["value"] for each in container["env"] if each["name"] == SETTINGS_VARIABLE]
    assert said in container["command"]
    assert json.loads(settings[Path(said).name])["database"] == f"sqlite:///{tmp_path}/shared.db"


def test_two_that_say_it_and_a_file_that_does_not_are_errors(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.json"
    monkeypatch.setenv(SETTINGS_VARIABLE, str(settings))
    for text in ("[]", "{}", '{"database": ""}', "{"):
        settings.write_text(text)
        code, said = create(state, "ada")
        assert code == 2
        assert str(settings) in said
    settings.write_text(msgspec.json.encode({"database": str(tmp_path / "own.db")}).decode())
    with state.lock():
        state.write_database(str(state.keys))
        code, said = create(state, "ada")
    assert code == 1
    assert SETTINGS_VARIABLE in said
    assert names_in(state.keys) == names_in(tmp_path / "own.db") == []
