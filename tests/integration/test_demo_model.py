"""The model that the mesh makes itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from services.inference.demo_model import make_demo_model
from tests.support.demo_model import demo_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The model's tokenizer, as anything from Hugging Face reads it."""
    return AutoTokenizer.from_pretrained(str(demo_model()))


def render(tokenizer: Any, *messages: dict[str, str | None]) -> str:
    """A conversation, up to where the assistant is to speak."""
    rendered: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return rendered


def test_the_command_makes_a_model_and_says_nothing_on_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.inference.demo_model", str(tmp_path / "deep" / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    assert "tokenizer" in done.stderr
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["demo"]


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    made = make_demo_model(tmp_path / "demo")
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    make_demo_model(made)
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_every_machine_makes_the_same_model(tmp_path: Path) -> None:
    made = make_demo_model(tmp_path / "demo")
    for path in demo_model().iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes()


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a model made here"):
        make_demo_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unwritable_place_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "services.inference.demo_model", str(tmp_path / "file" / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_every_token_id_of_the_model_has_a_text(tokenizer: Any) -> None:
    config = json.loads((demo_model() / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]


@pytest.mark.parametrize("text", ["Hello there, world!", "größe 日本 🙂", "\x00\n\t  ", ""])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_conversation_is_rendered_as_chatml(tokenizer: Any) -> None:
    rendered = render(
        tokenizer,
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi", "name": "ada"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42"},
    )
    assert rendered == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user name=ada\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_developer_speaks_as_the_system(tokenizer: Any) -> None:
    assert render(tokenizer, {"role": "developer", "content": "x"}) == render(
        tokenizer, {"role": "system", "content": "x"}
    )
