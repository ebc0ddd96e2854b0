import json
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from akl_lightning.data.sources import Docstrings
from akl_lightning.evaluation.rouge import rouge_l


@pytest.mark.parametrize("count", [1, 3])
def test_equal_to_rouge_score_on_docstrings(count: int) -> None:
    texts = [json.loads(messages)[1]["content"] for messages in Docstrings().load()["train"][:600]["messages"]]
    draw = random.Random(0)
    # Answers that share something with their references: some words of one of them, shuffled a little.
    references = [draw.sample(texts, count) for _ in range(150)]
    answers = [" ".join(draw.sample(words := given[0].split(), len(words) // 2)) for given in references]
    answers[:3] = ["", "...", "Ünïcode, running runners ran 3.14 times"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        scorer.score_multi(given, answer)["rougeL"].fmeasure for answer, given in zip(answers, references, strict=True)
    ]
    assert max(expected) > 0.5 > min(expected)
    assert rouge_l(answers, references) / 100 == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_samples_without_a_reference_are_named_and_left_out() -> None:
    with pytest.warns(UserWarning, match="leaves out 2 of 3 samples without a reference"):
        assert rouge_l(["a cat", "a cat", "a cat"], [["a cat"], [], [" ", ""]]) == 100
    with pytest.warns(UserWarning, match="leaves out 1 of 1"):
        assert rouge_l(["a cat"], [[""]]) != rouge_l(["a cat"], [[""]])  # NaN
    assert rouge_l(["", "a cat"], [["a cat"], ["", "a cat"]]) == 50
