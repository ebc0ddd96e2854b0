"""What is warned of, by hand."""

import warnings

import pytest
import torch

from akl_lightning.rollouts.watch import WINDOW, Watch


def test_a_collapse_in_length_is_said_once() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look([40] * WINDOW, [False] * WINDOW)
        watch.look([8] * WINDOW, [False] * WINDOW)  # exactly a fifth
    with pytest.warns(UserWarning, match="collapsed from 40 to 7 tokens.*learning rate"):
        watch.look([7] * WINDOW, [False] * WINDOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look([1] * WINDOW, [False] * WINDOW)


def test_all_cut_is_said_of_a_whole_window_only() -> None:
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look([40] * (WINDOW - 1), [True] * (WINDOW - 1))
        watch.look([40], [False])
    with pytest.warns(UserWarning, match=f"last {WINDOW} rollouts were all cut off.*max_new_tokens"):
        watch.look([40] * WINDOW, [True] * WINDOW)


def test_a_student_that_is_sure_of_itself_is_said() -> None:
    watch = Watch()
    watch.add_entropy(torch.full((WINDOW,), 0.051))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look([5], [False])
    watch.add_entropy(torch.full((WINDOW - 1,), 0.049))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look([5], [False])  # too few to say
    watch.add_entropy(torch.full((1,), 0.049))
    with pytest.warns(UserWarning, match="entropy on its rollouts is 0.049"):
        watch.look([5], [False])


def test_rollouts_that_the_teacher_does_not_stand_beside_are_said() -> None:
    watch, other, older = Watch(), Watch(), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look_at_aligned([(2, 10)] * WINDOW, 0, 100)  # exactly a fifth
        other.load(watch.state())
        older.load({name: value for name, value in watch.state().items() if name != "aligned"})
        older.look_at_aligned([(0, 10)], 0, None)
    with pytest.warns(UserWarning, match="of the 640 tokens of the last 64 rollouts only 126 are aligned"):
        other.look_at_aligned([(0, 10)], 0, None)
    with pytest.warns(UserWarning, match="2 of 3 rollouts fill the 1,024 positions of the teacher.*max_new_tokens"):
        other.look_at_aligned([(5, 10)] * 3, 2, 1024)


def test_a_run_that_goes_on_knows_where_it_began() -> None:
    watch, other = Watch(), Watch()
    watch.look([40] * WINDOW, [False] * WINDOW)
    other.load(watch.state())
    with pytest.warns(UserWarning, match="collapsed from 40 to 2"):
        other.look([2] * WINDOW, [False] * WINDOW)
