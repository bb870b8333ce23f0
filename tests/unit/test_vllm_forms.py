"""Forms of outputs are tried out once, however many ask at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import pytest_asyncio

from services.common.errors import MeshError
from services.inference.request import StructuredOutput
from services.inference.vllm_forms import Forms
from tests.support.demo_model import demo_model

NEW_PER_MINUTE = 2


@pytest_asyncio.fixture
async def forms() -> AsyncIterator[Forms]:
    tokenizer = (demo_model() / "tokenizer.json").read_text()
    said = {"tokenizer": tokenizer, "vocabulary": 2048, "end_id": 2, "any_whitespace": False}
    checker = Forms(said, new_per_minute=NEW_PER_MINUTE, clock=lambda: 0.0)
    yield checker
    await checker.close()


async def test_many_of_one_tenant_may_ask_for_the_same_new_form_at_once(forms: Forms) -> None:
    form = StructuredOutput(kind="regex", value="[a-z]{5}")
    await asyncio.gather(*(forms.check(form, tenant="one") for _ in range(50)))
    wrong = StructuredOutput(kind="regex", value="(unclosed")
    found = await asyncio.gather(*(forms.check(wrong, tenant="one") for _ in range(50)), return_exceptions=True)
    assert {str(error) for error in found} == {str(found[0])}
    assert "structured_output.regex" in str(found[0])
    # That were two new ones.
    with pytest.raises(MeshError, match="more than 2 new structured outputs a minute"):
        await forms.check(StructuredOutput(kind="regex", value="[0-9]"), tenant="one")


async def test_whoever_waits_for_a_form_that_another_one_gives_up_has_it_tried_out(forms: Forms) -> None:
    form = StructuredOutput(kind="regex", value="[a-z]{5}")
    first = asyncio.create_task(forms.check(form, tenant="one"))
    await asyncio.sleep(0)
    second = asyncio.create_task(forms.check(form, tenant="other"))
    await asyncio.sleep(0)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    await second
