"""What the deltas of a chat come to when a client puts them together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.inference.output import Delta

__all__ = ["Said", "put_together"]


@dataclass
class Said:
    """What deltas come to when they are put together."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, text: str, reasoning: str, calls: Sequence[tuple[int, str, str, str]]) -> None:
        """One more delta; calls are index, id, name and arguments."""
        self.text += text
        self.reasoning += reasoning
        for index, call_id, name, arguments in calls:
            assert index <= len(self.calls)
            if index == len(self.calls):
                assert call_id
                self.calls.append(("", ""))
                self.ids.append(call_id)
            else:
                assert not call_id
            before = self.calls[index]
            self.calls[index] = (before[0] + name, before[1] + arguments)


def put_together(deltas: Sequence[Delta], choice: int = 0) -> Said:
    """What a client makes of the deltas of a choice."""
    said = Said()
    for delta in deltas:
        if delta.choice == choice:
            calls = [(call.index, call.id, call.name, call.arguments_json) for call in delta.tool_calls]
            said.add(delta.text, delta.reasoning, calls)
    return said
