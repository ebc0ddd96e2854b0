"""ROUGE-L as the evaluation of MiniLLM computes it."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics.functional.text import rouge_score


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F-measure of ROUGE-L with stemming, each answer against the best of its references, times 100.

    An empty answer scores 0. Empty references are passed over, and so is, with a warning, an answer that has no other.

    Args:
        answers: one per sample.
        references: the references of each sample.

    Returns:
        Percent; NaN where no sample has a reference.

    Source: Lin 2004, and MiniLLM's evaluation, arXiv 2306.08543; equal to ``rouge-score``'s.

    >>> rouge_l(["the cats sat", "a dog"], [["the cat sat", "a cat sat down"], ["a bird"]])
    75.0
    """
    pairs = [
        (answer, usable)
        for answer, given in zip(answers, references, strict=True)
        if (usable := [reference for reference in given if reference.strip()])
    ]
    if len(pairs) < len(answers):
        rank_zero_warn(f"ROUGE-L leaves out {len(answers) - len(pairs)} of {len(answers)} samples without a reference.")
    if not pairs:
        return float("nan")
    scores = rouge_score(
        [answer for answer, _ in pairs],
        [usable for _, usable in pairs],
        accumulate="best",
        use_stemmer=True,
        rouge_keys="rougeL",
    )
    return 100 * scores["rougeL_fmeasure"].item()
