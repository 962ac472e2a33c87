"""Sharing whole batches over processes."""

import pytest

from lightning_prune.world import World


@pytest.mark.parametrize(("batches", "size"), [(1, 1), (5, 1), (5, 2), (4, 2), (1, 3), (7, 3)])
def test_every_batch_is_taken_and_all_take_equally_many(batches: int, size: int) -> None:
    shares = [list(World(rank, size).share(batches)) for rank in range(size)]
    assert {index for share in shares for index in share} == set(range(batches))
    assert len({len(share) for share in shares}) == 1


def test_alone_it_takes_them_in_order_and_merges_in_order() -> None:
    world = World.current()
    assert (world.rank, world.size) == (0, 1)
    assert list(world.share(3)) == [0, 1, 2]
    assert world.merge({1: "b", 0: "a", 2: "c"}) == ["a", "b", "c"]
