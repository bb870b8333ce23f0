"""Files that clients sent or batches made, in the mesh's database."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, delete, func, select, update

from services.common.tables import FILE_CHUNKS, FILES
from services.gateway.stored import LateDatabase, behind

__all__ = ["CHUNK_BYTES", "FileRecord", "FileStore"]

CHUNK_BYTES: Final = 1 << 20
_ABANDONED_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What is known of a file."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    """Seconds since the epoch."""
    expires_at: float | None


class FileStore:
    """Files by id, each seen by its own tenant only. Every method waits for the database: call it in a thread."""

    def __init__(self, database: LateDatabase, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def begin(self, tenant: str, purpose: str) -> str:
        """Makes a file that is empty, and not seen until it is complete; returns its id."""
        file_id = f"file-{uuid.uuid4().hex}"
        values = {
            "id": file_id,
            "tenant": tenant,
            "filename": "",
            "purpose": purpose,
            "bytes": 0,
            "complete": 0,
            "created_at": self._clock(),
            "expires_at": None,
        }
        with self._database.writing() as connection:
            connection.execute(FILES.insert().values(values))
        return file_id

    def append(self, file_id: str, number: int, data: bytes) -> None:
        """Adds chunk `number`, from 0."""
        with self._database.writing() as connection:
            connection.execute(FILE_CHUNKS.insert().values(file_id=file_id, number=number, data=data))
            connection.execute(update(FILES).where(FILES.c.id == file_id).values(bytes=FILES.c.bytes + len(data)))

    def complete(self, file_id: str, *, filename: str, expires_in: float | None = None) -> FileRecord:
        """Lets a file be seen."""
        expires_at = None if expires_in is None else self._clock() + expires_in
        with self._database.writing() as connection:
            values = {"complete": 1, "filename": filename, "expires_at": expires_at}
            connection.execute(update(FILES).where(FILES.c.id == file_id).values(values))
            row = connection.execute(select(FILES).where(FILES.c.id == file_id)).one()
        return _record(row)

    def write(self, tenant: str, filename: str, purpose: str, parts: Iterator[bytes]) -> FileRecord:
        """Makes a file of these parts."""
        file_id = self.begin(tenant, purpose)
        number, buffer = 0, bytearray()
        for part in parts:
            buffer += part
            if len(buffer) >= CHUNK_BYTES:
                self.append(file_id, number, bytes(buffer))
                number, buffer = number + 1, bytearray()
        self.append(file_id, number, bytes(buffer))
        return self.complete(file_id, filename=filename)

    def find(self, tenant: str, file_id: str) -> FileRecord | None:
        """A file; None when there is none, or it isn't this tenant's."""
        with self._database.reading() as connection:
            row = connection.execute(
                select(FILES).where(FILES.c.id == file_id, FILES.c.tenant == tenant, *self._seen())
            ).first()
        return None if row is None else _record(row)

    def list(
        self, tenant: str, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> Sequence[FileRecord]:
        """The files of a tenant, from behind `after` on."""
        order = (FILES.c.created_at.desc(), FILES.c.id) if newest_first else (FILES.c.created_at, FILES.c.id)
        query = select(FILES).where(FILES.c.tenant == tenant, *self._seen()).order_by(*order)
        if purpose is not None:
            query = query.where(FILES.c.purpose == purpose)
        with self._database.reading() as connection:
            if after is not None:
                query = query.where(behind(connection, FILES, after, newest_first=newest_first))
            return [_record(row) for row in connection.execute(query.limit(limit))]

    def used_bytes(self, tenant: str) -> int:
        """What a tenant's files hold."""
        with self._database.reading() as connection:
            total = connection.execute(select(func.sum(FILES.c.bytes)).where(FILES.c.tenant == tenant)).scalar()
        return int(total or 0)

    def chunk(self, file_id: str, number: int) -> bytes | None:
        """Chunk `number`; None behind the last one."""
        with self._database.reading() as connection:
            found = connection.execute(
                select(FILE_CHUNKS.c.data).where(FILE_CHUNKS.c.file_id == file_id, FILE_CHUNKS.c.number == number)
            ).scalar()
        return None if found is None else bytes(found)

    def lines(self, file_id: str) -> Iterator[bytes]:
        """The lines of a file, without their ends."""
        rest, number = b"", 0
        while (data := self.chunk(file_id, number)) is not None:
            *whole, rest = (rest + data).split(b"\n")
            yield from whole
            number += 1
        if rest:
            yield rest

    def delete(self, file_id: str) -> None:
        """Deletes a file, complete or not."""
        with self._database.writing() as connection:
            connection.execute(delete(FILE_CHUNKS).where(FILE_CHUNKS.c.file_id == file_id))
            connection.execute(delete(FILES).where(FILES.c.id == file_id))

    def sweep(self) -> int:
        """Deletes what expired, and what was begun an hour ago and never completed; returns how many."""
        now = self._clock()
        gone = (FILES.c.expires_at <= now) | ((FILES.c.complete == 0) & (FILES.c.created_at < now - _ABANDONED_SECONDS))
        with self._database.reading() as connection:
            ids = connection.execute(select(FILES.c.id).where(gone)).scalars().all()
        for file_id in ids:
            self.delete(file_id)
        return len(ids)

    def _seen(self) -> tuple[Any, ...]:
        return (FILES.c.complete == 1, FILES.c.expires_at.is_(None) | (FILES.c.expires_at > self._clock()))


def _record(row: Row[Any]) -> FileRecord:
    return FileRecord(
        id=row.id,
        tenant=row.tenant,
        filename=row.filename,
        purpose=row.purpose,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
