"""What the simulated engine reads and says: a tokenizer that loses nothing, and output that anybody can compute.

The token at output position i depends on the prompt's tokens and on i alone: never on the worker, the time, the batch
or the cache. A test, a benchmark or another worker knows what must come.
"""

import codecs
import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count, islice
from typing import Final

from services.inference.request import ChatMessage, ChatOptions

__all__ = [
    "LONGEST_TOKEN",
    "VOCABULARY_SIZE",
    "Detokenizer",
    "detokenize",
    "expected_output",
    "expected_text",
    "natural_length",
    "output_seed",
    "output_steps",
    "output_tokens",
    "render_chat",
    "said",
    "token_text",
    "tokenize",
]

# Ids: the 256 bytes, two marks that no text can spell, then every word of one to four letters, without and with a
# space before it.
_START: Final = 256
_END: Final = 257
_WORDS: Final = 258
_LETTERS: Final = 4
_WORD_COUNTS: Final[tuple[int, ...]] = tuple(26**length for length in range(1, _LETTERS + 1))
_SPELLINGS: Final = sum(_WORD_COUNTS)
VOCABULARY_SIZE: Final = _WORDS + 2 * _SPELLINGS
LONGEST_TOKEN: Final = _LETTERS + 1
"""Characters of the longest token: no text has fewer tokens than its length divided by this."""

_PIECES: Final = re.compile(rf" ?[a-z]{{1,{_LETTERS}}}|[\s\S]")

_PHRASE_TOKENS: Final = 8
_PHRASES: Final = 256
_MASK: Final = (1 << 64) - 1
# Characters of two, three and four bytes, each byte a token of its own.
_WIDE: Final = ("é", "ß", "ñ", "→", "語", "한", "🚀", "🌱")
_SOUNDS: Final = ("bdfgklmn", "aeiouaei")

Step = tuple[str, tuple[int]]
"""The text that a token adds, and the token."""


def tokenize(text: str) -> list[int]:
    """The tokens of a text, about four characters each in English; detokenize() gives exactly the text back."""
    return list(chain.from_iterable(map(_piece_ids, _PIECES.findall(text))))


def detokenize(token_ids: Sequence[int]) -> str:
    """The text of tokens, with U+FFFD for what isn't UTF-8."""
    return b"".join(map(_token_bytes, token_ids)).decode("utf-8", "replace")


def token_text(token_id: int) -> str:
    """The text of one token on its own."""
    return detokenize((token_id,))


def render_chat(messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> list[int]:
    """The tokens of a conversation, ending where the assistant begins to speak unless the options say otherwise.

    What marks a message's ends can't be spelled by its content.
    """
    options = options or ChatOptions()
    tokens: list[int] = []
    for message in messages:
        speaker = f"{message.role} {message.name}" if message.name else message.role
        tokens += (_START, *tokenize(f"{speaker}\n{said(message)}"), _END, *tokenize("\n"))
    if options.continue_final_message:
        return tokens[: -1 - len(tokenize("\n"))]
    return [*tokens, _START, *tokenize("assistant\n")] if options.generation_prompt else tokens


def said(message: ChatMessage) -> str:
    """The text of a message, the functions that it calls included."""
    text = message.content or "\n".join(part for part in message.parts if isinstance(part, str))
    return text + "".join(f"\n{call.name}({call.arguments_json})" for call in message.tool_calls)


def output_seed(prompt_tokens: Sequence[int], choice: int = 0) -> int:
    """What the output depends on, made of the prompt and of which of several choices it is: 64 bits."""
    packed = struct.pack(f"<{len(prompt_tokens)}I", *prompt_tokens)
    person = choice.to_bytes(8, "little") if choice else b""
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=person).digest(), "little")


def natural_length(seed: int) -> int:
    """How many tokens an output has when nothing limits it, 16 to 256."""
    return 16 + seed % 241


def output_steps(seed: int, start: int) -> Iterator[Step]:
    """The output from position `start` on, without an end.

    A token's text is what an incremental detokenizer adds at it: nothing, while a character is incomplete.
    """
    block, offset = divmod(start, _PHRASE_TOKENS)
    later = (_TABLE[_phrase_index(seed, number)] for number in count(block + 1))
    return chain(_TABLE[_phrase_index(seed, block)][offset:], chain.from_iterable(later))


def output_tokens(seed: int, start: int, stop: int) -> list[int]:
    """The output tokens from position `start` up to `stop`."""
    first = start // _PHRASE_TOKENS
    tokens: list[int] = []
    for block in range(first, -(-stop // _PHRASE_TOKENS)):
        tokens += _TABLE_TOKENS[_phrase_index(seed, block)]
    return tokens[start - first * _PHRASE_TOKENS : stop - first * _PHRASE_TOKENS]


def expected_output(prompt_tokens: Sequence[int], token_count: int, *, start: int = 0) -> list[int]:
    """The `token_count` output tokens from position `start` on that every simulated engine gives for a prompt."""
    return output_tokens(output_seed(prompt_tokens), start, start + token_count)


def expected_text(prompt_tokens: Sequence[int], token_count: int, *, start: int = 0) -> str:
    """The text that comes with expected_output(), all of it; a character that is cut off at the end is left out."""
    return "".join(text for text, _ in islice(output_steps(output_seed(prompt_tokens), start), token_count))


class Detokenizer:
    """Turns tokens into text one by one, and holds the bytes of a character back until it is complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that a token adds."""
        return self._decoder.decode(_token_bytes(token_id))


@lru_cache(maxsize=1 << 16)
def _piece_ids(piece: str) -> tuple[int, ...]:
    letters = piece[1:] if len(piece) > 1 else piece
    if piece[0] != " ":
        letters = piece
    if not ("a" <= letters[0] <= "z"):
        return tuple(piece.encode("utf-8"))
    spelled = 0
    for letter in letters:
        spelled = spelled * 26 + ord(letter) - ord("a")
    spaced = _SPELLINGS if piece[0] == " " else 0
    return (_WORDS + spaced + sum(_WORD_COUNTS[: len(letters) - 1]) + spelled,)


@lru_cache(maxsize=1 << 16)
def _token_bytes(token_id: int) -> bytes:
    if token_id < _START:
        return bytes((token_id,))
    if token_id < _WORDS:
        return b""
    spaced, spelled = divmod(token_id - _WORDS, _SPELLINGS)
    length = 1
    while spelled >= _WORD_COUNTS[length - 1]:
        spelled -= _WORD_COUNTS[length - 1]
        length += 1
    letters = ""
    for _ in range(length):
        spelled, letter = divmod(spelled, 26)
        letters = chr(ord("a") + letter) + letters
    return b" " * spaced + letters.encode()


def _phrase_index(seed: int, block: int) -> int:
    mixed = (seed + block * 0x9E3779B97F4A7C15) & _MASK
    return ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 & _MASK) >> 56


def _phrase(number: int) -> tuple[Step, ...]:
    # Made so that tokenizing the text gives the tokens back, and so that it ends with a whole character: the next
    # turn of a conversation then finds this output in the prefix cache, and any phrase can follow any other.
    numbers = hashlib.shake_128(f"phrase {number}".encode()).digest(256)
    tokens: list[int] = []
    for chosen, *spelling in zip(*[iter(numbers)] * 6, strict=False):
        room = _PHRASE_TOKENS - len(tokens)
        piece = _piece(chosen, spelling)
        tokens += tokenize(piece) if len(tokenize(piece)) <= room else tokenize(_piece(255, spelling))
        if len(tokens) == _PHRASE_TOKENS:
            break
    detokenizer = Detokenizer()
    return tuple((detokenizer.push(token), (token,)) for token in tokens)


def _piece(chosen: int, spelling: Sequence[int]) -> str:
    if chosen < 40:
        return _WIDE[chosen % len(_WIDE)]
    if chosen < 60:
        return ",.;\n"[chosen % 4]
    return " " + "".join(_SOUNDS[at % 2][value % 8] for at, value in enumerate(spelling[: 2 + chosen % 3]))


_TABLE: Final = tuple(_phrase(number) for number in range(_PHRASES))
_TABLE_TOKENS: Final = tuple(tuple(token for _, (token,) in phrase) for phrase in _TABLE)
