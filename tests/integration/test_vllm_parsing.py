"""Function calls and thinking, read by vLLM's parsers out of the real engine's output as vLLM's own server has them."""

import json
import os
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry
from tokenloom.inference.v1 import generation_pb2 as pb
from tokenloom.inference.v1 import inference_pb2_grpc

from services.common import rpc
from services.common.config import ConfigError
from services.common.errors import MeshError, Reason
from services.common.settings_worker import ModelSettings
from services.inference.engine import Capability
from services.inference.gate import Gate
from services.inference.generations import Generations
from services.inference.lifecycle import Lifecycle
from services.inference.metrics import WorkerMetrics
from services.inference.output import FinishReason
from services.inference.request import ChatMessage, ChatOptions, Generation, Sampling, StructuredOutput, Tool, ToolCall
from services.inference.servicer import InferenceServicer, WorkerServicer, register
from services.inference.spans import Spans
from services.inference.vllm_conversation import tool_to_openai
from services.inference.vllm_engine import VllmEngine
from services.inference.vllm_params import Plan
from tests.support.demo_model import demo_model
from tests.support.engine_process import generate, worker_settings
from tests.support.said import Said, put_together
from tests.support.sinks import Kept

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    # What they import and how is not ours; everything else is still an error.
    *(pytest.mark.filterwarnings(f"ignore:::{package}") for package in ("torch", "vllm", "transformers", "importlib")),
]

WEATHER = Tool(
    name="get_weather",
    description="The weather somewhere.",
    parameters_json=json.dumps(
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 99}},
            "required": ["city", "days"],
            "additionalProperties": False,
        }
    ),
)
CLOCK = Tool(name="clock", description="", parameters_json="")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'
RAIN = CALL.replace("Paris", "Rom\\u00e9 🌧")
QUESTION = [ChatMessage(role="user", content="How is the weather?")]
MARK = re.compile("</?(?:think|tool_call)>")
PLAIN = {"enable_thinking": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    """One engine for all the tests, which calls functions and thinks."""
    environment = dict(os.environ)
    path = str(demo_model())
    model = ModelSettings(name="demo", path=path, tool_call_parser="hermes", reasoning_parser="deepseek_r1")
    # Else what it thinks could not be made to be anything.
    forms = {"structured_outputs_config": {"enable_in_reasoning": True}}
    async with VllmEngine(worker_settings(path, model_settings=model, engine_args=forms)) as running:
        yield running
    os.environ.clear()
    os.environ.update(environment)


def exactly(text: str) -> StructuredOutput:
    """A form that only this text has, in which marks are the tokens that they are."""
    pieces = (piece for piece in re.split("(</?(?:think|tool_call)>)", text) if piece)
    rule = " ".join(piece if MARK.fullmatch(piece) else json.dumps(piece, ensure_ascii=False) for piece in pieces)
    return StructuredOutput(kind="grammar", value=f"%llguidance {{}}\nstart: {rule}\n")


def chat(text: str | None = None, name: str = "g", **options: Any) -> Generation:
    """A greedy answer to a question, made to be `text`."""
    values: dict[str, Any] = {"template_arguments": PLAIN, "tools": (WEATHER, CLOCK)} | options
    messages = values.pop("messages", QUESTION)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 200} | values.pop("sampling", {})
    others = {key: values.pop(key) for key in ("emitted_token_ids", "choices", "structured_output") if key in values}
    if text is not None:
        others["structured_output"] = exactly(text)
    return Generation(
        id=name,
        model="demo",
        prompt=messages,
        kind="chat",
        sampling=Sampling(**sampling),
        chat=ChatOptions(**values),
        **others,
    )


async def said_by(engine: VllmEngine, asked: Generation) -> tuple[Said, Kept]:
    """What the engine says, put together."""
    sink = await generate(engine, asked)
    assert sink.error is None
    return put_together(sink.deltas), sink


CASES: dict[str, Generation] = {
    "one call": chat(CALL),
    "text and two calls": chat(
        f"Let me see. {CALL}\n<tool_call>\n" + '{"name": "clock", "arguments": {}}\n</tool_call>'
    ),
    "only one of two calls": chat(f"{CALL}{CALL.replace('Paris', 'Rome')}", single_tool_call=True),
    "nested and escaped": chat(
        '<tool_call>\n{"name": "clock", "arguments": {"a": {"b": ["\\"}", "é\\n", 1.5, null]}}}\n</tool_call>'
    ),
    "no call": chat("It is <tool> fine <tool_"),
    "no call wanted": chat(CALL, tool_choice="none"),
    "no tools": chat(CALL, tools=()),
    "thinking, then a call": chat(f"Hm, <tool_call> or not.</think>{CALL}", template_arguments={}),
    "thinking, then text": chat("First this. Then that.</think>\n\nFine.", template_arguments={}, tools=()),
    "thinking without end": chat("I think and think", template_arguments={}),
    "thinking with its beginning": chat("<think>Ah.</think>Yes.", template_arguments={}, tools=()),
    "ended by a stop string": chat("Let me see. Or not. Or so.", sampling={"stop": ("Or so",)}),
    "a named function": chat(tool_choice="function", function_name="get_weather"),
    "a required function": chat(tool_choice="required", single_tool_call=True),
}


@pytest.fixture(scope="module")
def vllm_chat(engine: VllmEngine) -> Any:
    """The module, which imports vLLM; that is for the engine to prepare."""
    del engine
    return import_module("tests.support.vllm_chat")


@pytest.fixture(scope="module")
def stock(engine: VllmEngine, vllm_chat: Any) -> Any:
    """vLLM's own chat server."""
    return vllm_chat.Stock(engine)


@pytest.mark.parametrize("case", CASES)
async def test_calls_and_thinking_are_those_of_vllms_own_server(engine: VllmEngine, stock: Any, case: str) -> None:
    asked = CASES[case]
    ours, sink = await said_by(engine, asked)
    said = (ours.text, ours.reasoning, ours.calls)
    for _ in range(4):
        # Where several tokens come at a time, vLLM's own server may take a marker for text.
        theirs, reason, _ = await stock.ask(asked, stream=True)
        if said == (theirs.text, theirs.reasoning, theirs.calls):
            break
    assert said == (theirs.text, theirs.reasoning, theirs.calls)
    assert sink.reason is not None
    assert sink.reason.value == reason


async def test_a_call_that_is_cut_or_broken_is_told_as_far_as_it_went(engine: VllmEngine) -> None:
    # What vLLM's server says of these depends on how many tokens came at a time.
    cut, sink = await said_by(engine, chat(CALL, sampling={"max_tokens": 20}))
    assert [name for name, _ in cut.calls] == ["get_weather"]
    assert sink.reason is FinishReason.LENGTH
    broken, sink = await said_by(engine, chat('<tool_call>\n{"name": "clock", "arguments": {"a": }\n</tool_call>'))
    assert broken.calls == [("clock", '{"a": }')]
    assert sink.reason is FinishReason.TOOL_CALLS


@pytest.mark.parametrize("case", ["thinking, then a call", "thinking, then text", "thinking with its beginning"])
async def test_thinking_is_counted_and_whole_answers_are_read_alike(engine: VllmEngine, stock: Any, case: str) -> None:
    ours, sink = await said_by(engine, CASES[case])
    theirs, _, thought = await stock.ask(CASES[case], stream=False)
    assert (ours.text, ours.reasoning, ours.calls) == (theirs.text, theirs.reasoning, theirs.calls)
    assert sink.usage is not None
    assert sink.usage.reasoning == thought
    # vLLM counts from the beginning of the thinking, which not every model writes.
    assert bool(thought) == (case == "thinking with its beginning")


async def test_a_function_must_be_called_with_arguments_that_fit_its_schema(engine: VllmEngine) -> None:
    named, sink = await said_by(engine, chat(tool_choice="function", function_name="get_weather"))
    ((name, arguments),) = named.calls
    assert (name, named.text, sink.reason) == ("get_weather", "", FinishReason.STOP)
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    required, sink = await said_by(engine, chat(tool_choice="required", sampling={"max_tokens": 600}))
    assert {name for name, _ in required.calls} <= {"get_weather", "clock"}
    assert required.calls
    assert sink.reason is FinishReason.TOOL_CALLS


async def test_strict_functions_are_called_with_fitting_arguments_or_not_at_all(engine: VllmEngine) -> None:
    strict = chat(tools=(replace(WEATHER, strict=True),))
    token = engine._life.backend.llm.get_tokenizer().get_vocab()["<tool_call>"]
    # Once it has begun with a call, the model has no choice but to make one.
    said, _ = await said_by(engine, replace(strict, sampling=replace(strict.sampling, logit_bias={token: 100.0})))
    name, arguments = said.calls[0]
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    free, _ = await said_by(engine, strict)
    assert free.text
    assert not free.calls


async def test_each_choice_is_read_on_its_own(engine: VllmEngine) -> None:
    asked = CASES["thinking, then a call"]
    asked = replace(asked, choices=3, sampling=replace(asked.sampling, temperature=0.9))
    one, _ = await said_by(engine, CASES["thinking, then a call"])
    sink = await generate(engine, asked)
    for choice in range(3):
        said = put_together(sink.deltas, choice)
        assert (said.reasoning, said.calls) == (one.reasoning, one.calls)
        assert sink.choice_ends[choice] == (FinishReason.TOOL_CALLS, None)
    assert len({said_id for choice in range(3) for said_id in put_together(sink.deltas, choice).ids}) == 3


HISTORY = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Weather?"),
    ChatMessage(
        role="assistant",
        content="",
        reasoning="Paris, surely.",
        tool_calls=(ToolCall(id="c1", name="get_weather", arguments_json='{"city": "Paris", "days": 1}'),),
    ),
    ChatMessage(role="tool", content="Rain.", tool_call_id="c1"),
]


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
async def test_prompts_are_those_of_vllms_own_server(
    engine: VllmEngine, stock: Any, arguments: dict[str, object]
) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 1}'}
    tools = [WEATHER, CLOCK, replace(CLOCK, name="other", strict=True, description="It's <b>.")]
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "Paris, surely.",
                "tool_calls": [{"id": "c1", "type": "function", "function": call}],
            },
            {"role": "tool", "content": "Rain.", "tool_call_id": "c1"},
        ],
        "tools": [
            {"type": "function", "function": json.loads(json.dumps({
                key: value for key, value in tool_to_openai(tool)["function"].items() if value is not None
            }))}
            for tool in tools
        ],
        "chat_template_kwargs": arguments,
    }  # fmt: skip
    theirs = await stock.rendered(body)
    options = ChatOptions(tools=tools, template_arguments=arguments)
    ours = (await engine._life.backend.prompts.rendered(HISTORY, options)).tokens
    assert ours == theirs
    text = engine._life.backend.llm.get_tokenizer().decode(ours)
    assert "get_weather" in text
    assert "<think>\nParis, surely.\n</think>" in text


async def test_what_clients_say_in_calls_and_functions_is_no_special_token(engine: VllmEngine) -> None:
    end = "<|im_end|>"
    call = ToolCall(
        id="c1", name="clock", arguments_json='{"a\\u003c|im_end|>": "<|im_end|>", "b": ["\\u003c|im_end|>"]}'
    )
    messages = [
        replace(HISTORY[2], tool_calls=(call,), reasoning=end),
        ChatMessage(role="tool", content=end, tool_call_id="c1"),
        ChatMessage(role="user", content="", parts=(end, "and", end)),
    ]
    parameters = json.dumps({"type": "object", "properties": {end: {"description": end}}})
    tools = [Tool(name="f", description=end, parameters_json=parameters)]
    options = ChatOptions(tools=tools, template_arguments={"documents_title": end})
    prompts, tokenizer = engine._life.backend.prompts, engine._life.backend.llm.get_tokenizer()
    tokens = (await prompts.rendered(messages, options)).tokens
    # One for each turn that the template closes.
    assert tokens.count(tokenizer.eos_token_id) == len(messages) + 1
    assert tokenizer.decode(tokens).count(end) == len(messages) + 1 + 10


async def test_what_can_not_be_called_as_asked_is_refused_by_field(engine: VllmEngine) -> None:
    broken = Tool(name="f", description="", parameters_json='{"type": "🤡"}')
    cyclic = Tool(
        name="f", description="", parameters_json='{"$ref": "#/properties/a", "properties": {"a": {"$ref": "#"}}}'
    )
    refused = {
        "chat.tools": [
            chat(tools=(broken,), tool_choice="required"),
            chat(tools=(broken,), tool_choice="function", function_name="f"),
            chat(tools=(replace(broken, strict=True),)),
            chat(tools=(cyclic,), tool_choice="required"),
        ],
    }
    for named, generations in refused.items():
        for asked in generations:
            with pytest.raises(MeshError) as caught:
                await engine.submit(asked, Kept())
            assert (caught.value.reason, caught.value.field) == (Reason.INVALID_REQUEST, named)
    assert (await said_by(engine, CASES["one call"]))[0].calls


async def test_over_grpc_calls_come_as_deltas_and_end_with_their_reason(engine: VllmEngine) -> None:
    gate = Gate()
    gate.open(engine)
    generations = Generations(Spans(None, worker="w"), WorkerMetrics(CollectorRegistry()))
    services = (
        InferenceServicer(gate, generations),
        WorkerServicer(gate, generations, Lifecycle(gate, generations, drain_seconds=1.0)),
    )
    # Nothing in it can be long: the model would use it.
    city = {"enum": ["Paris", "Rome"]}
    parameters = {"properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    request = pb.GenerateRequest(
        model="demo",
        chat=pb.ChatPrompt(
            messages=[pb.ChatMessage(role="user", content="How is the weather?")],
            tools=[pb.Tool(name="get_weather", parameters_json=json.dumps(parameters))],
            tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
            single_tool_call=True,
            template_arguments_json='{"enable_thinking": false}',
        ),
        sampling=pb.SamplingParameters(temperature=0, max_tokens=200),
    )
    async with (
        rpc.serve("127.0.0.1:0", lambda server: register(server, *services), grace_seconds=0) as server,
        rpc.channel(f"127.0.0.1:{server.port}") as channel,
    ):
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        events = [event async for event in call]
    said = Said()
    for event in events:
        calls = [(each.index, each.id, each.name, each.arguments_json) for each in event.delta.tool_calls]
        said.add(event.delta.text, event.delta.reasoning, calls)
    ((name, arguments),) = said.calls
    assert (name, said.text) == ("get_weather", "")
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    completed = events[-1].completed
    assert completed.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert completed.usage.output_token_count == sum(len(event.delta.token_ids) for event in events)


async def test_the_card_says_what_can_be_read(engine: VllmEngine) -> None:
    assert {Capability.TOOLS, Capability.REASONING, Capability.CHAT} <= engine.card.capabilities


SCRIPTS: list[tuple[str | None, str | None, str, bool]] = [
    ("hermes", None, f"So. {CALL}\n{RAIN}", True),
    ("hermes", None, "Nothing <tool_call> of the kind", False),
    ("hermes", "deepseek_r1", f"<think>Hm 🌧.</think>Yes. {CALL}", True),
    (None, "deepseek_r1", "I think.</think>I say.", False),
    (None, "qwen3", "<think>I think.</think>\n\nI say.", False),
    (
        "qwen3_coder",
        "qwen3",
        "<think>Hm.</think><tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        True,
    ),
    ("pythonic", None, '[get_weather(city="Paris", days=3), clock()]', True),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script[0]} {script[1]}")
async def test_a_reader_that_goes_on_elsewhere_repeats_and_leaves_out_nothing(
    engine: VllmEngine, vllm_chat: Any, script: tuple[str | None, str | None, str, bool]
) -> None:
    tools, reasoning, text, calls = script
    parsing = vllm_chat.parsing_of(engine, tool_call_parser=tools, reasoning_parser=reasoning)
    llm: Any = engine._life.backend.llm
    asked = chat(template_arguments={}, tools=(WEATHER, CLOCK) if tools else ())
    reading = parsing.reading(asked)
    assert reading is not None
    asked = reading.apply(asked)
    tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)

    def reader(emitted: Sequence[int]) -> Any:
        return reading.reader(
            Plan(
                prompt_token_ids=[40, 50],
                emitted_token_ids=emitted,
                max_tokens=500,
                ended_by_token=False,
                sampling=asked.sampling,
            )
        )

    whole, reason = reader(()).feed(tokens, "length")
    expected = put_together([whole])
    assert bool(expected.calls) == calls
    assert reason == "length"
    for cut in range(1, len(tokens)):
        first, second = reader(()), reader(tokens[:cut])
        before, _ = first.feed(tokens[:cut], None)
        after, _ = second.feed(tokens[cut:], "length")
        said = put_together([before, after])
        assert (said.text, said.reasoning, said.calls) == (expected.text, expected.reasoning, expected.calls)
        assert [*before.token_ids, *after.token_ids] == tokens
    one = reader(())
    pieces = [one.feed([token], None)[0] for token in tokens[:-1]] + [one.feed(tokens[-1:], "length")[0]]
    said = put_together(pieces)
    assert (said.text, said.reasoning, said.calls) == (expected.text, expected.reasoning, expected.calls)


async def test_a_generation_with_thinking_and_functions_goes_on_elsewhere_exactly(engine: VllmEngine) -> None:
    token = engine._life.backend.llm.get_tokenizer().get_vocab()["</think>"]
    for bias in range(1, 10):
        sampling = {"max_tokens": 60, "logit_bias": {token: float(bias)}, "stop": ("zzz",)}
        asked = chat(template_arguments={}, sampling=sampling)
        whole, sink = await said_by(engine, asked)
        if whole.reasoning and whole.text:
            break
    assert whole.reasoning
    assert whole.text
    cuts = sorted({1, 2, len(sink.deltas) // 2, len(sink.deltas) - 1, len(sink.deltas)})
    await assert_it_goes_on(engine, asked, whole, sink, cuts)


async def assert_it_goes_on(
    engine: VllmEngine, asked: Generation, whole: Said, sink: Kept, cuts: Iterable[int]
) -> None:
    """Resumes it after so many deltas each: a client has whole ones, however many tokens each brings."""
    for count in cuts:
        had = sink.deltas[:count]
        emitted = [token_id for delta in had for token_id in delta.token_ids]
        resumed = await generate(engine, replace(asked, id=f"r{count}", emitted_token_ids=emitted))
        assert resumed.error is None
        said = put_together([*had, *resumed.deltas])
        assert (said.text, said.reasoning, said.calls) == (whole.text, whole.reasoning, whole.calls)
        assert resumed.reason is sink.reason
        assert resumed.usage is not None
        assert sink.usage is not None
        assert resumed.usage.output == sink.usage.output


@pytest.mark.parametrize(
    "choice", [{"tool_choice": "required"}, {"tool_choice": "function", "function_name": "f"}], ids=str
)
async def test_a_call_that_has_to_be_made_goes_on_elsewhere_inside_its_form(
    engine: VllmEngine, choice: dict[str, Any]
) -> None:
    # Nothing in it can be long: the model would use it.
    parameters = {"properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}}, "required": ["city"]}
    tools = (Tool(name="f", description="", parameters_json=json.dumps(parameters | {"additionalProperties": False})),)
    asked = chat(tools=tools, sampling={"max_tokens": 60}, **choice)
    whole, sink = await said_by(engine, asked)
    assert whole.calls
    await assert_it_goes_on(engine, asked, whole, sink, range(1, len(sink.deltas) + 1))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"tool_call_parser": "nonsense"}, r"model\.tool_call_parser: vLLM has no 'nonsense'; it has .*hermes"),
        ({"reasoning_parser": "nonsense"}, r"model\.reasoning_parser: vLLM has no 'nonsense'; it has .*qwen3"),
        ({"tool_call_parser": "llama3_json"}, r"model\.tool_call_parser 'llama3_json'.*python_tag"),
    ],
)
async def test_parsers_that_can_not_be_used_are_named(
    engine: VllmEngine, vllm_chat: Any, model: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        vllm_chat.parsing_of(engine, **model)


async def test_a_form_begins_after_the_thinking() -> None:
    path = str(demo_model())
    model = ModelSettings(name="demo", path=path, reasoning_parser="deepseek_r1")
    async with VllmEngine(worker_settings(path, model_settings=model)) as engine:
        tokenizer = engine._life.backend.llm.get_tokenizer()
        assert Capability.TOOLS not in engine.card.capabilities
        form = StructuredOutput(kind="choice", choices=("yes",))
        for seed in range(20):
            bias = {tokenizer.get_vocab()["</think>"]: 6.0}
            sampling = {"logit_bias": bias, "temperature": 1.0, "seed": seed}
            thinking = chat(template_arguments={}, tools=(), structured_output=form, sampling=sampling)
            said, sink = await said_by(engine, thinking)
            if said.reasoning and said.text:
                break
        assert said.reasoning
        assert (said.text, sink.reason) == ("yes", FinishReason.STOP)
        # Greedy, and cut everywhere, in the thinking and after it.
        for likely in range(1, 12):
            greedy = {"logit_bias": {tokenizer.get_vocab()["</think>"]: float(likely)}, "max_tokens": 60}
            letters = StructuredOutput(kind="regex", value="[a-z]{9}!")
            held = chat(template_arguments={}, tools=(), structured_output=letters, sampling=greedy)
            whole, sink = await said_by(engine, held)
            if whole.reasoning and whole.text:
                break
        assert whole.text.endswith("!")
        await assert_it_goes_on(engine, held, whole, sink, range(1, len(sink.deltas) + 1))
        # It doesn't think where the template says so, nor outside of a chat.
        assert (await said_by(engine, replace(thinking, chat=ChatOptions(template_arguments=PLAIN))))[0].text == "yes"
        text = replace(thinking, id="t", prompt="Well,", kind="text", chat=ChatOptions())
        assert (await said_by(engine, text))[0].text == "yes"
