"""Answers a question from your own texts: embeddings and chat of a mesh, and Qdrant as the vector database.

    pip install openai qdrant-client
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=tl-…
    python examples/rag.py --documents notes/ "Who may restart a worker?"

Every paragraph of the *.txt and *.md files becomes a point of the collection; those nearest to the question go into the
prompt. With --store a folder keeps the collection, and nothing is embedded again; QdrantClient(url=…) is all that a
Qdrant server needs instead.
"""

import argparse
import uuid
from collections.abc import Iterator
from pathlib import Path

import openai
from qdrant_client import QdrantClient, models

_COLLECTION = "paragraphs"
_AT_A_TIME = 32
_INSTRUCTIONS = "Answer from the sources alone, and name them as [1]. Say so when they do not tell."


def main() -> None:
    arguments = _arguments()
    mesh = openai.OpenAI()
    store = QdrantClient(path=str(arguments.store)) if arguments.store else QdrantClient(":memory:")
    fill(store, mesh, arguments.embedding_model, arguments.documents)
    sources = search(store, mesh, arguments.embedding_model, arguments.question, arguments.sources)
    for number, source in enumerate(sources, 1):
        print(f"[{number}] {source}")
    print()
    for piece in answer(mesh, arguments.model, arguments.question, sources, arguments.max_tokens):
        print(piece, end="", flush=True)
    print()
    store.close()


def fill(store: QdrantClient, mesh: openai.OpenAI, model: str, folder: Path) -> None:
    """Embeds every paragraph that isn't in the collection yet."""
    texts = {str(uuid.uuid5(uuid.NAMESPACE_URL, text)): text for text in paragraphs(folder)}
    if not texts:
        raise SystemExit(f"--documents: {folder} has no *.txt or *.md file with a paragraph")
    if store.collection_exists(_COLLECTION):
        known = {str(point.id) for point in store.retrieve(_COLLECTION, list(texts), with_payload=False)}
        texts = {name: text for name, text in texts.items() if name not in known}
    waiting = list(texts.items())
    for begin in range(0, len(waiting), _AT_A_TIME):
        some = waiting[begin : begin + _AT_A_TIME]
        vectors = embed(mesh, model, [text for _, text in some])
        if not store.collection_exists(_COLLECTION):
            shape = models.VectorParams(size=len(vectors[0]), distance=models.Distance.COSINE)
            store.create_collection(_COLLECTION, vectors_config=shape)
        points = [
            models.PointStruct(id=name, vector=vector, payload={"text": text})
            for (name, text), vector in zip(some, vectors, strict=True)
        ]
        store.upsert(_COLLECTION, points)


def search(store: QdrantClient, mesh: openai.OpenAI, model: str, question: str, count: int) -> list[str]:
    """The paragraphs that are nearest to a question, the nearest first."""
    (vector,) = embed(mesh, model, [question])
    found = store.query_points(_COLLECTION, query=vector, limit=count).points
    return [str((point.payload or {})["text"]) for point in found]


def answer(mesh: openai.OpenAI, model: str, question: str, sources: list[str], max_tokens: int) -> Iterator[str]:
    """What the model makes of them, as it comes."""
    listed = "\n\n".join(f"[{number}] {source}" for number, source in enumerate(sources, 1))
    stream = mesh.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": _INSTRUCTIONS},
            {"role": "user", "content": f"{listed}\n\nQuestion: {question}"},
        ],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def embed(mesh: openai.OpenAI, model: str, texts: list[str]) -> list[list[float]]:
    return [entry.embedding for entry in mesh.embeddings.create(model=model, input=texts).data]


def paragraphs(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".txt", ".md"}:
            for text in file.read_text(encoding="utf-8").split("\n\n"):
                if text.strip():
                    yield " ".join(text.split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answers a question from your own texts.")
    parser.add_argument("question")
    parser.add_argument("--documents", type=Path, required=True, metavar="DIR")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keeps the collection; default: nothing does")
    parser.add_argument("--model", default="demo", help="a model that chats; default: %(default)s")
    parser.add_argument("--embedding-model", default="demo-embed", help="one that embeds; default: %(default)s")
    parser.add_argument("--sources", type=int, default=3, metavar="N", help="paragraphs to show it; default: 3")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
