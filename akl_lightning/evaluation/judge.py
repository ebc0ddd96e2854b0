"""Let a judge model compare the answers of two models, as the evaluation with GPT-4 of the AKL paper does.

The judge sees a question and both answers (:data:`PROMPT`, :data:`SYSTEM`; it is not shown the references) and rates
each from 1 to 10 on the first line of its reply. It is asked twice, with either answer first, since judges favour a
place; the mean of both decides. The prompt is that of Vicuna's evaluation, of FastChat (Zheng et al. 2023, arXiv
2306.05685); the mean over both orders is "balanced position calibration" (Wang et al. 2023, arXiv 2305.17926).
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from scipy.stats import binomtest

from akl_lightning.checkpoint import atomic_file, free_path
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.answers import AnswerPair, digest, pair_answers
from akl_lightning.evaluation.chat import ChatEndpoint, Reply, ReplyFile
from akl_lightning.rank_zero import rank_zero_warn

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
PROMPT = Path(__file__).with_name("judge_prompt.txt").read_text(encoding="utf-8").strip()
"""The user message; ``{question}`` is the instruction and, after an empty line, its input."""

VERDICTS = ("win", "tie", "loss")  # of the first model against the second


def messages(pair: AnswerPair) -> list[list[dict[str, str]]]:
    """What the judge is asked, with ``a`` first and with ``b`` first."""
    question = "\n\n".join(part for part in pair.prompt[:2] if part)
    asked = [PROMPT.format(question=question, first=x, second=y) for x, y in ((pair.a, pair.b), (pair.b, pair.a))]
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in asked]


def parse_scores(reply: Reply) -> tuple[Decimal, Decimal] | None:
    """The two scores of a reply, or None where its first line is anything but two numbers from 1 to 10.

    A first line that was cut off by ``max_tokens`` is not taken either: its ``1`` may have become a ``10``.

    >>> parse_scores(Reply("8 7.5\\nThe first is longer.", False, None, None, None))
    (Decimal('8'), Decimal('7.5'))
    >>> parse_scores(Reply("Both are good: 8 and 7.", False, None, None, None))
    """
    line, end, _ = reply.text.strip().partition("\n")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\s*", line, re.ASCII)
    if found is None or (reply.cut and not end):
        return None
    first, second = map(Decimal, found.groups())
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


def verdict(replies: Sequence[Reply | None]) -> tuple[str, list[list[float] | None]]:
    """What the replies to :func:`messages` say of a pair, and of each order the scores of ``a`` and ``b``.

    It is ``win``, ``tie`` or ``loss`` of ``a``, ``unanswered`` where a reply is missing, or ``malformed`` where one is
    no verdict.

    >>> verdict([Reply(text, False, None, None, None) for text in ("8 7", "7 7")])
    ('win', [[8.0, 7.0], [7.0, 7.0]])
    """
    one, other = (None if reply is None else parse_scores(reply) for reply in replies)
    scores = [pair and [*map(float, pair)] for pair in (one, other and other[::-1])]
    if one is None or other is None:
        return ("unanswered" if None in replies else "malformed"), scores
    a, b = one[0] + other[1], one[1] + other[0]
    return ("win" if a > b else "loss" if a < b else "tie"), scores


def judge(answers_a: str, answers_b: str, endpoint: ChatEndpoint, output: str = "runs/judge") -> dict[str, Any]:
    """Let a judge compare the answers of two models to the same prompts: ``akl judge`` as a function.

    Replies are kept in ``output`` as they come. The same call goes on after an interruption, and asks nothing twice;
    the result of other answers goes beside the first one (``result-v1.json``), with the same replies to draw on.

    Args:
        answers_a: JSON Lines file of the first model's answers; wins are its wins.
        answers_b: JSON Lines file of the second model's answers.
        endpoint: the judge.
        output: folder of replies and results, made by the same judge or not there yet.

    Returns:
        What lies in the result file. ``rate`` is of all pairs that have a verdict, ``interval`` Wilson's of 95 %: it
        takes the draws to be independent, and answers of several seeds to one prompt are less than that.

    Raises:
        UsageError: an input cannot be used, the folder is another's, or not everything was answered; what was answered
            is kept then, and so is the result so far.
    """
    pairs, files = pair_answers(answers_a, answers_b)
    folder, settings = Path(output), {**endpoint.settings, "prompt": digest([SYSTEM, PROMPT])}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder as output.")
    if any(folder.glob("[!.]*")) and not (folder / "settings.json").exists():
        raise UsageError(f"{folder} is not empty and holds no judge's replies: give another folder as output.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _check_settings(folder, settings)
            replies = ReplyFile(folder / "replies.jsonl")
            if replies.damaged:
                rank_zero_warn(
                    f"{len(replies.damaged)} lines of {replies.path} are damaged and passed over (line "
                    f"{', '.join(map(str, replies.damaged[:5]))}), as a kill may leave them; what they answered is "
                    "asked again."
                )
            flat = iter(endpoint.ask([asked for pair in pairs for asked in messages(pair)], replies))
            answered = list(zip(flat, flat, strict=True))
            result = {"settings": settings, "answers": files, **_result(pairs, answered)}
            earlier = (path for path in folder.glob("result*.json") if files["digest"] in path.read_text())
            path = next(earlier, None) or free_path(folder / "result.json")
            with atomic_file(path) as file:
                file.write_text(json.dumps(result, indent=2, allow_nan=False))
    except Timeout as error:
        raise UsageError(f"another judge is writing to {folder}: wait for it, or give another output.") from error
    _report(result, answered)
    cost = f"; this run cost at most {endpoint.cost:.6g}" if endpoint.input_price or endpoint.output_price else ""
    print(
        f"Replies: {result['replies']}, {endpoint.new} of them new; {result['prompt_tokens']:,} prompt tokens and "
        f"{result['completion_tokens']:,} reply tokens{cost}\nResult: {path}"
    )
    if result["unanswered"]:
        why = [endpoint.stopped, *(f"{count} times {fault}" for fault, count in endpoint.faults.most_common(3))]
        raise UsageError(
            f"{result['unanswered']} of {len(pairs)} pairs are not judged yet ({'; '.join(filter(None, why))}): run "
            "the same command again, it asks only what has no reply."
        )
    return result


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        with atomic_file(path) as file:
            file.write_text(json.dumps(settings, indent=2))
    try:
        theirs = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged: give another folder as output.") from error
    if differing := [name for name in settings if theirs.get(name) != settings[name]]:
        said = ", ".join(f"{name} ({theirs.get(name)!r} there, {settings[name]!r} here)" for name in differing)
        raise UsageError(f"the replies in {folder} are of another {said}: give another folder as output.")


def _result(pairs: Sequence[AnswerPair], answered: Sequence[Sequence[Reply | None]]) -> dict[str, Any]:
    verdicts = [verdict(replies) for replies in answered]
    counts = Counter(said for said, _ in verdicts)
    judged = sum(counts[name] for name in VERDICTS)
    got = [reply for replies in answered for reply in replies if reply is not None]
    shares: dict[str, Any] = {name: {"count": counts[name], "rate": None, "interval": None} for name in VERDICTS}
    for share in shares.values() if judged else ():
        low, high = binomtest(share["count"], judged).proportion_ci(method="wilson")
        share |= {"rate": share["count"] / judged, "interval": [float(low), float(high)]}
    return {
        "pairs": len(pairs),
        **shares,
        "malformed": counts["malformed"],
        "unanswered": counts["unanswered"],
        "replies": len(got),
        "malformed_replies": sum(parse_scores(reply) is None for reply in got),
        "served_models": sorted({reply.model for reply in got if reply.model is not None}),
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in got),
        "completion_tokens": sum(reply.completion_tokens or 0 for reply in got),
        "comparisons": [
            dict(zip(("instruction", "input", "seed", "verdict", "scores"), (*pair.prompt[:3], *said), strict=True))
            for pair, said in zip(pairs, verdicts, strict=True)
        ],
    }


def _report(result: dict[str, Any], answered: Sequence[Sequence[Reply | None]]) -> None:
    names, pairs = result["answers"], result["pairs"]
    print(f"{names['a']} against {names['b']}, judged by {result['settings']['model']}\n")
    print(f"{'':6}{'pairs':>7}{'share':>10}{'95 % interval':>19}")
    for name in VERDICTS:
        count, rate, interval = result[name].values()
        share = "-" if rate is None else f"{100 * rate:.1f} %"
        bounds = "-" if rate is None else "{:.1f} to {:.1f} %".format(*(100 * bound for bound in interval))
        print(f"{name:6}{count:7}{share:>10}{bounds:>19}")
    print()
    nonsense = [reply.text for both in answered for reply in both if reply is not None and parse_scores(reply) is None]
    if nonsense:
        print(
            f"Malformed verdicts: {len(nonsense)} of {result['replies']} replies; {result['malformed']} of {pairs} "
            f"pairs are left out for it. The first: {nonsense[0][:200]!r}"
        )
    for model in "ab":
        if names[f"empty_{model}"]:
            print(f"Empty answers: {names[f'empty_{model}']} of {pairs} in {names[model]}")
