"""LoRA adapters that may not be taken, or don't fit: found out from their files, before an engine sees them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.common.errors import MeshError, Reason
from services.common.safetensors_header import HeaderError
from services.inference.adapters import BaseModel, check_adapter, check_adapter_name, read_base_model
from tests.support.adapters import adapter_tensors, make_adapter, write_safetensors
from tests.support.demo_model import demo_model

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    """The demo model."""
    return read_base_model(demo_model(), names=["demo", "/models/Other-Name/"], max_rank=16)


def refusal(path: str, directory: Path, base: BaseModel) -> str:
    """Why an adapter is refused."""
    with pytest.raises(MeshError) as caught:
        check_adapter(path, directory, base)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_REQUEST, "path")
    assert caught.value.message.startswith("path: ")
    return caught.value.message


def zeros(*shape: int) -> Any:
    """A tensor."""
    return np.zeros(shape, np.float32)


def test_an_adapter_that_fits_is_taken_by_a_relative_or_an_absolute_path(tmp_path: Path, base: BaseModel) -> None:
    folder = make_adapter(tmp_path / "team" / "poet")
    for path in ("team/poet", str(folder), "team/../team/./poet"):
        found, config = check_adapter(path, tmp_path, base)
        assert (found, config["r"]) == (folder.resolve(), 8)


@pytest.mark.parametrize(
    "config",
    [
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": ""},
        {"base_model_name_or_path": "org/OTHER-name"},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4.5}},
        {"target_modules": ".*q_proj"},
        {"peft_type": None, "bias": "none", "task_type": "CAUSAL_LM", "something_new": [1]},
    ],
)
def test_what_an_adapter_may_say_of_itself(tmp_path: Path, base: BaseModel, config: dict[str, Any]) -> None:
    make_adapter(tmp_path / "a", config=config)
    check_adapter("a", tmp_path, base)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": None}, "r: must be a positive integer"),
        ({"r": 0}, "r: must be a positive integer"),
        ({"r": -8}, "r: must be a positive integer"),
        ({"r": True}, "r: must be a positive integer"),
        ({"r": "8"}, "r: must be a positive integer"),
        ({"r": 17}, "r: must be at most 16"),
        ({"r": 10**30}, "r: must be at most 16"),
        ({"rank_pattern": {"q_proj": 64}}, "rank_pattern: must be at most 16"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: must be a positive integer"),
        ({"rank_pattern": [8]}, "rank_pattern: must be an object"),
        ({"lora_alpha": None}, "lora_alpha: must be a number"),
        ({"lora_alpha": "16"}, "lora_alpha: must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be a number"),
        ({"alpha_pattern": {"q_proj": []}}, "alpha_pattern: must be a number"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, "base_model_name_or_path: must name the model"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
        ({"r": 4}, "has rank 8, but adapter_config.json says 4"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_its_key(
    tmp_path: Path, base: BaseModel, config: dict[str, Any], said: str
) -> None:
    make_adapter(tmp_path / "a", config=config)
    assert said in refusal("a", tmp_path, base)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q_PROJ}.lora_A.weight": zeros(8, 128)}, "a weight of the shape [64, 128], but this model's has [64, 64]"),
        # Smaller than it should be, it would even load, and say nonsense.
        ({f"{Q_PROJ}.lora_A.weight": zeros(8, 32)}, "a weight of the shape [64, 32]"),
        ({f"{Q_PROJ}.lora_B.weight": zeros(32, 8)}, "a weight of the shape [32, 64]"),
        ({f"{Q_PROJ}.lora_B.weight": zeros(64, 4)}, "lora_A of rank 8 and lora_B of rank 4"),
        ({f"{Q_PROJ}.lora_A.weight": zeros(4, 64), f"{Q_PROJ}.lora_B.weight": zeros(64, 4)}, "has rank 4, but"),
        ({f"{Q_PROJ}.lora_A.weight": zeros(32, 64), f"{Q_PROJ}.lora_B.weight": zeros(64, 32)}, "at most 16"),
        ({f"{Q_PROJ}.lora_A.weight": zeros(8)}, "must have two dimensions"),
        ({f"{Q_PROJ}.lora_A.weight": zeros(0, 64)}, "must have two dimensions"),
        ({f"{Q_PROJ}.lora_A.weight": None}, "has only one of lora_A and lora_B"),
        ({f"{Q_PROJ}.weight": zeros(64, 64)}, "which is no LoRA weight"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": zeros(64)}, "which is no LoRA"),
        (
            {
                "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": zeros(8, 64),
                "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": zeros(64, 8),
            },
            "this model has no module",
        ),
        (
            {
                "base_model.model.model.layers.0.self_attn.qkv.lora_A.weight": zeros(8, 64),
                "base_model.model.model.layers.0.self_attn.qkv.lora_B.weight": zeros(64, 8),
            },
            "this model has no module",
        ),
        (
            {
                "base_model.model.model.norm.lora_A.weight": zeros(8, 64),
                "base_model.model.model.norm.lora_B.weight": zeros(64, 8),
            },
            "but this model's has [64]",
        ),
        (dict.fromkeys(adapter_tensors()), "has no LoRA weights"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_by_module(
    tmp_path: Path, base: BaseModel, tensors: dict[str, Any], said: str
) -> None:
    make_adapter(tmp_path / "a", tensors=tensors)
    assert said in refusal("a", tmp_path, base)


def test_weights_are_found_under_other_prefixes_and_embeddings_are_turned(tmp_path: Path, base: BaseModel) -> None:
    other = dict.fromkeys(adapter_tensors()) | {
        "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_A.weight": zeros(8, 64),
        "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_B.weight": zeros(128, 8),
        "base_model.model.model.embed_tokens.lora_embedding_A": zeros(8, 2048),
        "base_model.model.model.embed_tokens.lora_embedding_B": zeros(64, 8),
        "base_model.model.model.embed_tokens.base_layer.weight": zeros(2048, 64),
    }
    make_adapter(tmp_path / "a", tensors=other)
    check_adapter("a", tmp_path, base)


def _cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return apply


def _first(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header[f"{Q_PROJ}.lora_A.weight"]
    return found


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "adapter_model.safetensors has"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "no safetensors file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "no safetensors file"),
        (lambda folder: (folder / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"[" * 9), "not JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes((20_000).to_bytes(8, "little") + b"[" * 20_000), "not JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"), "not a JSON object"),
        (_header(lambda header: _first(header).update(shape=[8, -64])), "broken entry"),
        (_header(lambda header: _first(header).update(shape="8x64")), "broken entry"),
        (_header(lambda header: _first(header).update(shape=[2**40, 2**40])), "which its 2048 bytes are not"),
        (_header(lambda header: _first(header).update(data_offsets=[0, 10**18])), "which its"),
        (_header(lambda header: _first(header).update(data_offsets=[2048, 4096])), "overlap"),
        (_header(lambda header: _first(header).update(dtype="I32")), "must be one of BF16, F16, F32, got I32"),
        (_header(lambda header: _first(header).update(dtype="U8")), "which its"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"there is no file {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "adapter_model.bin is a pickle"),
        (lambda folder: (folder / CONFIG).unlink(), f"there is no file {CONFIG}"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not JSON"),
        (lambda folder: (folder / CONFIG).write_text("[" * 20_000), "not JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "must be a JSON object"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda folder: (folder / CONFIG).write_text(" " * (1 << 20) + "{}"), "at most 1048576 bytes"),
        (lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()), f"there is no file {CONFIG}"),
        (_pipe, f"there is no file {WEIGHTS}"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, base: BaseModel, damage: Callable[[Path], Any], said: str) -> None:
    damage(make_adapter(tmp_path / "a"))
    assert said in refusal("a", tmp_path, base)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "is required"),
        (".", "inside the one"),
        ("..", "inside the one"),
        ("../outside", "inside the one"),
        ("/etc", "inside the one"),
        ("a/../../outside", "inside the one"),
        ("nowhere", "no such folder"),
        ("file", "no such folder"),
        ("link", "inside the one"),
        ("loop", ""),
        ("a\0b", "printable"),
        ("a\nb", "printable"),
        ("x" * 5000, "at most 4096"),
        ("x" * 4000, "can't be read"),
        ("linked-weights", "a link to a place outside"),
        ("https://example.com/adapter", "no such folder"),
    ],
)
def test_a_path_outside_the_folder_is_refused_links_resolved(
    tmp_path: Path, base: BaseModel, path: str, said: str
) -> None:
    directory, outside = tmp_path / "inside", make_adapter(tmp_path / "outside")
    make_adapter(directory / "a")
    (directory / "file").write_text("")
    (directory / "link").symlink_to(outside)
    (directory / "loop").symlink_to(directory / "loop")
    linked = make_adapter(directory / "linked-weights")
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(outside / WEIGHTS)
    assert said in refusal(path, directory, base)


def test_a_link_inside_the_folder_is_as_good_as_what_it_leads_to(tmp_path: Path, base: BaseModel) -> None:
    make_adapter(tmp_path / "v2")
    (tmp_path / "current").symlink_to("v2")
    assert check_adapter("current", tmp_path, base)[0] == (tmp_path / "v2").resolve()


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "ä", "x" * 256, "../a"])
def test_a_name_that_could_be_something_else_is_refused(name: str) -> None:
    with pytest.raises(MeshError) as caught:
        check_adapter_name(name)
    assert caught.value.field == "name"


def test_packed_weights_of_the_model_are_known_by_name_alone(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"model.layers.0.q_proj.qweight": zeros(8, 64)})
    base = read_base_model(tmp_path, names=["x"], max_rank=8)
    assert base.shapes == {"model.layers.0.q_proj": None}
    (tmp_path / "more.safetensors").write_bytes(b"broken")
    with pytest.raises(HeaderError):
        read_base_model(tmp_path, names=["x"], max_rank=8)
