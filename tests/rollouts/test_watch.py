"""What is warned of, by hand."""

import warnings

import pytest
import torch

from akl_lightning.rollouts.batches import Answer
from akl_lightning.rollouts.watch import WINDOW, Watch


def look(watch: Watch, lengths: list[int], cut: list[bool], ranks: int = 1) -> None:
    """What a rank has seen, and the same number of rollouts of 40 tokens on each of the others."""
    own = [Answer([1], [2] * length, is_cut, True) for length, is_cut in zip(lengths, cut, strict=True)]
    others = [Answer([1], [2] * 40, False, True), Answer([1], [2], True, False)] * len(own)
    watch.look([watch.seen(own), *(Watch().seen(others) for _ in range(ranks - 1))])


def read(watch: Watch, aligned: list[tuple[int, int]], beyond: int, positions: int | None) -> None:
    """What a teacher with another tokenizer has read on one rank."""
    watch.add_aligned(aligned, beyond, positions)
    watch.look([watch.seen([])])


def test_a_collapse_in_length_is_said_once() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [40] * WINDOW, [False] * WINDOW)
        look(watch, [8] * WINDOW, [False] * WINDOW)  # exactly a fifth
    with pytest.warns(UserWarning, match="collapsed from 40 to 7 tokens.*learning rate"):
        look(watch, [7] * WINDOW, [False] * WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [1] * WINDOW, [False] * WINDOW)


def test_all_cut_is_said_of_a_whole_window_only() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [40] * (WINDOW - 1), [True] * (WINDOW - 1))
        look(watch, [40], [False])
    with pytest.warns(UserWarning, match=f"last {WINDOW} rollouts were all cut off.*max_new_tokens"):
        look(watch, [40] * WINDOW, [True] * WINDOW)


def test_a_student_that_is_sure_of_itself_is_said() -> None:
    watch = Watch()
    watch.add_entropy(torch.full((WINDOW,), 0.051))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [5], [False])
    watch.add_entropy(torch.full((WINDOW - 1,), 0.049))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [5], [False])  # too few to say
    watch.add_entropy(torch.full((1,), 0.049))
    with pytest.warns(UserWarning, match="entropy on its rollouts is 0.049"):
        look(watch, [5], [False])


def test_rollouts_that_the_teacher_does_not_stand_beside_are_said() -> None:
    watch, other, older = Watch(), Watch(), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(watch, [(2, 10)] * WINDOW, 0, 100)  # exactly a fifth
        other.load(watch.state())
        older.load({name: value for name, value in watch.state().items() if name != "aligned"})
        read(older, [(0, 10)], 0, None)
    with pytest.warns(UserWarning, match="of the 640 tokens of the last 64 rollouts only 126 are aligned"):
        read(other, [(0, 10)], 0, None)
    watch.add_aligned([(5, 10)], 1, 1024)
    other.add_aligned([(5, 10)] * 2, 1, 1024)
    with pytest.warns(UserWarning, match="2 of 3 rollouts fill the 1,024 positions of the teacher.*max_new_tokens"):
        other.look([watch.seen([]) for watch in (watch, other)])  # of two ranks


def test_a_run_that_goes_on_knows_where_it_began() -> None:
    watch, other = Watch(), Watch()
    look(watch, [40] * WINDOW, [False] * WINDOW)
    other.load(watch.state())
    with pytest.warns(UserWarning, match="collapsed from 40 to 2"):
        look(other, [2] * WINDOW, [False] * WINDOW)


def test_the_rollouts_of_all_ranks_count_and_no_answer_of_a_teacher() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(watch, [40] * 16, [False] * 16, ranks=4)
        look(watch, [1] * 16, [True] * 16, ranks=4)  # of one rank in four
    state = watch.state()
    assert state["lengths"] == [1] * 16 + [40] * 48 and state["cut"] == [True] * 16 + [False] * 48


def test_the_entropy_is_the_mean_over_the_tokens_of_all_ranks() -> None:
    watches = [Watch(), Watch()]
    watches[0].add_entropy(torch.full((48,), 0.01))
    watches[1].add_entropy(torch.full((16,), 0.13))  # 0.04 on the mean
    with pytest.warns(UserWarning, match="entropy on its rollouts is 0.040"):
        watches[0].look([watch.seen([]) for watch in watches])
