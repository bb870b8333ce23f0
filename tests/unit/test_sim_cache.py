"""The simulated engine's KV blocks."""

from services.inference.sim_cache import BlockPool, block_hashes


def test_a_block_hash_depends_on_everything_before_it() -> None:
    first, second = block_hashes([1, 2, 3, 4], 2, after=0)
    assert block_hashes([1, 2, 3, 4, 5], 2, after=0) == [first, second]
    assert block_hashes([9, 2, 3, 4], 2, after=0)[1] != second
    assert block_hashes([3, 4], 2, after=first) == [second]
    assert block_hashes([1], 2, after=0) == []


def test_blocks_are_held_and_let_go() -> None:
    pool = BlockPool(4)
    assert pool.admit([], 3)
    assert pool.usage == 0.75
    assert not pool.admit([], 2)
    assert pool.grow()
    assert not pool.grow()
    pool.release([], 4)
    assert pool.usage == 0


def test_a_shared_block_is_found_after_its_last_holder_left() -> None:
    pool = BlockPool(4)
    assert pool.admit([], 2)
    pool.share(11)
    pool.share(12)
    assert pool.lookup([11, 12, 13]) == 2
    pool.release([11, 12], 0)
    assert pool.usage == 0
    assert pool.lookup([11, 12]) == 2
    assert pool.admit([11, 12], 2)
    assert pool.usage == 1


def test_two_holders_share_one_block() -> None:
    pool = BlockPool(4)
    assert pool.admit([], 1)
    assert pool.admit([], 1)
    pool.share(11)
    pool.share(11)
    assert pool.available == 3
    pool.release([11], 0)
    assert pool.available == 3
    pool.release([11], 0)
    assert pool.available == 4


def test_the_end_of_the_longest_unused_prefix_is_forgotten_first() -> None:
    pool = BlockPool(4)
    for blocks in ([11, 12], [21, 22]):
        assert pool.admit([], 2)
        for block in blocks:
            pool.share(block)
    pool.release([11, 12], 0)
    pool.release([21, 22], 0)
    assert pool.grow()
    assert pool.lookup([11, 12]) == 1
    assert pool.lookup([21, 22]) == 2


def test_blocks_that_are_admitted_again_are_not_given_away() -> None:
    pool = BlockPool(2)
    assert pool.admit([], 2)
    pool.share(11)
    pool.share(12)
    pool.release([11, 12], 0)
    assert not pool.admit([11], 2)
    assert pool.admit([11], 1)
    assert pool.lookup([11, 12]) == 1
