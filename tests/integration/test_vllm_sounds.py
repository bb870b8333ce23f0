"""Sounds before the real engine, as vLLM itself takes them, and what it refuses without harm to anybody."""

from importlib.util import find_spec
from typing import Any

import pytest

from services.common.errors import Reason
from services.inference.engine import Capability
from services.inference.media_files import File, opened, samples
from services.inference.request import ChatMessage, Generation, Sampling
from services.inference.vllm_engine import VllmEngine
from tests.support.engine_process import generate, refusal
from tests.support.media_models import SOUND_SECONDS, SOUNDS_AT_MOST
from tests.support.pictures import QUESTION, about_sounds, sound

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    # The engine starts with the first of them, and its model is made once.
    pytest.mark.timeout(150),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

FIELD = "chat.messages[0].parts[1].audio"
# A sound of 0.5 s has 50 windows, of which two convolutions and a mean over two make:
HALF_A_SECOND_TOKENS = 12


@pytest.fixture
def engine(hearing_engine: VllmEngine) -> VllmEngine:
    """One engine for all the tests."""
    return hearing_engine


async def of_vllm_itself(engine: VllmEngine, name: str, *sounds: bytes) -> Any:
    """What vLLM's own interface for programs says of the rendered conversation and the same samples."""
    from vllm import SamplingParams  # noqa: PLC0415  # it takes seconds, and the engine imports it first

    media = [part for message in about_sounds(name, *sounds).prompt for part in getattr(message, "parts", ())]
    files = [File("sound", part) for part in media if not isinstance(part, str)]
    heard = [samples(file, each) for file, each in zip(files, opened(files), strict=True)]  # type: ignore[arg-type]
    marks = "<|audio_bos|><|AUDIO|><|audio_eos|>" * len(sounds)
    text = f"<|im_start|>user\nLook:{marks}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
    prompt = {"prompt": text, "multi_modal_data": {"audio": heard}}
    *_, last = [output async for output in engine._life.backend.llm.generate(prompt, sampling, name)]
    return last


async def test_the_card_says_that_it_takes_sounds_and_no_images(engine: VllmEngine) -> None:
    assert Capability.AUDIO in engine.card.capabilities
    assert Capability.IMAGES not in engine.card.capabilities


async def test_what_is_heard_changes_the_answer_and_the_same_sound_is_in_the_prefix_cache(engine: VllmEngine) -> None:
    silent = await generate(engine, about_sounds("none"))
    one = await generate(engine, about_sounds("one", sound(1)))
    two = await generate(engine, about_sounds("two", sound(2)))
    again = await generate(engine, about_sounds("again", sound(1)))
    assert silent.usage is not None
    assert one.usage is not None
    assert two.usage is not None
    assert again.usage is not None
    assert one.token_ids != two.token_ids
    assert one.token_ids == again.token_ids
    # With the two marks around it.
    assert again.usage.prompt == one.usage.prompt == silent.usage.prompt + HALF_A_SECOND_TOKENS + 2
    # Whole blocks, of which the other sound is in the first.
    assert (two.usage.cached, again.usage.cached) == (0, 64)


@pytest.mark.parametrize("seeds", [(3,), (3, 4), (4, 3)])
async def test_answer_and_prompt_are_those_of_vllm_itself(engine: VllmEngine, seeds: tuple[int, ...]) -> None:
    sounds = [sound(seed, seconds=seed / 4) for seed in seeds]
    ours = await generate(engine, about_sounds(f"ours {seeds}", *sounds))
    theirs = await of_vllm_itself(engine, f"theirs {seeds}", *sounds)
    assert ours.usage is not None
    assert ours.usage.prompt == len(theirs.prompt_token_ids)
    assert ours.token_ids == list(theirs.outputs[0].token_ids)


async def test_the_order_of_sounds_counts(engine: VllmEngine) -> None:
    first = await generate(engine, about_sounds("first", sound(1), sound(2)))
    other = await generate(engine, about_sounds("other", sound(2), sound(1)))
    assert first.token_ids != other.token_ids


async def test_a_generation_about_a_sound_continues_where_it_was_cut_off(engine: VllmEngine) -> None:
    whole = await generate(engine, about_sounds("whole", sound(5)))
    rest = await generate(engine, about_sounds("rest", sound(5), emitted=list(whole.token_ids[:9])))
    assert rest.token_ids == whole.token_ids[9:]


@pytest.mark.parametrize(
    ("name", "sounds", "field", "says"),
    [
        ("no sound", [b"RIFF"], FIELD, "is no sound of the type audio/wav"),
        ("too short", [sound(6, seconds=0.01)], FIELD, "too short"),
        ("longer than it hears", [sound(6, seconds=SOUND_SECONDS + 1)], FIELD, f"hears {SOUND_SECONDS} seconds"),
        ("too long", [sound(6, seconds=601, rate=4_000)], FIELD, "at most 600 seconds"),
        ("too many", [sound(6)] * (SOUNDS_AT_MOST + 1), "chat.messages", f"At most {SOUNDS_AT_MOST} audio"),
    ],
)
async def test_a_sound_that_is_wrong_is_refused_and_the_engine_goes_on(
    engine: VllmEngine, name: str, sounds: list[bytes], field: str, says: str
) -> None:
    error = await refusal(engine, about_sounds(name, *sounds))
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, field)
    assert says in error.message
    after = await generate(engine, about_sounds(f"after {name}", sound(1), max_tokens=2))
    assert len(after.token_ids) == 2


@pytest.mark.skipif(find_spec("torchaudio") is not None, reason="what vLLM changes rates with is installed")
async def test_a_sound_of_another_rate_is_refused_where_nothing_can_change_it(engine: VllmEngine) -> None:
    error = await refusal(engine, about_sounds("rate", sound(1), sound(1, rate=8_000)))
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, FIELD.replace("parts[1]", "parts[2]"))
    assert "only sounds of 16000 samples a second are taken here, got 8000" in error.message


async def test_the_mark_of_a_sound_is_text_when_it_is_said_and_refused_where_no_sound_is(engine: VllmEngine) -> None:
    said = [ChatMessage(role="user", content="<|AUDIO|>" * 50)]
    assert not engine._life.backend.limits.placeholder_ids & set(await engine.tokenize(said))
    spelled = Generation(id="t", model="demo", prompt="<|AUDIO|>", kind="text", sampling=Sampling(max_tokens=2))
    error = await refusal(engine, spelled)
    assert (error.reason, error.field) == (Reason.INVALID_REQUEST, "prompt")


async def test_tokenizing_counts_a_sound_as_generating_does(engine: VllmEngine) -> None:
    generation = about_sounds("count", sound(7), max_tokens=1)
    sink = await generate(engine, generation)
    messages = [message for message in generation.prompt if isinstance(message, ChatMessage)]
    assert sink.usage is not None
    assert len(await engine.tokenize(messages)) == sink.usage.prompt
