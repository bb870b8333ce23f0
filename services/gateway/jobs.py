"""Files and batches put together: their routes, and the runner that works on them."""

import msgspec

from services.common.settings_gateway import BatchSettings
from services.gateway.batch_runner import BatchRunner
from services.gateway.batch_store import BatchRecord, BatchStore
from services.gateway.batches import Batches
from services.gateway.file_store import FileStore
from services.gateway.files import Files
from services.gateway.identity import Identity, KeyDirectory
from services.gateway.inner_calls import InnerCalls
from services.gateway.put_off import put_off
from services.gateway.routes import Route
from services.gateway.stored import LateDatabase

__all__ = ["Jobs"]

_KEY_PREFIX = "key-"
"""Ids of keys of our own store; other identities come with tokens, which can't be looked up again."""


class Jobs:
    """What one gateway does about files and batches."""

    def __init__(self, settings: BatchSettings, database: LateDatabase, keys: KeyDirectory) -> None:
        self._settings = settings
        self._keys = keys
        self._files = FileStore(database)
        self._batches = BatchStore(database)
        self._files_api = Files(
            self._files, max_file_bytes=settings.max_file_bytes, max_tenant_bytes=settings.max_tenant_bytes
        )
        self._batches_api = Batches(self._batches, self._files)

    @property
    def routes(self) -> list[Route]:
        """What is served."""
        return [*self._files_api.routes, *self._batches_api.routes]

    def put_off(self, route: Route) -> Route:
        """A route whose requests may become batches."""
        return put_off(route, self._files_api, self._batches_api)

    async def run(self, calls: InnerCalls) -> None:
        """Works on batches until cancelled; `calls` make their requests."""
        if self._settings.concurrency == 0:
            return
        runner = BatchRunner(
            self._batches,
            self._files,
            calls,
            identity_of=self._identity_of,
            concurrency=self._settings.concurrency,
        )
        await runner.run()

    def _identity_of(self, batch: BatchRecord) -> Identity | None:
        # A key's present rights count, not those that it had when the batch was sent.
        if batch.key_id.startswith(_KEY_PREFIX):
            return self._keys.by_id(batch.key_id)
        return msgspec.json.decode(batch.identity, type=Identity)
