"""Let a judge model compare the answers of two models, as the evaluation with GPT-4 of the AKL paper does.

The judge sees a question and both answers (:data:`PROMPT`, :data:`SYSTEM`; it is not shown the references) and rates
each from 1 to 10 on the first line of its reply. It is asked twice, with either answer first, since judges favour a
place; the mean of both decides. The prompt is that of Vicuna's evaluation, of FastChat (Zheng et al. 2023, arXiv
2306.05685); the mean over both orders is "balanced position calibration" (Wang et al. 2023, arXiv 2305.17926).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from akl_lightning.checkpoint import atomic_file, free_path
from akl_lightning.data.files import json_lines
from akl_lightning.errors import UsageError
from akl_lightning.evaluation.chat import ChatEndpoint, Messages, Reply, ReplyFile

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

Prompt = tuple[str, str, int | None, int]
"""Instruction, input, seed, and a number that tells lines apart that are equal in all three."""

Scores = tuple[Decimal, Decimal]


class AnswerPair(NamedTuple):
    """The answers of two models to one prompt."""

    prompt: Prompt
    a: str
    b: str

    def messages(self) -> list[Messages]:
        """What the judge is asked, with ``a`` first and with ``b`` first."""
        instruction, input, *_ = self.prompt
        question = f"{instruction}\n\n{input}" if input else instruction
        asked = [PROMPT.format(question=question, first=x, second=y) for x, y in ((self.a, self.b), (self.b, self.a))]
        return [(("system", SYSTEM), ("user", text)) for text in asked]


def parse_scores(reply: Reply) -> Scores | None:
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


def verdict(replies: Sequence[Reply | None]) -> tuple[str, list[Scores | None]]:
    """What the replies to :meth:`AnswerPair.messages` say of a pair.

    Returns:
        ``win``, ``tie`` or ``loss`` of ``a``, ``unanswered`` where a reply is missing, or ``malformed`` where one is
        no verdict; and of each order the scores of ``a`` and ``b``.

    >>> verdict([Reply(text, False, None, None, None) for text in ("8 7", "7 7")])[0]
    'win'
    """
    one, other = (None if reply is None else parse_scores(reply) for reply in replies)
    other = None if other is None else (other[1], other[0])
    if one is None or other is None:
        return "unanswered" if None in replies else "malformed", [one, other]
    a, b = (x + y for x, y in zip(one, other, strict=True))
    return ("win" if a > b else "loss" if a < b else "tie"), [one, other]


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, ``count`` of ``total`` draws.

    It takes the draws to be independent; answers of several seeds to one prompt are less than that.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    from scipy.stats import binomtest  # slow, and every command knows the options of this one

    low, high = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def answers_by_prompt(path: Path) -> dict[Prompt, str]:
    """The answers in a JSON Lines file with ``instruction``, ``input``, ``seed`` and ``answer`` on each line.

    ``input`` and ``seed`` may be missing, and ``seed`` may be null.

    Raises:
        UsageError: there is no such file, no answer in it, or a line that is no answer.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the JSON Lines file of a model's answers.")
    answers: dict[Prompt, str] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for record, where in json_lines(path):
        record = {"input": "", "seed": None, **record}
        for name in ("instruction", "input", "answer"):
            if not isinstance(record.get(name), str):
                raise UsageError(f"{where} has no text under {name!r}: mend or remove the line.")
        if type(record["seed"]) not in (int, type(None)):
            raise UsageError(f"{where} has {record['seed']!r} as its seed: write a whole number or null.")
        same = (record["instruction"], record["input"], record["seed"])
        answers[(*same, seen[same])] = record["answer"]
        seen[same] += 1
    if not answers:
        raise UsageError(f"{path} holds no answer: give the JSON Lines file of a model's answers.")
    return answers


def pair_answers(a: Mapping[Prompt, str], b: Mapping[Prompt, str], names: tuple[str, str]) -> list[AnswerPair]:
    """The pairs of answers to the same instruction and input with the same seed, in the order of ``a``.

    What has no counterpart is left out with a warning.

    Raises:
        UsageError: there is no pair.
    """
    pairs = [AnswerPair(prompt, a[prompt], b[prompt]) for prompt in a if prompt in b]
    for mine, theirs, here, there in ((a, b, names[0], names[1]), (b, a, names[1], names[0])):
        alone = [f"{prompt[0][:60]!r} with seed {prompt[2]}" for prompt in mine if prompt not in theirs]
        if alone and not pairs:
            raise UsageError(
                f"{names[0]} and {names[1]} have no instruction, input and seed in common ({alone[0]} is only in "
                f"{here}): give answers to the same prompts."
            )
        if alone:
            rank_zero_warn(
                f"{len(alone)} of {len(mine)} answers in {here} have no counterpart in {there} and are left out; the "
                f"first is to {alone[0]}."
            )
    return pairs


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
    a, b = answers_by_prompt(Path(answers_a)), answers_by_prompt(Path(answers_b))
    pairs = pair_answers(a, b, (answers_a, answers_b))
    folder, settings = Path(output), {**endpoint.settings, "prompt": _digest([SYSTEM, PROMPT])}
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a folder as output.")
    members = [path.name for path in folder.glob("[!.]*")]
    if members and "settings.json" not in members:
        raise UsageError(f"{folder} is not empty and holds no judge's replies: give another folder as output.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            earlier = _earlier_results(folder, settings)  # before anything is paid
            replies = ReplyFile(folder / "replies.jsonl")
            if replies.damaged:
                lines = ", ".join(map(str, replies.damaged[:5]))
                rank_zero_warn(
                    f"{len(replies.damaged)} lines of {replies.path} are damaged and passed over (line {lines}), as a "
                    "kill may leave them; what they answered is asked again."
                )
            asked = [pair.messages() for pair in pairs]
            asking = endpoint.ask((messages for both in asked for messages in both), replies)
            answered = [[replies.get(endpoint.key(messages)) for messages in both] for both in asked]
            files = {"a": answers_a, "b": answers_b}
            unpaired = {"unpaired_a": len(a) - len(pairs), "unpaired_b": len(b) - len(pairs)}
            result = {"settings": settings, **_result(pairs, answered, {**files, **unpaired})}
            path = earlier.get(result["answers"]["digest"]) or free_path(folder / "result.json")
            with atomic_file(path) as file:
                file.write_text(json.dumps(result, indent=2, allow_nan=False))
    except Timeout as error:
        raise UsageError(f"another judge is writing to {folder}: wait for it, or give another output.") from error
    _report(result, answered)
    priced = endpoint.input_price is not None or endpoint.output_price is not None
    cost = f"; this run cost at most {asking.cost:.6g}" if priced else ""
    print(
        f"Replies: {result['replies']}, {asking.new} of them new; {result['prompt_tokens']:,} prompt tokens and "
        f"{result['completion_tokens']:,} reply tokens{cost}\nResult: {path}"
    )
    if result["unanswered"]:
        reasons = [asking.stopped] if asking.stopped else []
        reasons += [f"{count} times {fault}" for fault, count in asking.faults.most_common(3)]
        raise UsageError(
            f"{result['unanswered']} of {len(pairs)} pairs are not judged yet ({'; '.join(reasons)}): run the same "
            "command again, it asks only what has no reply."
        )
    return result


def _earlier_results(folder: Path, settings: dict[str, Any]) -> dict[str, Path]:
    """Where results of which answers lie in a folder, which is this judge's."""

    def load(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged: move it away, or give another folder as output.") from error

    if not (folder / "settings.json").exists():
        with atomic_file(folder / "settings.json") as file:
            file.write_text(json.dumps(settings, indent=2))
    theirs = load(folder / "settings.json")
    differing = [name for name in settings if theirs.get(name) != settings[name]]
    if differing:
        said = ", ".join(f"{name} ({theirs.get(name)!r} there, {settings[name]!r} here)" for name in differing)
        raise UsageError(f"the replies in {folder} are of another {said}: give another folder as output.")
    return {load(path).get("answers", {}).get("digest"): path for path in folder.glob("result*.json")}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _result(
    pairs: Sequence[AnswerPair], answered: Sequence[Sequence[Reply | None]], files: dict[str, Any]
) -> dict[str, Any]:
    verdicts = [verdict(replies) for replies in answered]
    counts = Counter(said for said, _ in verdicts)
    judged = sum(counts[name] for name in VERDICTS)
    got = [reply for replies in answered for reply in replies if reply is not None]
    return {
        "answers": {
            **files,
            "digest": _digest([[*pair.prompt, pair.a, pair.b] for pair in pairs]),
            **{f"empty_{model}": sum(not getattr(pair, model).strip() for pair in pairs) for model in "ab"},
        },
        "pairs": len(pairs),
        **{
            name: {
                "count": counts[name],
                "rate": counts[name] / judged if judged else None,
                "interval": list(wilson_interval(counts[name], judged)) if judged else None,
            }
            for name in VERDICTS
        },
        "malformed": counts["malformed"],
        "unanswered": counts["unanswered"],
        "replies": len(got),
        "malformed_replies": sum(parse_scores(reply) is None for reply in got),
        "served_models": sorted({reply.model for reply in got if reply.model is not None}),
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in got),
        "completion_tokens": sum(reply.completion_tokens or 0 for reply in got),
        "comparisons": [
            {
                **dict(zip(("instruction", "input", "seed"), pair.prompt, strict=False)),
                "verdict": said,
                "scores": [None if score is None else [*map(float, score)] for score in scores],
            }
            for pair, (said, scores) in zip(pairs, verdicts, strict=True)
        ],
    }


def _report(result: Mapping[str, Any], answered: Sequence[Sequence[Reply | None]]) -> None:
    names, pairs = result["answers"], result["pairs"]
    print(f"{names['a']} against {names['b']}, judged by {result['settings']['model']}\n")
    print(f"{'':6}{'pairs':>7}{'share':>10}{'95 % interval':>19}")
    for name in VERDICTS:
        share, interval = "-", "-"
        if result[name]["rate"] is not None:
            share = f"{100 * result[name]['rate']:.1f} %"
            interval = "{:.1f} to {:.1f} %".format(*(100 * bound for bound in result[name]["interval"]))
        print(f"{name:6}{result[name]['count']:7}{share:>10}{interval:>19}")
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
