"""How much a model's answers differ from each other.

Texts are split into words as sacrebleu does by default (the ``13a`` tokenizer of WMT).
"""

import statistics
from collections.abc import Iterable, Sequence

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_tokenize = Tokenizer13a()


def _words(answer: str) -> list[str]:
    return _tokenize(answer).split()


def distinct(answers: Iterable[str], n: int) -> float:
    """distinct-n: different n-grams as a share of all n-grams of all answers.

    Args:
        answers: of one model, to any prompts.
        n: words of an n-gram.

    Returns:
        Between 0 and 1; NaN where no answer has n words.

    Source: Li et al. 2016, arXiv 1510.03055.

    >>> distinct(["a cat and a dog"], 1)
    0.8
    """
    from nltk import ngrams  # a tenth of a second, and every command imports this file

    found = [ngram for answer in answers for ngram in ngrams(_words(answer), n)]
    return len(set(found)) / len(found) if found else float("nan")


def self_bleu(groups: Iterable[Sequence[str]]) -> float:
    """Self-BLEU: BLEU of each answer with the other answers to its prompt as references; the lower, the more diverse.

    It is the mean over all answers of sacrebleu's sentence BLEU, up to 4-grams or as many as the answer has.

    Args:
        groups: for each prompt the answers to it, of different seeds; a group of one has no say.

    Returns:
        Between 0 and 100; NaN where no prompt has two answers.

    Source: Zhu et al. 2018, arXiv 1802.01886.

    >>> round(self_bleu([["a cat sat", "a cat sat"]]))
    100
    """
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(answer, [*group[:index], *group[index + 1 :]]).score
        for group in groups
        if len(group) > 1
        for index, answer in enumerate(group)
    ]
    return statistics.fmean(scores) if scores else float("nan")


def diversity(groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """Every figure of diversity.

    Args:
        groups: for each prompt the answers to it, of different seeds.

    Returns:
        ``distinct_1`` to ``distinct_4`` (:func:`distinct`), ``self_bleu`` (:func:`self_bleu`), ``length``,
        ``length_sd``, ``length_min`` and ``length_max`` (words per answer), ``empty_answers`` (a number).

    >>> figures = diversity([["a cat sat", ""]])
    >>> figures["length"], figures["empty_answers"], figures["self_bleu"]
    (1.5, 1, 0.0)
    """
    answers = [answer for group in groups for answer in group]
    lengths = [len(_words(answer)) for answer in answers]
    return {
        **{f"distinct_{n}": distinct(answers, n) for n in range(1, 5)},
        "self_bleu": self_bleu(groups),
        "length": statistics.fmean(lengths),
        "length_sd": statistics.pstdev(lengths),
        "length_min": min(lengths),
        "length_max": max(lengths),
        "empty_answers": lengths.count(0),
    }
