"""Tries forms of outputs out, each in a process that may die: `python -m services.inference.vllm_form_check`.

Standard input has one JSON line on the tokenizer, then one on each form; standard output answers each with one JSON
line: null when it is fine, else what is wrong with it. A form that takes more than its share of time or memory takes
only its own process along. Imports nothing of vLLM, so that it starts at once.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer, grammar_from

__all__ = ["CPU_SECONDS", "MEMORY_BYTES", "form_error"]

CPU_SECONDS: Final = 1.0
MEMORY_BYTES: Final = 256 << 20
_WALL_SECONDS: Final = 4
_MAX_ERROR_CHARACTERS: Final = 300
# The matcher has no first token to allow.
_NOTHING_FITS: Final = "NoExtensionBias"


def form_error(tokenizer: Any, kind: str, value: str, *, any_whitespace: bool) -> str | None:
    """What is wrong with a form, compiled as vLLM's engine will; None when it is fine."""
    try:
        grammar = _grammar(kind, value, any_whitespace=any_whitespace)
    except (ValueError, KeyError, TypeError) as error:
        return _readable(str(error))
    if error_text := LLMatcher.validate_grammar(grammar, tokenizer):
        return _readable(error_text)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    if not matcher.get_error():
        matcher.compute_bitmask()
    if error_text := matcher.get_error():
        return "no text fits it" if _NOTHING_FITS in error_text else _readable(error_text)
    return None


def _grammar(kind: str, value: str, *, any_whitespace: bool) -> str:
    match kind:
        case "json_schema" | "json_object":
            schema = value if kind == "json_schema" else '{"type": "object"}'
            grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": any_whitespace})
            return grammar
        case "regex" | "grammar" | "choice":
            return grammar_from(kind, value)
        case _:
            raise ValueError(f"{kind} is no kind of form")


def _readable(error: str) -> str:
    return " ".join(error.partition("\n<state>")[0].split())[:_MAX_ERROR_CHARACTERS] or "it can't be compiled"


def _tried(tokenizer: Any, form: dict[str, Any], *, any_whitespace: bool) -> str | None:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        _limit()
        error = form_error(tokenizer, form["kind"], form["value"], any_whitespace=any_whitespace)
        os.write(write, json.dumps(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        told = answer.read()
    _, status = os.waitpid(pid, 0)
    if status == 0 and told:
        error_text: str | None = json.loads(told)
        return error_text
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in {signal.SIGPROF, signal.SIGALRM}:
        return f"it takes more than {CPU_SECONDS:g} s to compile"
    return f"it takes more than {MEMORY_BYTES >> 20} MiB to compile"


def _limit() -> None:
    with open("/proc/self/statm", encoding="ascii") as pages:  # noqa: PTH123  # one line
        has = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY_BYTES, has + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Their default is to end the process.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(_WALL_SECONDS)


def _main() -> None:
    told = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(told["tokenizer"], n_vocab=told["vocabulary"], eos_token=told["end_id"])
    for line in sys.stdin:
        error = _tried(tokenizer, json.loads(line), any_whitespace=told["any_whitespace"])
        sys.stdout.write(json.dumps(error) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
