"""Ask an OpenAI-compatible chat endpoint: within bounds, with retries, and every reply kept on disk at once."""

import asyncio
import hashlib
import json
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse.typing import SecretStr
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError

Messages = tuple[tuple[str, str], ...]
"""What is said in a chat: pairs of role and text."""

FIRST_WAIT = 1.0  # seconds before the second attempt, at most; the wait doubles from attempt to attempt,
LONGEST_BACK_OFF = 60.0  # up to so many
LONGEST_WAIT = 300.0  # seconds; where Retry-After asks for more, the request is given up
MAX_IN_A_ROW = 3  # requests that end without a reply, until the endpoint is taken for dead
SHORTEST_KEY = 8  # letters of a key that is worth hiding: local servers take a digit for one, and it is in every reply
_jitter = random.Random()  # a seeded caller keeps its own numbers


@dataclass(frozen=True)
class Reply:
    """What an endpoint has said."""

    text: str  # empty where it refused or called a tool
    cut: bool  # whether it ends at max_tokens
    model: str | None  # what the endpoint calls the model that has answered
    prompt_tokens: int | None
    completion_tokens: int | None


class ReplyFile(dict[str, Reply]):
    """Replies by their keys, and a JSON Lines file to which each is appended and synced as it comes.

    A line that is cut off or damaged, by a kill for example, is passed over, and what it answered is asked again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.damaged: list[int] = []
        """Numbers of the lines that are passed over."""
        types, line = {"key": str, **get_type_hints(Reply)}, b"\n"
        path.touch()
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    if not all(isinstance(record[name], kind) for name, kind in types.items()):
                        raise TypeError
                    key, reply = record.pop("key"), Reply(**record)
                    self[key] = reply
                except (ValueError, TypeError, LookupError, RecursionError):
                    self.damaged.append(number)
        self._line_break = "" if line.endswith(b"\n") else "\n"

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on the disk when this returns."""
        end = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(self._line_break + json.dumps({"key": key, **asdict(reply)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, end)
            raise UsageError(
                f"cannot write {self.path} ({error.strerror}): make room and run the same command again, it asks only "
                "what has no reply yet."
            ) from error
        self._line_break, self[key] = "", reply


@dataclass
class ChatEndpoint:
    """An OpenAI-compatible chat endpoint, asked at temperature 0.

    Answers 408, 409, 425, 429 and 5xx, time-outs, lost connections and bodies that are no chat completion are asked
    again after a wait that doubles, or as long as ``Retry-After`` says. Where several requests in a row get no reply in
    spite of that, asking ends. Ctrl-C or SIGTERM lets requests that are on the way end and keeps their replies; a
    second one ends at once. Call it from no running event loop. A setting that cannot be raises UsageError.

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
    """

    model: str | None = None
    base_url: str | None = None
    api_key: SecretStr | None = None
    max_tokens: int = 512
    max_concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5
    max_seconds: float | None = None
    max_cost: float | None = None
    input_price: float | None = None
    output_price: float | None = None

    def __post_init__(self) -> None:
        try:  # here and below, not above: every command knows the options of this one
            import tenacity  # noqa: F401
            from openai import DefaultAsyncHttpxClient
        except ImportError as error:
            raise UsageError('akl judge needs the openai client: pip install -e ".[judge]".') from error
        self.model = self.model or os.environ.get("OPENAI_MODEL")
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        self.api_key = self.api_key or SecretStr(os.environ.get("OPENAI_API_KEY", "").strip())
        if not self.model:
            raise UsageError("no model is named: give --model, or set OPENAI_MODEL.")
        if not self.base_url:
            raise UsageError(
                "no endpoint is given: give --base_url, https://api.openai.com/v1 for example, or set OPENAI_BASE_URL."
            )
        try:
            url = DefaultAsyncHttpxClient(base_url=self.base_url, trust_env=False).base_url
        except Exception as error:  # of the HTTP library below the client, whichever that is
            raise UsageError("base_url is no address: give one like https://api.openai.com/v1.") from error
        if url.userinfo or url.query or url.fragment:  # it is stored and printed
            raise UsageError("base_url has a user, query or fragment in it, where a key might be: give it without.")
        if url.scheme not in ("http", "https") or not url.host:
            raise UsageError(f"base_url {self.base_url!r} is no http or https address: give one with a host.")
        if not re.fullmatch(r"[!-~]*", self.api_key.get_secret_value()):
            raise UsageError(
                "the key has blanks or letters beyond ASCII in it: set OPENAI_API_KEY to the key alone, or --api_key."
            )
        for names, least, said in (
            (("max_tokens", "max_concurrency"), 1, "1 or more"),
            (("max_retries",), 0, "0 or more"),
            (("timeout", "max_seconds", "max_cost"), math.ulp(0.0), "a finite number above 0"),
            (("input_price", "output_price"), 0, "a finite number of 0 or more"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and self.max_cost is not None and name.endswith("price"):
                    raise UsageError(f"max_cost needs the price of a million tokens: give {name}, too.")
                if value is not None and not least <= value < math.inf:
                    raise UsageError(f"{name} must be {said}, got {value}.")

    @property
    def settings(self) -> dict[str, Any]:
        """What a reply depends on, besides what is said."""
        return {"model": self.model, "base_url": self.base_url, "temperature": 0, "max_tokens": self.max_tokens}

    def body(self, messages: Messages) -> bytes:
        """The JSON of a request."""
        said = [{"role": role, "content": content} for role, content in messages]
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens, "messages": said}
        return json.dumps(body).encode()

    def key(self, messages: Messages) -> str:
        """What a reply to these messages goes by: a digest of everything that it depends on."""
        return hashlib.sha256(f"{self.base_url}\n".encode() + self.body(messages)).hexdigest()

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost, in the unit of the prices; 0 without prices."""
        return (prompt_tokens * (self.input_price or 0) + completion_tokens * (self.output_price or 0)) / 1e6

    def ask(self, conversations: Iterable[Messages], replies: ReplyFile) -> "Asking":
        """Ask everything that has no reply yet, equal messages once, and show the progress."""
        bodies = {self.key(messages): self.body(messages) for messages in conversations}
        pending = {key: body for key, body in bodies.items() if key not in replies}
        with tqdm(total=len(bodies), initial=len(bodies) - len(pending), desc="Asking", unit="reply") as bar:
            asking = Asking(self, replies, pending, bar)
            if pending:
                asyncio.run(asking.run())
        return asking


class _Fault(Exception):
    """Why a request got no reply, and the least seconds to wait; None where asking again is no use."""

    def __init__(self, said: str, wait: float | None = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


class Asking:
    """One run of asking, and how it went.

    ``new`` replies came; ``cost`` is what they cost, and at most what got no usable reply can have cost; ``stopped``
    says why it ended early, and ``faults`` what kept requests from being answered, and how many of them.
    """

    def __init__(self, endpoint: ChatEndpoint, replies: ReplyFile, pending: Mapping[str, bytes], bar: tqdm) -> None:
        self.endpoint, self.replies, self.pending, self.bar = endpoint, replies, iter(pending.items()), bar
        self.new, self.cost, self.stopped, self.faults = 0, 0.0, "", Counter[str]()
        self.workers = min(endpoint.max_concurrency, len(pending))
        self.deadline = time.monotonic() + (endpoint.max_seconds or math.inf)
        self.over, self.settled = asyncio.Event(), asyncio.Event()
        self.on_the_way: list[float] = []  # what each request may cost at most
        self.retries = self.failed_in_a_row = 0
        self.secret = "" if endpoint.api_key is None else endpoint.api_key.get_secret_value()

    async def run(self) -> None:
        """Ask until there is nothing more to ask, or no more may be asked."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        loop = asyncio.get_running_loop()
        before: dict[int, Any] = {}

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

        def interrupt(*_: object) -> None:
            put_back()
            loop.call_soon_threadsafe(self.stop, "it was interrupted")

        with suppress(ValueError):  # not in the main thread
            before |= {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        # A redirect would take the key elsewhere, and neither budget nor time would see the client's own retries.
        http, url = DefaultAsyncHttpxClient(follow_redirects=False), self.endpoint.base_url
        client = AsyncOpenAI(api_key="-", base_url=url, timeout=None, max_retries=0, http_client=http)
        try:
            async with client as self.client:
                await asyncio.gather(*(self.work() for _ in range(self.workers)))
        finally:
            put_back()

    def stop(self, reason: str) -> None:
        """Ask nothing new."""
        self.stopped = self.stopped or reason
        self.over.set()
        self.settled.set()

    def is_late(self, seconds: float = 0.0) -> bool:
        """Whether time is up so many seconds from now; then this ends."""
        if late := time.monotonic() + seconds >= self.deadline:
            self.stop(f"max_seconds = {self.endpoint.max_seconds:g} are over")
        return late

    async def pause(self, seconds: float) -> None:
        """Wait before asking again, unless all is over."""
        self.retries += 1
        self.bar.set_postfix(retries=self.retries)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)

    async def work(self) -> None:
        """Get the reply to one request after the other, or note why there is none."""
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

        def wait(state: Any) -> float:
            back_off = wait_exponential(FIRST_WAIT, LONGEST_BACK_OFF)(state) * _jitter.uniform(0.5, 1)
            return max(back_off, state.outcome.exception().wait)

        last = stop_after_attempt(self.endpoint.max_retries + 1)
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda fault: isinstance(fault, _Fault) and fault.wait is not None and fault.wait <= LONGEST_WAIT
            ),
            wait=wait,
            stop=lambda state: last(state) or self.is_late(state.upcoming_sleep),
            sleep=self.pause,
            reraise=True,
        )
        while not self.over.is_set() and (request := next(self.pending, None)) is not None:
            try:
                await retrying(self.attempt, *request)
            except _Fault as fault:
                if fault.wait is None and self.over.is_set():  # it has been said
                    return
                self.faults[str(fault)] += 1
                # A fault of one request alone says nothing of the next, unless there was no good one yet.
                self.failed_in_a_row += fault.wait is not None or not self.new
                if self.failed_in_a_row >= max(MAX_IN_A_ROW, self.workers):
                    self.stop(f"{self.failed_in_a_row} requests in a row got no reply, the last one for this: {fault}")

    async def reserve(self, most: float) -> bool:
        """Whether one more request fits the bounds; what it may cost at most is set aside then."""
        limit = self.endpoint.max_cost or math.inf
        # What is on the way will most likely cost less than was set aside for it.
        while self.on_the_way and self.cost + sum(self.on_the_way) + most > limit and not self.over.is_set():
            self.settled.clear()
            await self.settled.wait()
        if not self.is_late() and self.cost + most > limit:
            self.stop(f"one more request might pass max_cost = {limit:g}, {self.cost:.6g} are spent")
        if not self.over.is_set():
            self.on_the_way.append(most)
        return not self.over.is_set()

    async def attempt(self, key: str, body: bytes) -> None:
        """Ask once, if the bounds allow it."""
        from openai import APIConnectionError, APIStatusError, Omit
        from openai.types.chat import ChatCompletion

        cost = most = self.endpoint.price(len(body), self.endpoint.max_tokens)  # no token is shorter than a byte
        if not await self.reserve(most):
            return
        # Said each time: the environment may have another key for the client, which is not for this endpoint.
        headers = {"Authorization": f"Bearer {self.secret}" if self.secret else Omit()}
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                completion = await self.client.post(
                    "/chat/completions", content=body, cast_to=ChatCompletion, options={"headers": headers}
                )
            reply = self.reply(completion)
        except TimeoutError as error:
            raise _Fault(f"no answer within timeout = {self.endpoint.timeout:g} seconds") from error
        except APIStatusError as error:
            cost = 0.0
            raise self.refused(error.status_code, error.body, error.response.headers.get("Retry-After", "")) from error
        except APIConnectionError as error:
            cause = error.__cause__ or error  # what the HTTP library below the client says
            cost = 0.0 if type(cause).__name__ == "ConnectError" else most
            said = f"{type(cause).__name__}: {self.printable(str(cause))}".removesuffix(": ")
            raise _Fault(f"the connection failed ({said})") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _Fault("the answer is no chat completion") from error
        else:
            self.replies.add(key, reply)
            self.new, self.failed_in_a_row = self.new + 1, 0
            self.bar.update()
            if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                cost = self.endpoint.price(reply.prompt_tokens, reply.completion_tokens)
        finally:  # where it failed, nobody knows what the endpoint did with it
            self.on_the_way.remove(most)
            self.cost += cost
            self.settled.set()

    def reply(self, completion: Any) -> Reply:
        """What is of use in a chat completion, none of which the client has checked."""
        choice, model = completion.choices[0], getattr(completion, "model", None)
        if not isinstance(text := choice.message.content, str | None):
            raise TypeError
        tokens = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt_tokens, completion_tokens = (n if type(n) is int and 0 <= n < 2**63 else None for n in tokens)
        cut = getattr(choice, "finish_reason", None) == "length"
        model = self.without_key(model) if isinstance(model, str) else None
        return Reply(self.without_key(text or ""), cut, model, prompt_tokens, completion_tokens)

    def refused(self, status: int, body: Any, retry_after: str) -> _Fault:
        """What an answer other than 200 means; one that is about every request ends the run."""
        if status == 401:  # its text may repeat a part of the key
            self.stop("the endpoint answers 401, it does not take the key: set OPENAI_API_KEY to one that it takes")
            return _Fault("the endpoint answers 401", None)
        for name in ("detail", "message"):
            body = body[name] if isinstance(body, dict) and name in body else body
        fault = f"the endpoint answers {status} ({self.printable(body if isinstance(body, str) else json.dumps(body))})"
        if status in (408, 409, 425, 429) or status >= 500:
            return _Fault(fault, seconds_to_wait(retry_after))
        if status not in (400, 413, 422):  # which are about one request
            self.stop(f"{fault}: look at base_url, model and what the key allows")
        return _Fault(fault, None)

    def without_key(self, text: str) -> str:
        """A text of the endpoint, which may well repeat the key."""
        if len(self.secret) >= SHORTEST_KEY:
            for spelling in (self.secret, json.dumps(self.secret)[1:-1]):
                text = text.replace(spelling, "[key]")
        return text

    def printable(self, text: str) -> str:
        """A text of the endpoint on one line, short, without the key and without control characters."""
        text = "".join(character if character.isprintable() else " " for character in self.without_key(text))
        return " ".join(text.split())[:200]


def seconds_to_wait(retry_after: str) -> float:
    """What ``Retry-After`` asks for, as a number or as a date; 0 where it says nothing of use."""
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0
