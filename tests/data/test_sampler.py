import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from akl_lightning.data.sampler import FILLER, StepSampler


def batches(sampler: StepSampler) -> list[list[int]]:
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[start : start + sampler.batch_size] for start in range(0, len(order), sampler.batch_size)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=120),
    st.sampled_from([(1, 16, 1), (1, 4, 4), (2, 8, 1), (2, 2, 4), (4, 4, 1)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_the_samples_of_a_step_do_not_depend_on_the_split(
    lengths: list[int], split: tuple[int, int, int], shuffle: bool, group: bool, epoch: int
) -> None:
    ranks, batch_size, accumulate = split

    def steps(ranks: int, batch_size: int, accumulate: int) -> list[list[int]]:
        dealt = []
        for rank in range(ranks):
            sampler = StepSampler(lengths, batch_size, 16, ranks, rank, shuffle, group, seed=7)
            sampler.set_epoch(epoch)
            dealt.append(batches(sampler))
        assert len({len(mine) for mine in dealt}) == 1, "a rank would wait for another"
        return [
            sorted(i for mine in dealt for batch in mine[start : start + accumulate] for i in batch if i != FILLER)
            for start in range(0, len(dealt[0]), accumulate)
        ]

    whole = steps(1, 16, 1)
    assert steps(ranks, batch_size, accumulate) == whole
    assert sorted(i for step in whole for i in step) == list(range(len(lengths))), "each sample exactly once"


def test_epochs_differ_and_repeat() -> None:
    sampler = StepSampler(range(100), 4, 4, shuffle=True, group_by_length=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_no_epoch_of_a_seed_has_the_order_of_an_epoch_of_another() -> None:
    orders = set()
    for seed in range(-2, 6):
        for epoch in range(6):
            sampler = StepSampler(range(100), 4, 4, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 8 * 6


def test_grouping_saves_padding() -> None:
    lengths = [1 + (37 * i) % 101 for i in range(640)]

    def padding(group: bool) -> float:
        sampler = StepSampler(lengths, 16, 16, shuffle=True, group_by_length=group)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches(sampler)) / sum(lengths) - 1

    assert padding(group=True) < 0.1 < padding(group=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_a_sample_gets_a_filler(rank: int) -> None:
    assert list(StepSampler([5, 5, 5], 1, 2, 2, rank, shuffle=False)) == [[0, 2], [1, FILLER]][rank]
