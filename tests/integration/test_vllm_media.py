"""Images before the real engine, as vLLM's own server takes them, and what it refuses without harm to anybody."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from services.common.errors import MeshError, Reason
from services.inference.engine import Capability, ChatMessage, Generation, Media, Sampling
from services.inference.vllm_engine import VllmEngine, prepare_process
from tests.support.engine_process import generate, worker_settings
from tests.support.media_models import IMAGE_TOKENS, image_model
from tests.support.sinks import Kept
from tests.support.vllm_server import VllmServer, vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

# Long enough for whole blocks of the prefix cache to be behind the picture.
QUESTION = "Say what there is to be seen in the picture, in as many simple words as you need, and then once more." * 2
IMAGES_AT_MOST = 2
FIELD = "chat.messages[0].parts[1].image"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """vLLM's own server on the same model, which starts while other tests run."""
    with vllm_server(tmp_path_factory.mktemp("server"), model=image_model()) as starting:
        yield starting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(server: VllmServer) -> AsyncIterator[VllmEngine]:
    """One engine for all the tests."""
    assert server
    environment = dict(os.environ)
    limits = {"limit_mm_per_prompt": {"image": IMAGES_AT_MOST}, "max_num_seqs": 8}
    settings = worker_settings(str(image_model()), engine_args=limits)
    prepare_process(settings)
    async with VllmEngine(settings) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)


def picture(seed: int, kind: str = "PNG") -> bytes:
    """Noise, which is another one for each seed."""
    to = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(to, kind)
    return to.getvalue()


def asked(name: str, *pictures: bytes, emitted: list[int] | None = None, **sampling: Any) -> Generation:
    """A greedy generation about pictures that no end-of-sequence token ends."""
    media = [Media(kind="image", mime_type="image/png", content=content) for content in pictures]
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24} | sampling
    return Generation(
        id=name,
        model="demo",
        prompt=[ChatMessage(role="user", content="", parts=("Look:", *media, QUESTION))],
        kind="chat",
        sampling=Sampling(**values),
        emitted_token_ids=emitted or (),
    )


async def refusal(engine: VllmEngine, generation: Generation) -> MeshError:
    """What submitting it raises."""
    with pytest.raises(MeshError) as caught:
        await engine.submit(generation, Kept())
    return caught.value


async def test_the_card_says_that_it_takes_images_and_no_sound(engine: VllmEngine) -> None:
    assert Capability.IMAGES in engine.card.capabilities
    assert Capability.AUDIO not in engine.card.capabilities


async def test_what_is_in_the_picture_changes_the_answer_and_the_same_picture_is_in_the_prefix_cache(
    engine: VllmEngine,
) -> None:
    one = await generate(engine, asked("one", picture(1)))
    two = await generate(engine, asked("two", picture(2)))
    again = await generate(engine, asked("again", picture(1)))
    assert one.usage is not None
    assert two.usage is not None
    assert again.usage is not None
    assert one.token_ids != two.token_ids
    assert one.token_ids == again.token_ids
    assert again.usage.prompt == one.usage.prompt > IMAGE_TOKENS
    assert again.usage.cached > two.usage.cached


async def test_answer_and_usage_are_those_of_vllms_own_server(engine: VllmEngine, server: VllmServer) -> None:
    pictures = [picture(3), picture(4)]
    ours = await generate(engine, asked("ours", *pictures))
    await asyncio.to_thread(server.wait, within=200)
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in pictures]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [{"type": "text", "text": "Look:"}, *content, {"type": "text", "text": QUESTION}]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(timeout=100) as client:
        answer = (await client.post(f"{server.url}/v1/chat/completions", json=body)).json()
    assert ours.usage is not None
    assert answer["usage"]["prompt_tokens"] == ours.usage.prompt
    assert answer["choices"][0]["token_ids"] == ours.token_ids


async def test_a_generation_about_a_picture_continues_where_it_was_cut_off(engine: VllmEngine) -> None:
    whole = await generate(engine, asked("whole", picture(5)))
    rest = await generate(engine, asked("rest", picture(5), emitted=list(whole.token_ids[:9])))
    assert rest.token_ids == whole.token_ids[9:]


@pytest.mark.parametrize(
    ("name", "pictures", "field", "says"),
    [
        ("no image", [b"GIF89a"], FIELD, "is no image of the type image/png"),
        ("cut off", [picture(6)[:-4000]], FIELD, "can't be decoded"),
        ("another type", [picture(6, "JPEG")], f"{FIELD}.mime_type", "the image is image/jpeg"),
        ("too many", [picture(6)] * (IMAGES_AT_MOST + 1), "chat.messages", f"At most {IMAGES_AT_MOST} image"),
    ],
)
async def test_a_file_that_is_wrong_is_refused_and_the_engine_goes_on(
    engine: VllmEngine, name: str, pictures: list[bytes], field: str, says: str
) -> None:
    error = await refusal(engine, asked(name, *pictures))
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, field)
    assert says in error.message
    after = await generate(engine, asked(f"after {name}", picture(1), max_tokens=2))
    assert len(after.token_ids) == 2


async def test_the_mark_of_an_image_is_text_when_it_is_said_and_refused_where_no_image_is(engine: VllmEngine) -> None:
    said = [ChatMessage(role="user", content="<image>" * 50)]
    assert await engine.tokenize(said) != await engine.tokenize([ChatMessage(role="user", content="")])
    limits = engine._backend.limits
    assert not limits.placeholder_ids & set(await engine.tokenize(said))
    spelled = Generation(id="t", model="demo", prompt="<image>", kind="text", sampling=Sampling(max_tokens=2))
    error = await refusal(engine, spelled)
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "prompt")


async def test_tokenizing_counts_an_image_as_generating_does(engine: VllmEngine) -> None:
    generation = asked("count", picture(7), max_tokens=1)
    sink = await generate(engine, generation)
    messages = [message for message in generation.prompt if isinstance(message, ChatMessage)]
    assert sink.usage is not None
    assert len(await engine.tokenize(messages)) == sink.usage.prompt


async def test_a_request_that_is_refused_after_its_image_was_read_leaves_that_image_usable(engine: VllmEngine) -> None:
    error = await refusal(engine, asked("long", picture(8), max_tokens=100_000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    sink = await generate(engine, asked("fits", picture(8), max_tokens=2))
    assert len(sink.token_ids) == 2
