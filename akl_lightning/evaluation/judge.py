"""Let a judge model compare the answers of two models, as the evaluation with GPT-4 of the AKL paper does.

The judge sees a question and both answers (:data:`PROMPT`, :data:`SYSTEM`; it is not shown the references) and rates
each from 1 to 10 on the first line of its reply. It is asked twice, with either answer first, since judges favour a
place; the mean of both decides. The prompt is that of Vicuna's evaluation, of FastChat (Zheng et al. 2023, arXiv
2306.05685); the mean over both orders is "balanced position calibration" (Wang et al. 2023, arXiv 2305.17926).
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import NormalDist
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from akl_lightning.checkpoint import atomic_file, free_path
from akl_lightning.data.sources import json_lines
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.chat import ChatEndpoint, Messages, Outcome, Reply, ReplyFile

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
"""The system message."""

PROMPT = """[Question]
{question}

[The Start of Assistant 1's Answer]
{first}

[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{second}

[The End of Assistant 2's Answer]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question \
displayed above.
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space. In the subsequent line, please provide a comprehensive \
explanation of your evaluation, avoiding any potential bias and ensuring that the order in which the responses were \
presented does not affect your judgment."""
"""The user message; ``{question}`` is the instruction and, after an empty line, its input."""

VERDICTS = ("win", "tie", "loss")
"""Of the first model against the second."""

SETTINGS, REPLIES, RESULT = "settings.json", "replies.jsonl", "result.json"


# --------------------------------------------------------------------------------------------------------------------
# One comparison

Prompt = tuple[str, str, int | None, int]
"""Instruction, input, seed, and a number that tells lines apart that are equal in all three."""

Scores = tuple[Decimal, Decimal]


@dataclass(frozen=True)
class AnswerPair:
    """The answers of two models to one prompt."""

    prompt: Prompt
    a: str
    b: str

    def messages(self) -> tuple[Messages, Messages]:
        """What the judge is asked, with ``a`` first and with ``b`` first."""
        instruction, input, *_ = self.prompt
        question = f"{instruction}\n\n{input}" if input else instruction
        orders = ((self.a, self.b), (self.b, self.a))
        one, other = (PROMPT.format(question=question, first=first, second=second) for first, second in orders)
        return (("system", SYSTEM), ("user", one)), (("system", SYSTEM), ("user", other))


def parse_scores(reply: Reply) -> Scores | None:
    """The two scores of a reply, or None where its first line is anything but two numbers from 1 to 10.

    A first line that was cut off by ``max_tokens`` is not taken either: its ``1`` may have become a ``10``.

    >>> parse_scores(Reply("8 7.5\\nThe first is longer.", False, None, None, None))
    (Decimal('8'), Decimal('7.5'))
    >>> parse_scores(Reply("Both are good: 8 and 7.", False, None, None, None))
    """
    line, end, _ = reply.text.strip().partition("\n")
    number = r"([0-9]+(?:\.[0-9]+)?)"
    found = re.fullmatch(rf"{number}(?:\s*,\s*|\s+){number}\s*", line)
    if found is None or (reply.cut and not end):
        return None
    first, second = map(Decimal, found.groups())
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


def verdict(replies: Sequence[Reply | None]) -> tuple[str, list[Scores | None]]:
    """What the replies in both orders say of a pair.

    Args:
        replies: to :meth:`AnswerPair.messages`.

    Returns:
        ``win``, ``tie`` or ``loss`` of ``a``, ``unanswered`` where a reply is missing, or ``malformed`` where one is
        no verdict; and of each order the scores of ``a`` and ``b``.

    >>> verdict([Reply(text, False, None, None, None) for text in ("8 7", "7 7")])[0]
    'win'
    """
    scores = [None if reply is None else parse_scores(reply) for reply in replies]
    if scores[1] is not None:
        scores[1] = scores[1][::-1]
    if None in replies:
        return "unanswered", scores
    if None in scores:
        return "malformed", scores
    a, b = (sum(score[place] for score in scores if score is not None) for place in (0, 1))
    return ("win" if a > b else "loss" if a < b else "tie"), scores


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    It takes the draws to be independent; answers of several seeds to one prompt are less than that.

    Args:
        count: how many of the draws are of the kind.
        total: how many draws, at least one.
        confidence: how often such an interval holds the true share.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22 (158), 209-212.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = count / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    lower, upper = ((centre + sign * spread) / (1 + z**2 / total) for sign in (-1, 1))
    return max(lower, 0.0), min(upper, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# Answers on disk


def answers_by_prompt(path: Path) -> dict[Prompt, str]:
    """The answers in a JSON Lines file with ``instruction``, ``input``, ``seed`` and ``answer`` on each line.

    Args:
        path: the file; ``input`` and ``seed`` may be missing, and so may ``seed`` be null.

    Raises:
        UsageError: there is no such file, no answer in it, or a line that is no answer.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the JSON Lines file of a model's answers.")
    answers: dict[Prompt, str] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for record, where in json_lines(path):
        instruction, input, seed, answer = _fields(record, where)
        same = (instruction, input, seed)
        answers[(*same, seen[same])] = answer
        seen[same] += 1
    if not answers:
        raise UsageError(f"{path} holds no answer: give the JSON Lines file of a model's answers.")
    return answers


def _fields(record: dict[str, Any], where: str) -> tuple[str, str, int | None, str]:
    texts = [record.get("instruction"), record.get("input", ""), record.get("answer")]
    for name, text in zip(("instruction", "input", "answer"), texts, strict=True):
        if not isinstance(text, str):
            raise UsageError(f"{where} has no text under {name!r}: mend or remove the line.")
    seed = record.get("seed")
    if seed is not None and type(seed) is not int:
        raise UsageError(f"{where} has {seed!r} as its seed: write a whole number or null.")
    instruction, input, answer = texts
    return instruction, input, seed, answer


def pair_answers(a: Mapping[Prompt, str], b: Mapping[Prompt, str], names: tuple[str, str]) -> list[AnswerPair]:
    """The pairs of answers to the same instruction and input with the same seed, in the order of ``a``.

    What has no counterpart is left out with a warning.

    Raises:
        UsageError: there is no pair.
    """
    pairs = [AnswerPair(prompt, a[prompt], b[prompt]) for prompt in a if prompt in b]
    for mine, theirs, place in ((a, b, 0), (b, a, 1)):
        alone = [prompt for prompt in mine if prompt not in theirs]
        if alone and not pairs:
            raise UsageError(
                f"{names[0]} and {names[1]} have no instruction, input and seed in common ({_named(alone[0])} is only "
                f"in {names[place]}): give answers to the same prompts."
            )
        if alone:
            rank_zero_warn(
                f"{len(alone)} of {len(mine)} answers in {names[place]} have no counterpart in {names[1 - place]} and "
                f"are left out; the first is to {_named(alone[0])}."
            )
    return pairs


def _named(prompt: Prompt) -> str:
    instruction, _, seed, _ = prompt
    return f"{instruction[:60]!r} with seed {seed}"


# --------------------------------------------------------------------------------------------------------------------
# All comparisons


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
        What lies in the result file: ``settings``; ``pairs`` (their number); ``win``, ``tie`` and ``loss``, each with
        ``count``, ``rate`` (of all pairs that have a verdict; None where there is none) and ``interval`` (95 %, of
        :func:`wilson_interval`); ``malformed`` and ``unanswered`` (pairs that have no verdict); ``replies``,
        ``malformed_replies`` and the tokens of both prompts and replies; and every comparison.

    Raises:
        UsageError: an input cannot be used, the folder is another's, or not everything was answered; what was answered
            is kept then, and so is the result so far.
    """
    files = [Path(answers_a), Path(answers_b)]
    a, b = map(answers_by_prompt, files)
    pairs = pair_answers(a, b, (answers_a, answers_b))
    folder = Path(output)
    with _reserved(folder, {**endpoint.settings, "prompt": _digest([SYSTEM, PROMPT])}) as settings:
        replies = ReplyFile(folder / REPLIES)
        try:
            if replies.damaged:
                lines = ", ".join(map(str, replies.damaged[:5]))
                rank_zero_warn(
                    f"{len(replies.damaged)} lines of {replies.path} are damaged and passed over (line {lines}), as a "
                    "kill may leave them; what they answered is asked again."
                )
            outcome = endpoint.ask([messages for pair in pairs for messages in pair.messages()], replies)
        finally:
            replies.close()
        answered = [
            tuple(replies.get(endpoint.key(messages)) for messages in pair.messages())
            for pair in tqdm(pairs, desc="Counting", unit="pair", leave=False)
        ]
        result = {"settings": settings, **_result(pairs, answered, (answers_a, answers_b))}
        result["answers"] |= {"unpaired_a": len(a) - len(pairs), "unpaired_b": len(b) - len(pairs)}
        path = _write(result, folder)
    _report(result, answered, outcome, endpoint, path)
    if result["unanswered"]:
        reasons = [outcome.stopped] if outcome.stopped else []
        reasons += [f"{count} times {fault}" for fault, count in outcome.faults.most_common(3)]
        raise UsageError(
            f"{result['unanswered']} of {len(pairs)} pairs are not judged yet ({'; '.join(reasons)}): run the same "
            "command again, it asks only what has no reply."
        )
    return result


@contextmanager
def _reserved(folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A folder for the replies of one judge and nobody else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder as output.")
    members = [member.name for member in folder.iterdir() if member.name[0] != "."] if folder.exists() else []
    if members and SETTINGS not in members:
        raise UsageError(f"{folder} is not empty and holds no judge's replies: give another folder as output.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another judge is writing to {folder}: wait for it, or give another output.") from error
    try:
        if (folder / SETTINGS).exists():
            theirs = _load(folder / SETTINGS)
            differing = [name for name in settings if theirs.get(name) != settings[name]]
            if differing:
                said = ", ".join(f"{name} ({theirs.get(name)!r} there, {settings[name]!r} here)" for name in differing)
                raise UsageError(f"the replies in {folder} are of another {said}: give another folder as output.")
            for path in _results(folder):
                _load(path)  # before anything is paid
        else:
            with atomic_file(folder / SETTINGS) as file:
                file.write_text(json.dumps(settings, indent=2))
        yield settings
    finally:
        lock.release()


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{Path(RESULT).stem}*.json"))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: move it away, or give another folder as output.")
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _result(
    pairs: Sequence[AnswerPair], answered: Sequence[Sequence[Reply | None]], names: tuple[str, str]
) -> dict[str, Any]:
    verdicts = [verdict(replies) for replies in answered]
    counts = Counter(said for said, _ in verdicts)
    judged = sum(counts[name] for name in VERDICTS)
    rates = {
        name: {
            "count": counts[name],
            "rate": counts[name] / judged if judged else None,
            "interval": list(wilson_interval(counts[name], judged)) if judged else None,
        }
        for name in VERDICTS
    }
    got = [reply for replies in answered for reply in replies if reply is not None]
    comparisons = [
        {
            "instruction": pair.prompt[0],
            "input": pair.prompt[1],
            "seed": pair.prompt[2],
            "verdict": said,
            "scores": [None if score is None else [float(part) for part in score] for score in scores],
        }
        for pair, (said, scores) in zip(pairs, verdicts, strict=True)
    ]
    return {
        "answers": {
            "a": names[0],
            "b": names[1],
            "digest": _digest([[*pair.prompt, pair.a, pair.b] for pair in pairs]),
            "empty_a": sum(not pair.a.strip() for pair in pairs),
            "empty_b": sum(not pair.b.strip() for pair in pairs),
        },
        "pairs": len(pairs),
        **rates,
        "malformed": counts["malformed"],
        "unanswered": counts["unanswered"],
        "replies": len(got),
        "malformed_replies": sum(parse_scores(reply) is None for reply in got),
        "served_models": sorted({reply.model for reply in got if reply.model is not None}),
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in got),
        "completion_tokens": sum(reply.completion_tokens or 0 for reply in got),
        "comparisons": comparisons,
    }


def _write(result: dict[str, Any], folder: Path) -> Path:
    """Put a result beside those of other answers, or in the place of an unfinished one of the same answers."""
    target = None
    for path in _results(folder):
        there = _load(path)
        if there == result:
            return path
        same = there.get("answers", {}).get("digest") == result["answers"]["digest"]
        if same and there.get("unanswered") and target is None:
            target = path
    target = target or free_path(folder / RESULT)
    with atomic_file(target) as file:
        file.write_text(json.dumps(result, indent=2, allow_nan=False))
    return target


def _report(
    result: Mapping[str, Any],
    answered: Sequence[Sequence[Reply | None]],
    outcome: Outcome,
    endpoint: ChatEndpoint,
    path: Path,
) -> None:
    """Print the result and all that a reader has to know of it."""
    names = result["answers"]
    print(f"{names['a']} against {names['b']}, judged by {result['settings']['model']}")
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("")
    for heading in ("pairs", "share", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in VERDICTS:
        figures = result[name]
        share, interval = "-", "-"
        if figures["rate"] is not None:
            share = f"{100 * figures['rate']:.1f} %"
            interval = "{:.1f} to {:.1f} %".format(*(100 * bound for bound in figures["interval"]))
        table.add_row(name, str(figures["count"]), share, interval)
    Console().print(table)
    if result["malformed_replies"]:
        example = next(
            reply.text for replies in answered for reply in replies if reply is not None and parse_scores(reply) is None
        )
        print(
            f"Malformed verdicts: {result['malformed_replies']} of {result['replies']} replies; {result['malformed']} "
            f"of {result['pairs']} pairs are left out for it. The first: {example[:200]!r}"
        )
    for model in ("a", "b"):
        if names[f"empty_{model}"]:
            print(f"Empty answers: {names[f'empty_{model}']} of {result['pairs']} in {names[model]}")
    priced = endpoint.input_price is not None or endpoint.output_price is not None
    cost = f"; this run cost at most {outcome.cost:.6g}" if priced else ""
    print(
        f"Replies: {result['replies']}, {outcome.new} of them new; {result['prompt_tokens']:,} prompt tokens and "
        f"{result['completion_tokens']:,} reply tokens{cost}"
    )
    print(f"Result: {path}")
