"""An answer on its way through filters, piece by piece."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from services.gateway.guard_text import BlockedError, Rule, TextStream
from services.gateway.moderation import Moderator
from services.gateway.pieces import CallPiece, Piece

__all__ = ["OutputGuard", "said_by"]

# A key of a text that grows on its own: the choice, and "text", "reasoning", or which call.
_Key = tuple[int, str | int]
_TEXT: Final = "text"
_REASONING: Final = "reasoning"
_UNREADABLE: Final = "unreadable"
"""The rule, so to speak, that refuses what a pattern takes too long for."""


class OutputGuard:
    """Lets out what is decided, and nothing any more once a rule refuses. With moderation, nothing before the end."""

    def __init__(self, rules: Sequence[Rule], moderators: Sequence[Moderator]) -> None:
        self._rules = rules
        self._moderators = moderators
        self._streams: dict[_Key, TextStream] = {}
        self._kept: list[str | Piece] = []
        self.blocked_by: str | None = None
        """The rule that refused the answer."""

    def feed(self, pieces: Iterable[str | Piece]) -> list[str | Piece]:
        """What can be let out by now."""
        if self.blocked_by is not None:
            return []
        let_out: list[str | Piece] = []
        try:
            for piece in pieces:
                self._pass(piece, let_out)
        except BlockedError as blocked:
            self.blocked_by = blocked.rule
        except TimeoutError:
            self.blocked_by = _UNREADABLE
        if self._moderators:
            self._kept += let_out
            return []
        return let_out

    async def finish(self) -> list[str | Piece]:
        """What was held back, at the end.

        Raises:
            MeshError: NO_READY_WORKER: a moderation service that must be asked does not answer.
        """
        held: list[str | Piece] = []
        if self.blocked_by is None:
            try:
                for key in list(self._streams):
                    self._flush(key, held)
            except BlockedError as blocked:
                self.blocked_by = blocked.rule
            except TimeoutError:
                self.blocked_by = _UNREADABLE
        if not self._moderators:
            return held
        kept, self._kept = [*self._kept, *held], []
        for moderator in self._moderators:
            if await moderator.flags("".join(map(said_by, kept))):
                self.blocked_by = "moderation"
                return []
        return kept

    def _pass(self, piece: str | Piece, let_out: list[str | Piece]) -> None:
        if isinstance(piece, str):
            text = self._filtered((0, _TEXT), piece, let_out)
            if text:
                let_out.append(text)
            return
        if piece.finish_reason is not None:
            for key in [key for key in self._streams if key[0] == piece.choice]:
                self._flush(key, let_out)
            let_out.append(piece)
            return
        reasoning = self._filtered((piece.choice, _REASONING), piece.reasoning, let_out)
        text = self._filtered((piece.choice, _TEXT), piece.text, let_out)
        calls = [
            replace(call, arguments=self._filtered((piece.choice, call.index), call.arguments, let_out))
            for call in piece.calls
        ]
        if reasoning or text or calls:
            let_out.append(replace(piece, reasoning=reasoning, text=text, calls=calls))

    def _filtered(self, key: _Key, text: str, let_out: list[str | Piece]) -> str:
        if not text:
            return ""
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = TextStream(self._rules)
        try:
            return stream.feed(text)
        except BlockedError as blocked:
            if blocked.before:
                let_out.append(_piece(key, blocked.before))
            raise

    def _flush(self, key: _Key, let_out: list[str | Piece]) -> None:
        try:
            text = self._streams.pop(key).finish()
        except BlockedError as blocked:
            if blocked.before:
                let_out.append(_piece(key, blocked.before))
            raise
        if text:
            let_out.append(_piece(key, text))


def _piece(key: _Key, text: str) -> Piece:
    choice, what = key
    if what == _TEXT:
        return Piece(choice=choice, text=text)
    if what == _REASONING:
        return Piece(choice=choice, reasoning=text)
    assert isinstance(what, int)
    return Piece(choice=choice, calls=[CallPiece(index=what, arguments=text)])


def said_by(piece: str | Piece) -> str:
    """All text of a piece."""
    if isinstance(piece, str):
        return piece
    return piece.reasoning + piece.text + "".join(call.arguments for call in piece.calls)
