"""Ask an OpenAI-compatible chat endpoint: within bounds, with retries, and every reply kept on disk at once."""

import asyncio
import hashlib
import json
import math
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
from jsonargparse.typing import SecretStr
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError

Messages = tuple[tuple[str, str], ...]
"""What is said in a chat: pairs of role and text."""

FIRST_WAIT = 1.0
"""Seconds before the second attempt, at most; the wait doubles from attempt to attempt."""

LONGEST_BACK_OFF = 60.0
"""Seconds to which the wait grows."""

LONGEST_WAIT = 300.0
"""Seconds that an endpoint may ask to wait with ``Retry-After``; where it asks for more, the request is given up."""

MAX_IN_A_ROW = 3
"""Requests that end without a reply, one after the other, until the endpoint is taken for dead."""

_SHORTEST_KEY = 8
"""Letters of a key that is worth hiding; local servers take anything for one, a digit that is in every reply too."""

_jitter = random.Random()  # a seeded caller keeps its own numbers
_RETRIED = {408, 409, 425, 429}
_ABOUT_ONE_REQUEST = {400, 413, 422}


# --------------------------------------------------------------------------------------------------------------------
# Replies on disk


@dataclass(frozen=True)
class Reply:
    """What an endpoint has said."""

    text: str
    """Empty where it refused or called a tool."""
    cut: bool
    """Whether it ends at ``max_tokens``."""
    model: str | None
    """What the endpoint calls the model that has answered."""
    prompt_tokens: int | None
    completion_tokens: int | None


class ReplyFile:
    """A JSON Lines file of replies, to which each is appended and synced as it comes.

    A line that is cut off or damaged, by a kill for example, is passed over, and what it answered is asked again.

    Args:
        path: the file; it may be there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[int] = []
        """Numbers of the lines that are passed over."""
        self._replies: dict[str, Reply] = {}
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._torn = False
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                self._torn = not line.endswith(b"\n")
                if not self._take(line):
                    self.damaged.append(number)

    def _take(self, line: bytes) -> bool:
        types = {"text": str, "cut": bool, "model": str | None, "prompt_tokens": int | None}
        types["completion_tokens"] = int | None
        try:
            record = json.loads(line)
            key = record.pop("key")
            reply = Reply(**record)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return False
        if not isinstance(key, str) or not all(isinstance(getattr(reply, name), kind) for name, kind in types.items()):
            return False
        self._replies[key] = reply
        return True

    def get(self, key: str) -> Reply | None:
        """The reply to what has this key, or None."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on the disk when this returns.

        Raises:
            UsageError: it cannot be written.
        """
        line = ("\n" if self._torn else "").encode() + json.dumps({"key": key, **asdict(reply)}).encode() + b"\n"
        end = os.fstat(self._handle).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._handle, rest) :]
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, end)
            raise UsageError(
                f"cannot write {self.path} ({error.strerror}): make room and run the same command again, it asks only "
                "what has no reply yet."
            ) from error
        self._torn = False
        self._replies[key] = reply

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


# --------------------------------------------------------------------------------------------------------------------
# The endpoint


@dataclass
class Outcome:
    """How asking went."""

    new: int = 0
    """Replies that were not there before."""
    cost: float = 0.0
    """Of this run, in the unit of the prices. What was sent and got no usable reply counts at most it can have cost."""
    stopped: str = ""
    """Why asking ended before everything was asked; empty where it did not."""
    faults: Counter[str] = field(default_factory=Counter)
    """What kept requests from being answered, after all retries, and how many of them."""


class ChatEndpoint:
    """An OpenAI-compatible chat endpoint, asked at temperature 0.

    Answers 408, 409, 425, 429 and 5xx, time-outs, lost connections and bodies that are no chat completion are asked
    again after a wait that doubles, or as long as ``Retry-After`` says. Where several requests in a row get no reply in
    spite of that, asking ends. Ctrl-C or SIGTERM lets requests that are on the way end and keeps their replies; a
    second one ends at once. Call it from no running event loop.

    Args:
        model: what the endpoint calls the model; default: the environment's ``OPENAI_MODEL``.
        base_url: address up to and without ``/chat/completions``, ``https://api.openai.com/v1`` for example; default:
            the environment's ``OPENAI_BASE_URL``.
        api_key: the key; default: the environment's ``OPENAI_API_KEY``, which other users of the machine do not see,
            as they may a flag. It is sent to the endpoint and nowhere stored or printed.
        max_tokens: longest reply.
        max_concurrency: requests on the way at the same time.
        timeout: seconds until a request is given up.
        max_retries: how often a request is asked again.
        max_seconds: after so many seconds nothing is asked any more; what is on the way gets its ``timeout``.
        max_cost: nothing is asked that could make this run cost more, in the unit of the prices. A prompt is taken to
            have as many tokens as bytes until its reply says how many it had.
        input_price: of a million tokens of the prompts.
        output_price: of a million tokens of the replies.

    Raises:
        UsageError: a setting is missing or cannot be.
    """

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        api_key: SecretStr | None = None,
        max_tokens: int = 512,
        max_concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 5,
        max_seconds: float | None = None,
        max_cost: float | None = None,
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        self.model = model or os.environ.get("OPENAI_MODEL", "")
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        self._key = api_key or SecretStr(os.environ.get("OPENAI_API_KEY", "").strip())
        self.max_tokens = max_tokens
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_seconds = max_seconds
        self.max_cost = max_cost
        self.input_price = input_price
        self.output_price = output_price
        if not self.model:
            raise UsageError("no model is named: give --model, or set OPENAI_MODEL.")
        self._check_url()
        if not re.fullmatch(r"[!-~]*", self._key.get_secret_value()):
            raise UsageError(
                "the key has blanks or letters beyond ASCII in it: set OPENAI_API_KEY to the key alone, or --api_key."
            )
        for name, least in (("max_tokens", 1), ("max_concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        for name in ("timeout", "max_seconds", "max_cost"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a finite number above 0, got {value}.")
        for name in ("input_price", "output_price"):
            value = getattr(self, name)
            if value is None and max_cost is not None:
                raise UsageError(f"max_cost needs the price of a million tokens: give {name}, too.")
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a finite number of 0 or more, got {value}.")

    def _check_url(self) -> None:
        if not self.base_url:
            raise UsageError(
                "no endpoint is given: give --base_url, https://api.openai.com/v1 for example, or set OPENAI_BASE_URL."
            )
        try:
            url = httpx2.URL(self.base_url)
        except httpx2.InvalidURL as error:
            raise UsageError("base_url is no address: give one like https://api.openai.com/v1.") from error
        if url.userinfo or url.query or url.fragment:
            # It is stored and printed.
            raise UsageError("base_url has a user, query or fragment in it, where a key might be: give it without.")
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(f"base_url {self.base_url!r} is no http or https address: give one with a host.")

    @property
    def settings(self) -> dict[str, Any]:
        """What a reply depends on, besides what is said."""
        return {"model": self.model, "base_url": self.base_url, "temperature": 0, "max_tokens": self.max_tokens}

    def body(self, messages: Messages) -> bytes:
        """The JSON of a request, ``[bytes]``."""
        body: dict[str, Any] = {name: value for name, value in self.settings.items() if name != "base_url"}
        body["messages"] = [{"role": role, "content": content} for role, content in messages]
        return json.dumps(body).encode()

    def key(self, messages: Messages) -> str:
        """What a reply to these messages goes by: a digest of everything that it depends on."""
        return hashlib.sha256(self.base_url.encode() + b"\n" + self.body(messages)).hexdigest()

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost, in the unit of the prices; 0 without prices."""
        return (prompt_tokens * (self.input_price or 0) + completion_tokens * (self.output_price or 0)) / 1e6

    def hide_key(self, text: str) -> str:
        """A text of the endpoint, which may well repeat the key, without it."""
        key = self._key.get_secret_value()
        if len(key) >= _SHORTEST_KEY:
            for spelling in (key, json.dumps(key)[1:-1]):
                text = text.replace(spelling, "[key]")
        return text

    def ask(self, conversations: Iterable[Messages], replies: ReplyFile) -> Outcome:
        """Ask everything that has no reply yet, equal messages once, and show the progress.

        Args:
            conversations: what is asked; each is answered on its own.
            replies: where replies are looked up and kept.

        Raises:
            UsageError: a reply cannot be written.
        """
        by_key = {self.key(messages): messages for messages in conversations}
        pending = {key: self.body(messages) for key, messages in by_key.items() if replies.get(key) is None}
        with (
            tqdm(total=len(by_key), initial=len(by_key) - len(pending), desc="Asking", unit="reply") as bar,
            _handlers_put_back(),
        ):
            return asyncio.run(_Session(self, replies, bar, pending).run()) if pending else Outcome()

    def headers(self) -> dict[str, str]:
        """Of every request; the key is in them."""
        key = self._key.get_secret_value()
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _handlers_put_back() -> Iterator[None]:
    """The event loop would leave Python's own handlers where a caller had set others."""
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # not set by Python
                    signal.signal(number, handler)


class _Session:
    """One run of asking."""

    def __init__(self, endpoint: ChatEndpoint, replies: ReplyFile, bar: tqdm, pending: Mapping[str, bytes]) -> None:
        self.endpoint = endpoint
        self.replies = replies
        self.bar = bar
        self.pending: Iterator[tuple[str, bytes]] = iter(pending.items())
        self.workers = min(endpoint.max_concurrency, len(pending))
        self.outcome = Outcome()
        self.deadline = time.monotonic() + (math.inf if endpoint.max_seconds is None else endpoint.max_seconds)
        self.stopped = asyncio.Event()
        self.settled = asyncio.Condition()
        self.on_the_way: Counter[float] = Counter()
        """What each request that is on the way may cost at most, and how many of them may."""
        self.retries = self.failed_in_a_row = 0

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            self.stop("it was interrupted")
            for number in _INTERRUPTS:
                loop.remove_signal_handler(number)

        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not in the main thread
            for number in _INTERRUPTS:
                loop.add_signal_handler(number, interrupt)
        limits = httpx2.Limits(max_connections=self.workers, max_keepalive_connections=self.workers)
        async with httpx2.AsyncClient(headers=self.endpoint.headers(), limits=limits, timeout=None) as self.client:
            await asyncio.gather(*(self.work() for _ in range(self.workers)))
        return self.outcome

    def stop(self, reason: str) -> None:
        """Ask nothing new."""
        if not self.stopped.is_set():
            self.outcome.stopped = reason
            self.stopped.set()

    async def work(self) -> None:
        while not self.stopped.is_set() and (request := next(self.pending, None)) is not None:
            await self.answer(*request)

    async def answer(self, key: str, body: bytes) -> None:
        """Get the reply to one request, or note why there is none."""
        for attempt in range(self.endpoint.max_retries + 1):
            if not await self.reserve(body):
                return
            fault, wait = await self.attempt(key, body)
            if not fault:
                self.failed_in_a_row = 0
                self.bar.update()
                return
            if wait is None or wait > LONGEST_WAIT or attempt == self.endpoint.max_retries:
                break
            back_off = min(FIRST_WAIT * 2 ** min(attempt, 20), LONGEST_BACK_OFF) * _jitter.uniform(0.5, 1)
            wait = max(wait, back_off)
            if time.monotonic() + wait >= self.deadline:
                self.stop(f"max_seconds = {self.endpoint.max_seconds:g} are over")
                break
            self.retries += 1
            self.bar.set_postfix(retries=self.retries)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), wait)
        if wait is None and self.stopped.is_set():  # it has been said
            return
        self.outcome.faults[fault] += 1
        # A fault of one request alone says nothing of the next, unless there was no good one yet.
        self.failed_in_a_row += wait is not None or not self.outcome.new
        if self.failed_in_a_row >= max(MAX_IN_A_ROW, self.workers):
            self.stop(f"{self.failed_in_a_row} requests in a row got no reply, the last one for this: {fault}")

    async def reserve(self, body: bytes) -> bool:
        """Whether one more request fits the bounds; what it may cost is set aside then."""
        limit = math.inf if self.endpoint.max_cost is None else self.endpoint.max_cost
        most = self.most(body)
        async with self.settled:
            # What is on the way will most likely cost less than was set aside for it.
            await self.settled.wait_for(
                lambda: (
                    not self.on_the_way
                    or self.outcome.cost + sum(self.on_the_way.elements()) + most <= limit
                    or self.stopped.is_set()
                )
            )
            if time.monotonic() >= self.deadline:
                self.stop(f"max_seconds = {self.endpoint.max_seconds:g} are over")
            if self.outcome.cost + most > limit:
                self.stop(f"one more request might pass max_cost = {limit:g}, {self.outcome.cost:.6g} are spent")
            if self.stopped.is_set():
                return False
            self.on_the_way[most] += 1
        return True

    def most(self, body: bytes) -> float:
        """The most that a request can cost: no token is shorter than a byte."""
        return self.endpoint.price(len(body), self.endpoint.max_tokens)

    async def settle(self, body: bytes, cost: float) -> None:
        async with self.settled:
            self.on_the_way -= Counter([self.most(body)])
            self.outcome.cost += cost
            self.settled.notify_all()

    async def attempt(self, key: str, body: bytes) -> tuple[str, float | None]:
        """Ask once: what went wrong, if anything, and the least seconds to wait; None where asking again is no use."""
        cost = self.most(body)  # nobody knows what the endpoint did with a request that it did not answer
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self.client.post(f"{self.endpoint.base_url}/chat/completions", content=body)
            if response.status_code != 200:
                cost = 0.0
                return self.refused(response)
            reply = self.reply(response)
            if reply is None:
                return "the answer is no chat completion", 0.0
            self.replies.add(key, reply)
            self.outcome.new += 1
            if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                cost = self.endpoint.price(reply.prompt_tokens, reply.completion_tokens)
            return "", None
        except TimeoutError:
            return f"no answer within timeout = {self.endpoint.timeout:g} seconds", 0.0
        except httpx2.HTTPError as error:
            if isinstance(error, httpx2.ConnectError):
                cost = 0.0
            said = self.printable(str(error))
            return f"the connection failed ({type(error).__name__}{': ' if said else ''}{said})", 0.0
        finally:
            await self.settle(body, cost)

    def refused(self, response: httpx2.Response) -> tuple[str, float | None]:
        """What an answer other than 200 means; one that is about every request ends the run."""
        status = response.status_code
        if status == 401:  # its text may repeat a part of the key
            self.stop("the endpoint answers 401, it does not take the key: set OPENAI_API_KEY to one that it takes")
            return "the endpoint answers 401", None
        fault = f"the endpoint answers {status} ({self.printable(_said(response))})"
        if status in _RETRIED or status >= 500:
            return fault, _retry_after(response)
        if status not in _ABOUT_ONE_REQUEST:
            self.stop(f"{fault}: look at base_url, model and what the key allows")
        return fault, None

    def reply(self, response: httpx2.Response) -> Reply | None:
        """The reply in a body, or None where it is no chat completion."""
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"].get("content")
            usage = body.get("usage") or {}
            tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
            cut = choice.get("finish_reason") == "length"
            model = body.get("model")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(text, str | None):
            return None
        prompt_tokens, completion_tokens = (n if type(n) is int and 0 <= n < 2**63 else None for n in tokens)
        hide = self.endpoint.hide_key
        return Reply(
            hide(text or ""), cut, hide(model) if isinstance(model, str) else None, prompt_tokens, completion_tokens
        )

    def printable(self, text: str) -> str:
        """A text of the endpoint on one line, short, without the key and without control characters."""
        text = "".join(character if character.isprintable() else " " for character in self.endpoint.hide_key(text))
        return " ".join(text.split())[:200]


def _said(response: httpx2.Response) -> str:
    """The message in the body of an error, whichever way it is packed."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return response.text
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and name in body:
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that ``Retry-After`` asks for, as a number or as a date; 0 where it says nothing of use."""
    said = response.headers.get("Retry-After", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0
