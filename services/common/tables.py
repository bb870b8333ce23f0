"""The tables of the mesh's SQL database."""

from typing import Final

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text
from sqlalchemy.dialects.sqlite import REAL

__all__ = [
    "AUDIT",
    "BATCHES",
    "BATCH_RESULTS",
    "COUNTERS",
    "FILES",
    "FILE_CHUNKS",
    "KEYS",
    "METADATA",
    "USAGE",
    "VERSION",
]

METADATA: Final = MetaData()
"""All of them."""
VERSION: Final = 3
"""Goes up whenever one of them changes."""

# SQLite's strict tables know few names of types.
_SECONDS: Final[Double[float]] = Double().with_variant(REAL(), "sqlite")
_COUNT: Final = BigInteger().with_variant(Integer(), "sqlite")

KEYS: Final = Table(
    "keys",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("models", Text),
    Column("priority", Integer, nullable=False),
    Column("admin", Integer, nullable=False),
    Column("debug", Integer, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("endpoints", Text),
    Column("allow_degrade", Integer, nullable=False, server_default="0"),
    Column("rpm", _COUNT),
    Column("tpm", _COUNT),
    Column("concurrency", _COUNT),
    Column("budget", _SECONDS),
    Column("expires_at", _SECONDS),
    Column("old_hash", LargeBinary),
    Column("old_until", _SECONDS),
)
"""API keys, by the hashes of their secrets."""

USAGE: Final = Table(
    "usage",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("time", _SECONDS, nullable=False),
    Column("month", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("worker", Text, nullable=False),
    Column("prompt_tokens", _COUNT, nullable=False),
    Column("cached_tokens", _COUNT, nullable=False),
    Column("output_tokens", _COUNT, nullable=False),
    Column("ttft_seconds", _SECONDS),
    Column("tpot_seconds", _SECONDS),
    Column("queue_seconds", _SECONDS),
    Column("prefill_seconds", _SECONDS),
    Column("duration_seconds", _SECONDS),
    Column("gpu_seconds", _SECONDS, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("cost", _SECONDS, nullable=False),
    Column("moves", Text),
    Index("usage_by_key", "key_id", "month"),
    Index("usage_by_tenant", "tenant", "month"),
    Index("usage_by_time", "time"),
    Index("usage_by_request", "request_id"),
)
"""One row for each request that was let in."""

AUDIT: Final = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", _SECONDS, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("detail", Text, nullable=False),
)
"""Who changed what."""

COUNTERS: Final = Table(
    "counters", METADATA, Column("name", Text, primary_key=True), Column("value", _COUNT, nullable=False)
)
"""Numbers that move when something else has changed, and the version of the tables."""

FILES: Final = Table(
    "files",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", _COUNT, nullable=False),
    Column("complete", Integer, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("expires_at", _SECONDS),
    Index("files_by_tenant", "tenant", "created_at"),
)
"""Files that clients sent or batches made."""

FILE_CHUNKS: Final = Table(
    "file_chunks",
    METADATA,
    Column("file_id", Text, primary_key=True),
    Column("number", _COUNT, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
"""What is in the files, in order."""

BATCHES: Final = Table(
    "batches",
    METADATA,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("identity", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("status", Text, nullable=False),
    Column("errors", Text),
    Column("metadata", Text),
    Column("times", Text, nullable=False),
    Column("created_at", _SECONDS, nullable=False),
    Column("expires_at", _SECONDS, nullable=False),
    Column("total", _COUNT, nullable=False, server_default="0"),
    Column("owner", Text),
    Column("owned_until", _SECONDS, nullable=False, server_default="0"),
    Index("batches_by_tenant", "tenant", "created_at"),
    Index("batches_by_status", "status"),
)
"""Jobs of many requests."""

BATCH_RESULTS: Final = Table(
    "batch_results",
    METADATA,
    Column("batch_id", Text, primary_key=True),
    Column("line", _COUNT, primary_key=True),
    Column("ok", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
"""What became of each line of a batch's input."""
