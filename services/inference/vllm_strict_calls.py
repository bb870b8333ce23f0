"""The grammar of an output that may call functions, each of which is to be called by its schema or not at all."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

__all__ = ["strict_grammar"]

_LARK_TOKEN: Final = re.compile(r"<[^<>\s]+>")


def strict_grammar(tag_model: str | None, tools: Any, tokenizer: Any) -> str | None:
    """Any text, in which what begins like a call is one that fits; None where it can't be said.

    `tag_model`: vLLM's name for how the model marks calls; None where it knows none. `tools` are vLLM's.
    """
    if tag_model is None:
        return None
    tag = get_model_structural_tag(
        model=tag_model,
        tools=tools,
        tool_choice="auto",
        reasoning=False,
        strict_level=ToolStrictLevel.AUTO,
    )
    said = tag.format.model_dump() if tag is not None else {}
    return None if said.get("type") != "triggered_tags" else _lark(said, tokenizer)


def _lark(said: Mapping[str, Any], tokenizer: Any) -> str | None:
    """xgrammar's triggered tags in llguidance's notation; None where they hold more than text and JSON."""
    # What is one token must be said to be one, and only then can it not be a part of any text.
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if any(trigger not in added or not _LARK_TOKEN.fullmatch(trigger) for trigger in said["triggers"]):
        return None
    cut = re.compile("(" + "|".join(map(re.escape, filter(_LARK_TOKEN.fullmatch, added))) + ")")

    def literal(text: str) -> str:
        pieces = enumerate(cut.split(text))
        return " ".join(piece if index % 2 else json.dumps(piece) for index, piece in pieces if piece)

    rules = []
    for tag in said["tags"]:
        content = tag["content"]
        if (content["type"], content.get("style")) != ("json_schema", "json"):
            return None
        schema = {} if content["json_schema"] is True else content["json_schema"]
        rules.append(f"TEXT {literal(tag['begin'])} %json {json.dumps(schema)} {literal(tag['end'])}")
    names = [f"call_{index}" for index in range(len(rules))]
    lines = ["%llguidance {}", f"start: ({' | '.join(names)})* TEXT", "TEXT: /(.|\\n)*/"]
    return "\n".join([*lines, *(f"{name}: {rule}" for name, rule in zip(names, rules, strict=True))]) + "\n"
