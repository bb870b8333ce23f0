"""What routers are told of a prefix cache."""

from services.common.prefix import root, salt_of, token_block_hashes
from services.inference.cache_journal import CacheBatch, CacheJournal
from services.inference.vllm_kv_events import BlockNames


def test_a_new_reader_is_told_what_is_there_and_then_what_changes() -> None:
    journal = CacheJournal()
    journal.store(1)
    reader = journal.reader()
    assert list(reader.batches()) == [CacheBatch(1, cleared=True, stored=[1])]
    assert reader.is_empty
    journal.store(2)
    journal.remove(1)
    journal.store(3)
    journal.remove(3)
    assert list(reader.batches()) == [CacheBatch(2, stored=[2], removed=[1])]
    journal.clear()
    journal.store(4)
    assert list(reader.batches()) == [CacheBatch(3, cleared=True, stored=[4])]


def test_messages_are_bounded_and_readers_know_nothing_of_each_other() -> None:
    journal = CacheJournal()
    first = journal.reader()
    for block in range(10_000):
        journal.store(block)
    assert [len(batch.stored) for batch in first.batches()] == [4096, 4096, 1808]
    second = journal.reader()
    assert [batch.number for batch in second.batches()] == [1, 2, 3]


def stored(hashes: list[int], tokens: list[int], *, parent: int | None = None, **others: object) -> dict[str, object]:
    event = {"block_hashes": hashes, "token_ids": tokens, "block_size": 2, "parent_block_hash": parent}
    return {"lora_name": None, **event, **others}


def test_vllms_blocks_get_the_names_of_the_mesh() -> None:
    journal = CacheJournal()
    names = BlockNames("demo", journal)
    names.stored(stored([71, 72], [1, 2, 3, 4]))
    names.stored(stored([73], [5, 6], parent=72))
    expected = token_block_hashes([1, 2, 3, 4, 5, 6], 2, salt=salt_of("demo"))
    assert list(journal.present) == expected
    names.removed([73, 99])
    assert list(journal.present) == expected[:2]
    names.clear()
    names.stored(stored([74], [7, 8], parent=72))
    assert not journal.present, "what follows an unknown block is unknown"


def test_salts_and_adapters_keep_blocks_apart_and_what_is_no_text_is_left_out() -> None:
    journal = CacheJournal()
    names = BlockNames("demo", journal)
    names.stored(stored([1], [1, 2], extra_keys=[["secret"]]))
    names.stored(stored([2], [1, 2], lora_name="poet", extra_keys=[["poet"]]))
    names.stored(stored([3], [1, 2], lora_name="poet", extra_keys=[["poet", "secret"]]))
    names.stored(stored([4], [9, 9], extra_keys=[[["image", 0]]]))
    names.stored(stored([5], [8, 8], group_idx=1))
    salts = salt_of("demo", "secret"), salt_of("poet"), salt_of("poet", "secret")
    assert list(journal.present) == [token_block_hashes([1, 2], 2, salt=salt)[0] for salt in salts]
    assert len(root("")) == 8
