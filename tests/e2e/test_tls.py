"""TLS at the edge, with certificates of clients: who shows one is served, and nobody else hears anything."""

import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import openai
import pytest
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common.http2_frames import PREFACE
from services.inference.sim_text import expected_text, tokenize
from tests.support.bad_inputs import assert_harmless
from tests.support.certificates import Authority, Signed
from tests.support.mesh import Mesh, running_mesh

pytestmark = pytest.mark.beside_others
_CONFIG: Final = """
models: [{name: sim}]
pools:
  - name: default
    serves: [sim]
    workers: [{name: worker-0, engine: sim}, {name: worker-1, engine: sim}]
edge:
  client_timeout_seconds: 2
  tls: {certificate: edge.crt, key: edge.key, client_ca: ca.crt}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "ca")


@pytest.fixture(scope="module")
def client(authority: Authority) -> Signed:
    return authority.signed("client")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Signed:
    """A client with a certificate of somebody else's."""
    return Authority(folder, "other").signed("stranger")


@pytest.fixture(scope="module")
def mesh(folder: Path, authority: Authority) -> Iterator[Mesh]:
    authority.signed("edge")
    config = folder / "mesh.yaml"
    config.write_text(_CONFIG)
    with running_mesh(folder / "state", "--config", str(config)) as running:
        yield running


def _context(authority: Authority, client: Signed | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def test_clients_that_show_their_certificate_are_served_on_both_lanes(
    mesh: Mesh, authority: Authority, client: Signed
) -> None:
    text = expected_text(tokenize("hi"), 5)
    assert mesh.edge.startswith("https://127.0.0.1:")
    with (
        openai.DefaultHttpxClient(verify=_context(authority, client)) as http,
        openai.OpenAI(base_url=f"{mesh.edge}/v1", api_key=mesh.key, http_client=http, max_retries=0) as sdk,
    ):
        chunks = sdk.completions.create(model="sim", prompt="hi", max_tokens=5, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
    credentials = grpc.ssl_channel_credentials(
        authority.certificate.read_bytes(), client.key.read_bytes(), client.certificate.read_bytes()
    )
    with grpc.secure_channel(mesh.edge.removeprefix("https://"), credentials) as channel:
        request = pb.GenerateRequest(model="sim", text="hi", sampling=pb.SamplingParameters(max_tokens=5))
        events = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, metadata=mesh.metadata, timeout=10)
        assert "".join(event.delta.text for event in events) == text


def test_commands_on_this_machine_need_no_certificate(mesh: Mesh) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "services.mesh", "workers", "list", "--state-dir", str(mesh.state_dir)],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert "worker-1" in said.stdout


def _heard(mesh: Mesh, context: ssl.SSLContext | None, said: bytes) -> bytes | str:
    """What a client hears that says something, or the error of its handshake."""
    host, _, port = mesh.edge.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            spoken = connection if context is None else context.wrap_socket(connection, server_hostname=host)
            with spoken:
                spoken.sendall(said)
                # A certificate that is missing is found out about after the client's half of a handshake.
                return b"".join(iter(lambda: spoken.recv(1 << 16), b""))
        except ssl.SSLError as error:
            return str(error)
        except ConnectionResetError:
            return b""


def test_a_handshake_that_is_not_as_it_should_be_fails_and_harms_nobody(
    mesh: Mesh, authority: Authority, client: Signed, stranger: Signed
) -> None:
    # 98
    get = b"GET /healthz HTTP/1.1\r\nhost: edge\r\nconnection: close\r\n\r\n"
    old = _context(authority, client)
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with assert_harmless(Mesh(state_dir=mesh.state_dir, entrance="operators")):
        well = _heard(mesh, _context(authority, client), get)
        assert isinstance(well, bytes)
        assert well.startswith(b"HTTP/1.1 200")
        for plain in (get, PREFACE, b"\x16\x03\x01", b"\x16\x03\x01" + b"\xff" * 1000, b""):
            heard = _heard(mesh, None, plain)
            # An alert of TLS, or nothing at all.
            assert isinstance(heard, bytes)
            assert heard[:1] in (b"", b"\x15"), (plain, heard)
        for wrong in (old, _context(authority, None), _context(authority, stranger)):
            # The error of the handshake, or, where that was overtaken by the end of the connection, nothing.
            heard = _heard(mesh, wrong, get)
            assert isinstance(heard, str) or heard == b"", heard
