"""Images before the real engine, as vLLM's own server takes them, and what it refuses without harm to anybody."""

import pytest

from services.common.errors import Reason
from services.inference.engine import Capability
from services.inference.request import ChatMessage, Generation, Sampling
from services.inference.vllm_engine import VllmEngine
from tests.support.engine_process import generate, refusal
from tests.support.media_models import IMAGE_TOKENS, IMAGES_AT_MOST
from tests.support.pictures import about, picture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    # The engine starts with the first of them, and its model is made once.
    pytest.mark.timeout(150),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

FIELD = "chat.messages[0].parts[1].image"


@pytest.fixture
def engine(seeing_engine: VllmEngine) -> VllmEngine:
    """One engine for all the tests."""
    return seeing_engine


async def test_the_card_says_that_it_takes_images_and_no_sound(engine: VllmEngine) -> None:
    assert Capability.IMAGES in engine.card.capabilities
    assert Capability.AUDIO not in engine.card.capabilities


async def test_what_is_in_the_picture_changes_the_answer_and_the_same_picture_is_in_the_prefix_cache(
    engine: VllmEngine,
) -> None:
    one = await generate(engine, about("one", picture(1)))
    two = await generate(engine, about("two", picture(2)))
    again = await generate(engine, about("again", picture(1)))
    assert one.usage is not None
    assert two.usage is not None
    assert again.usage is not None
    assert one.token_ids != two.token_ids
    assert one.token_ids == again.token_ids
    assert again.usage.prompt == one.usage.prompt > IMAGE_TOKENS
    assert again.usage.cached > two.usage.cached


async def test_a_generation_about_a_picture_continues_where_it_was_cut_off(engine: VllmEngine) -> None:
    whole = await generate(engine, about("whole", picture(5)))
    rest = await generate(engine, about("rest", picture(5), emitted=list(whole.token_ids[:9])))
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
    error = await refusal(engine, about(name, *pictures))
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, field)
    assert says in error.message
    after = await generate(engine, about(f"after {name}", picture(1), max_tokens=2))
    assert len(after.token_ids) == 2


async def test_the_mark_of_an_image_is_text_when_it_is_said_and_refused_where_no_image_is(engine: VllmEngine) -> None:
    said = [ChatMessage(role="user", content="<image>" * 50)]
    assert await engine.tokenize(said) != await engine.tokenize([ChatMessage(role="user", content="")])
    limits = engine._life.backend.limits
    assert not limits.placeholder_ids & set(await engine.tokenize(said))
    spelled = Generation(id="t", model="demo", prompt="<image>", kind="text", sampling=Sampling(max_tokens=2))
    error = await refusal(engine, spelled)
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "prompt")


async def test_tokenizing_counts_an_image_as_generating_does(engine: VllmEngine) -> None:
    generation = about("count", picture(7), max_tokens=1)
    sink = await generate(engine, generation)
    messages = [message for message in generation.prompt if isinstance(message, ChatMessage)]
    assert sink.usage is not None
    assert len(await engine.tokenize(messages)) == sink.usage.prompt


async def test_a_request_that_is_refused_after_its_image_was_read_leaves_that_image_usable(engine: VllmEngine) -> None:
    error = await refusal(engine, about("long", picture(8), max_tokens=100_000))
    assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    sink = await generate(engine, about("fits", picture(8), max_tokens=2))
    assert len(sink.token_ids) == 2
