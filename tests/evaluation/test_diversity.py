import math
import statistics

import pytest
from sacrebleu.metrics.bleu import BLEU

from akl_lightning.evaluation.diversity import distinct, diversity, self_bleu


def test_distinct_by_hand() -> None:
    answers = ["the cat sat", "the cat ran.", "the dog"]
    # the cat sat the cat ran . the dog; punctuation is a word of its own, and no n-gram crosses two answers.
    assert distinct(answers, 1) == 6 / 9
    assert distinct(answers, 2) == 5 / 6
    assert distinct(answers, 3) == 3 / 3
    assert distinct(answers, 4) == 1 / 1
    assert math.isnan(distinct(["two words"], 3)) and math.isnan(distinct([], 1))


def test_self_bleu_is_the_mean_bleu_against_the_others() -> None:
    group = ["the cat sat on the mat today", "the cat sat on the mat", "a dog ran in the park today"]
    bleu = BLEU(effective_order=True)
    expected = statistics.fmean(
        bleu.sentence_score(group[i], [group[j] for j in range(3) if j != i]).score for i in range(3)
    )
    assert self_bleu([group, ["no other answer"]]) == pytest.approx(expected)
    assert self_bleu([["same words here now"] * 5]) == pytest.approx(100)
    assert self_bleu([["one thing here", "something quite else"]]) < 40
    assert math.isnan(self_bleu([["alone"], []]))


def test_empty_answers_are_counted_and_harm_nothing() -> None:
    figures = diversity([["", "a cat sat down"], ["", ""]])
    assert figures["empty_answers"] == 3
    assert (figures["length"], figures["length_min"], figures["length_max"]) == (1, 0, 4)
    assert figures["length_sd"] == pytest.approx(statistics.pstdev([0, 4, 0, 0]))
    assert figures["distinct_1"] == 1 and figures["self_bleu"] == 0
