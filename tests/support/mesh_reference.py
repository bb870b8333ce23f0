"""docs/mesh-yaml.md from the code: `python -m tests.support.mesh_reference > docs/mesh-yaml.md`."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import inspect as shapes

from services.mesh.config import MeshConfig

__all__ = ["reference"]

_HEAD: Final = """\
# mesh.yaml

Every key that there is, written from the code by `python -m tests.support.mesh_reference > docs/mesh-yaml.md`. What has
no default has to be said. A key that isn't here is refused by its name, and so is a value that doesn't fit;
`tokenloom plan --config mesh.yaml` tells it before anything starts.
"""
_TYPES: Final[dict[type, str]] = {
    shapes.BoolType: "true or false",
    shapes.NoneType: "null",
    shapes.AnyType: "anything",
    shapes.StrType: "text",
}
_BOUNDS: Final = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))


def reference() -> str:
    """The whole document, in Markdown."""
    return "\n".join((_HEAD, *_sections())) + "\n"


def _sections() -> Iterator[str]:
    for place, shape in _structs():
        yield f"\n## {f'`{place}`' if place else 'The file'}\n\n{_sentence(inspect.getdoc(shape.cls) or '')}\n"
        yield "| key | value | default | |\n|---|---|---|---|"
        texts = _texts(shape.cls)
        if shape.tag is not None:
            yield f"| `{shape.tag_field}` | `{shape.tag}` | | says that it is this one |"
        for field in shape.fields:
            cells = (f"`{field.encode_name}`", _kind(field.type), _default(field), texts.get(field.name, ""))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _structs() -> Iterator[tuple[str, shapes.StructType]]:
    """Each, at the first place where it may stand, those of one file before those inside of them."""
    seen: set[type] = set()
    waiting: list[tuple[str, shapes.StructType]] = []
    first = shapes.type_info(MeshConfig)
    assert isinstance(first, shapes.StructType)
    waiting.append(("", first))
    while waiting:
        place, shape = waiting.pop(0)
        if shape.cls in seen:
            continue
        seen.add(shape.cls)
        yield place, shape
        nested = [
            one for field in shape.fields for one in _inside(field.type, f"{place}.{field.encode_name}".lstrip("."))
        ]
        waiting = nested + waiting


def _inside(kind: shapes.Type, place: str) -> Iterator[tuple[str, shapes.StructType]]:
    if isinstance(kind, shapes.StructType):
        yield place, kind
    elif isinstance(kind, shapes.Metadata):
        yield from _inside(kind.type, place)
    elif isinstance(kind, shapes.UnionType):
        for one in kind.types:
            yield from _inside(one, place)
    elif isinstance(kind, shapes.ListType | shapes.VarTupleType):
        yield from _inside(kind.item_type, f"{place}[]")
    elif isinstance(kind, shapes.DictType):
        yield from _inside(kind.value_type, f"{place}.NAME")


def _kind(kind: shapes.Type) -> str:
    if isinstance(kind, shapes.Metadata):
        return _kind(kind.type)
    if isinstance(kind, shapes.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in kind.types))
    if isinstance(kind, shapes.ListType | shapes.VarTupleType):
        return f"list of {_kind(kind.item_type)}"
    if isinstance(kind, shapes.DictType):
        return f"map of names to {_kind(kind.value_type)}"
    return _single(kind)


def _single(kind: shapes.Type) -> str:
    if isinstance(kind, shapes.StructType):
        return f"`{kind.tag}`" if kind.tag is not None else "keys, see below"
    if isinstance(kind, shapes.LiteralType):
        return " or ".join(f"`{value}`" for value in sorted(kind.values, key=str))
    if isinstance(kind, shapes.IntType | shapes.FloatType):
        said = [words.format(getattr(kind, name)) for name, words in _BOUNDS if getattr(kind, name) is not None]
        return " ".join(("whole number" if isinstance(kind, shapes.IntType) else "number", ", ".join(said))).strip()
    return _TYPES[type(kind)]


def _default(field: shapes.Field) -> str:
    if field.required:
        return "—"
    value: Any = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory() if callable(field.default_factory) else None
    if isinstance(value, msgspec.Struct):
        return "its own"
    return f"`{msgspec.json.encode(value).decode()}`"


def _texts(shape: type) -> dict[str, str]:
    """What stands below each attribute of a class, and of those that it comes from."""
    found: dict[str, str] = {}
    for one in reversed(shape.__mro__):
        if one.__module__.startswith("services."):
            found |= _own_texts(one)
    return found


def _own_texts(shape: type) -> dict[str, str]:
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(shape))).body
    assert isinstance(made, ast.ClassDef)
    found: dict[str, str] = {}
    for key, text in zip(made.body, made.body[1:], strict=False):
        if not (isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[key.target.id] = _sentence(str(text.value.value))
    return found


def _sentence(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(reference())
