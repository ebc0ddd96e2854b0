"""Ask an OpenAI-compatible chat endpoint: within bounds, with retries, and every reply kept on disk at once."""

import asyncio
import hashlib
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tenacity
from jsonargparse.typing import SecretStr
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, Omit
from openai.types.chat import ChatCompletion
from tqdm.auto import tqdm

from akl_lightning.errors import UsageError

FIRST_WAIT, LONGEST_BACK_OFF = 1.0, 60.0  # seconds; from attempt to attempt the wait, or up to twice as much, doubles
LONGEST_WAIT = 300.0  # seconds; where Retry-After asks for more, the request is given up
MAX_IN_A_ROW = 3  # requests that end without a reply, until the endpoint is taken for dead
SHORTEST_KEY = 8  # letters of a key that is worth hiding: local servers take a digit for one, and it is in every reply
MAY_BE_0 = ("max_retries", "input_price", "output_price")


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

    A line that a kill has damaged is passed over (``damaged`` has their numbers); what it answered is asked again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.damaged, line = path, list[int](), b"\n"
        with path.open("a+b") as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    self |= {record.pop("key"): Reply(**record)}
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                    self.damaged.append(number)
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on the disk when this returns."""
        end = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, **asdict(reply)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, end)
            said = "make room and run the same command again, it asks only what has no reply yet."
            raise UsageError(f"cannot write {self.path} ({error.strerror}): {said}") from error
        self[key] = reply


@dataclass
class ChatEndpoint:
    """An OpenAI-compatible chat endpoint, asked at temperature 0.

    Answers 408, 409, 425, 429 and 5xx, time-outs, lost connections and bodies that are no chat completion are asked
    again after a wait that doubles, beside ``Retry-After``; where several requests in a row get no reply in spite of
    that, asking ends. Ctrl-C or SIGTERM lets what is on the way end and keeps it; a second one ends at once. Call it
    from no running event loop. A setting that cannot be is a UsageError.

    Args:
        model: what the endpoint calls the model; default: the environment's ``OPENAI_MODEL``.
        base_url: address up to and without ``/chat/completions``; default: the environment's ``OPENAI_BASE_URL``.
        api_key: default: the environment's ``OPENAI_API_KEY``, which other users of the machine do not see, as they may
            a flag. It is sent to the endpoint and nowhere stored or printed.
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
        self.model = self.model or os.environ.get("OPENAI_MODEL")
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        self.api_key = self.api_key or SecretStr(os.environ.get("OPENAI_API_KEY", "").strip())
        for mistake in self._mistakes():
            raise UsageError(mistake)

    def _mistakes(self) -> Iterator[str]:
        if not self.model:
            yield "no model is named: give --model, or set OPENAI_MODEL."
        if not self.base_url:
            yield "no endpoint is given: give --base_url, such as https://api.openai.com/v1, or set OPENAI_BASE_URL."
        # It is stored and printed, and a user, a query or a fragment might hold a key.
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[^\s@?#]*)?", self.base_url or ""):
            yield "base_url is no plain http or https address: give one like https://api.openai.com/v1."
        if not re.fullmatch(r"[!-~]*", self._key):
            yield "the key has blanks or letters beyond ASCII in it: set OPENAI_API_KEY to the key alone, or --api_key."
        for name in ("max_tokens", "max_concurrency", "timeout", "max_seconds", "max_cost", *MAY_BE_0):
            if (value := getattr(self, name)) is None and self.max_cost is not None and name.endswith("price"):
                yield f"max_cost needs the price of a million tokens: give {name}, too."
            if value is not None and not (0 < value < math.inf or (value == 0 and name in MAY_BE_0)):
                yield f"{name} must be finite and {'0 or more' if name in MAY_BE_0 else 'above 0'}, got {value}."

    @property
    def _key(self) -> str:
        return self.api_key.get_secret_value() if self.api_key else ""

    @property
    def settings(self) -> dict[str, Any]:
        """What a reply depends on, besides what is said."""
        return {"model": self.model, "base_url": self.base_url, "temperature": 0, "max_tokens": self.max_tokens}

    def request(self, messages: list[dict[str, str]]) -> tuple[str, bytes]:
        """The JSON of a request, and what its reply goes by: a digest of everything that it depends on."""
        said = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens, "messages": messages}
        body = json.dumps(said).encode()
        return hashlib.sha256(f"{self.base_url}\n".encode() + body).hexdigest(), body

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost, in the unit of the prices; 0 without prices."""
        return (prompt_tokens * (self.input_price or 0) + completion_tokens * (self.output_price or 0)) / 1e6

    def ask(self, conversations: Iterable[list[dict[str, str]]], replies: ReplyFile) -> list[Reply | None]:
        """Ask everything that has no reply yet, equal messages once, and show the progress.

        ``new`` replies came then; ``cost`` is what they cost, and at most what got no usable reply can have cost;
        ``stopped`` says why it ended early, and ``faults`` what kept requests from being answered, and how many.
        Gives the replies, None where there is none.
        """
        requests = [self.request(messages) for messages in conversations]
        pending = {key: body for key, body in requests if key not in replies}
        self.new, self.cost, self.stopped, self.faults = 0, 0.0, "", Counter[str]()
        self._replies, self._pending = replies, iter(pending.items())
        self._workers, self._failed_in_a_row = min(self.max_concurrency, len(pending)), 0
        self._deadline = time.monotonic() + (self.max_seconds or math.inf)
        self._over, self._on_the_way = asyncio.Event(), list[float]()  # what each request may cost at most
        if pending:
            with tqdm(total=len(pending), desc="Asking", unit="reply") as self._bar:
                asyncio.run(self._ask())
        return [replies.get(key) for key, _ in requests]

    async def _ask(self) -> None:
        loop, handlers = asyncio.get_running_loop(), ExitStack()

        def interrupt() -> None:
            handlers.close()  # a second one ends at once
            self._stop("it was interrupted")

        # A redirect would take the key elsewhere, and neither budget nor time would see the client's own retries.
        http = DefaultAsyncHttpxClient(follow_redirects=False)
        client = AsyncOpenAI(api_key="-", base_url=self.base_url, timeout=None, max_retries=0, http_client=http)
        async with client as self._client:
            with handlers:
                with suppress(ValueError, RuntimeError):  # not in the main thread
                    for number in (signal.SIGINT, signal.SIGTERM):
                        loop.add_signal_handler(number, interrupt)
                        handlers.callback(loop.remove_signal_handler, number)
                await asyncio.gather(*(self._work() for _ in range(self._workers)))

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        self._over.set()

    def _is_late(self, seconds: float = 0.0) -> bool:
        """Whether time is up so many seconds from now; then this ends."""
        if late := time.monotonic() + seconds >= self._deadline:
            self._stop(f"max_seconds = {self.max_seconds:g} are over")
        return late

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    async def _work(self) -> None:
        """Get the reply to one request after the other, or note why there is none."""
        last = tenacity.stop_after_attempt(self.max_retries + 1)
        growing = tenacity.wait_exponential(FIRST_WAIT, LONGEST_BACK_OFF) + tenacity.wait_random(0, FIRST_WAIT)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: self._fault(error)[1] <= LONGEST_WAIT),
            wait=growing + tenacity.wait_exception(lambda error: self._fault(error)[1]),
            stop=lambda state: last(state) or self._is_late(state.upcoming_sleep),
            sleep=self._pause,
            reraise=True,
        )
        while not self._over.is_set() and (request := next(self._pending, None)) is not None:
            try:
                await retrying(self._attempt, *request)
            except Exception as error:
                said, wait = self._fault(error)
                if said in self.stopped:
                    return
                self.faults[said] += 1
                # A fault of one request alone says nothing of the next, unless there was no good one yet.
                self._failed_in_a_row += wait < math.inf or not self.new
                if self._failed_in_a_row >= max(MAX_IN_A_ROW, self._workers):
                    self._stop(f"{self._failed_in_a_row} requests in a row got no reply, the last one for this: {said}")

    async def _attempt(self, key: str, body: bytes) -> None:
        """Ask once, if the bounds allow it; what it may cost at most is set aside while it is on the way."""
        cost = most = self.price(len(body), self.max_tokens)  # no token is shorter than a byte
        limit = self.max_cost or math.inf
        # What is on the way will most likely cost less than was set aside for it.
        while self._on_the_way and self.cost + sum(self._on_the_way) + most > limit and not self._over.is_set():
            await self._pause(0.01)
        if not self._is_late() and self.cost + most > limit:
            self._stop(f"one more request might pass max_cost = {limit:g}, {self.cost:.6g} are spent")
        if self._over.is_set():
            return
        self._on_the_way.append(most)
        # Said each time: the environment may have another key for the client, which is not for this endpoint.
        how: Any = {"headers": {"Authorization": f"Bearer {self._key}" if self._key else Omit()}}
        try:
            async with asyncio.timeout(self.timeout):
                said = await self._client.post("/chat/completions", content=body, cast_to=ChatCompletion, options=how)
            reply = self._reply(said)
            self._replies.add(key, reply)
            self.new, self._failed_in_a_row = self.new + 1, 0
            self._bar.update()
            if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                cost = self.price(reply.prompt_tokens, reply.completion_tokens)
        except Exception as error:  # where it failed otherwise, nobody knows what the endpoint did with it
            if isinstance(error, APIStatusError) or type(error.__cause__).__name__ == "ConnectError":
                cost = 0.0
            raise
        finally:
            self._on_the_way.remove(most)
            self.cost += cost

    def _fault(self, error: BaseException) -> tuple[str, float]:
        """Why a request got no reply, and the least seconds to wait; infinite where asking again is no use."""
        if isinstance(error, TimeoutError):
            return f"no answer within timeout = {self.timeout:g} seconds", 0.0
        if isinstance(error, APIConnectionError):
            cause = error.__cause__ or error  # what the HTTP library below the client says
            return f"the connection failed ({type(cause).__name__}: {self._printable(str(cause))})", 0.0
        if isinstance(error, ValueError | LookupError | TypeError | AttributeError | RecursionError):
            return "the answer is no chat completion", 0.0
        if not isinstance(error, APIStatusError):
            raise error
        status, body = error.status_code, error.body
        for name in ("detail", "message"):
            body = body[name] if isinstance(body, dict) and name in body else body
        said = self._printable(body if isinstance(body, str) else json.dumps(body))
        if status == 401:  # what it says may repeat a part of the key
            said = "it does not take the key: set OPENAI_API_KEY to one that it takes"
        said = f"the endpoint answers {status} ({said})"
        if status in (408, 409, 425, 429) or status >= 500:
            seconds = error.response.headers.get("Retry-After", "")  # or a date, in whose place the wait grows
            return said, float(seconds) if re.fullmatch(r"\d+(\.\d+)?", seconds, re.ASCII) else 0.0
        if status not in (400, 413, 422):  # which are about one request, all others about every one
            self._stop(f"{said}: look at base_url, model and what the key allows")
        return said, math.inf

    def _reply(self, completion: Any) -> Reply:
        """What is of use in a chat completion, none of which the client has checked."""
        choice, model = completion.choices[0], getattr(completion, "model", None)
        if not isinstance(text := choice.message.content, str | None):
            raise TypeError
        tokens = (getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
        cut = getattr(choice, "finish_reason", None) == "length"
        model = self._without_key(model) if isinstance(model, str) else None
        counts = (n if type(n) is int and 0 <= n < 2**63 else None for n in tokens)
        return Reply(self._without_key(text or ""), cut, model, *counts)

    def _without_key(self, text: str) -> str:
        """A text of the endpoint, which may well repeat the key."""
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_KEY else text

    def _printable(self, text: str) -> str:
        """A text of the endpoint on one line, short, without the key and without control characters."""
        text = "".join(character if character.isprintable() else " " for character in self._without_key(text))
        return " ".join(text.split())[:200]
