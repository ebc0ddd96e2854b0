"""Each form by hand: what becomes of its fields, what is left and counted, what is refused and how."""

import hashlib
import json
from collections import Counter
from typing import Any

import pytest

from akl_lightning.data.forms import Forms
from akl_lightning.data.records import conversation
from akl_lightning.data.store import RECORD_FEATURES
from akl_lightning.errors import UsageError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def read(record: dict[str, Any], split: str = "train", **names: str) -> tuple[dict[str, Any] | None, Counter]:
    notes: Counter = Counter()
    row = Forms(**names).read(record, "a.jsonl", 7, "a.jsonl, line 7", split, notes)
    if row is not None:
        assert set(row) == set(RECORD_FEATURES) and (row["file"], row["line"]) == ("a.jsonl", 7)
        RECORD_FEATURES.encode_example(row)
    return row, notes


def said(record: dict[str, Any], **names: str) -> list[tuple[str, Any]]:
    """Role and content of each message."""
    row, _ = read(record, **names)
    return [(message["role"], message["content"]) for message in json.loads(row["messages"])]


TWO = [("user", "a"), ("assistant", "b")]
FOUR = [("system", "s"), ("user", "p"), ("assistant", "q"), *TWO]


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, TWO),
        ("messages", {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "p"},
                                   {"role": "assistant", "content": "q"}, {"role": "user", "content": "a"},
                                   {"role": "assistant", "content": "b"}]}, FOUR),
        ("messages", {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, TWO),
        ("conversations", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, TWO),
        ("conversations", {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         TWO),
        ("conversations", {"system": "s", "conversations": [
            {"from": "human", "value": "p"}, {"from": "gpt", "value": "q"}, {"from": "Human", "value": "a"},
            {"from": "GPT", "value": "b"}]}, FOUR),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, TWO),
        ("prompt_completion", {"prompt": [{"role": "user", "content": "a"}],
                               "completion": [{"role": "assistant", "content": "b"}]}, TWO),
        ("prompt_completion", {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, TWO),
        ("instruction", {"instruction": "a", "output": "b"}, TWO),
        ("instruction", {"instruction": "a", "output": "b", "system": "s", "history": [["p", "q"]]}, FOUR),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, TWO),
        ("preference", {"instruction": "a", "chosen": "b", "rejected": "c"}, TWO),
        ("preference", {"prompt": "a", "rejected": [], "chosen": [{"role": "user", "content": "a"},
                                                                  {"role": "assistant", "content": "b"}]}, TWO),
        ("preference", {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, TWO),
        ("preference", {"prompt": [{"role": "user", "content": "a"}],
                        "chosen": [{"role": "assistant", "content": "b"}]}, TWO),
        ("conversations", {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
                           "rejected": {"from": "gpt", "value": "c"}}, TWO),
        ("prompt", {"prompt": "a"}, TWO[:1]),
        ("prompt", {"prompt": "a", "completion": None, "id": "x"}, TWO[:1]),
        ("prompt", {"instruction": "a"}, TWO[:1]),
        ("prompt", {"instruction": "a", "output": None}, TWO[:1]),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, TWO[:1]),
        # null is absent
        ("prompt_completion", {"messages": None, "text": None, "prompt": "a", "completion": "b"}, TWO),
        ("instruction", {"instruction": "a", "input": None, "output": "b", "history": None, "system": None}, TWO),
        ("instruction", {"instruction": "a", "input": float("nan"), "output": "b"}, TWO),
        # numbers and booleans are not
        ("instruction", {"instruction": "a", "output": False}, [("user", "a"), ("assistant", "false")]),
        ("instruction", {"instruction": 1, "output": 0}, [("user", "1"), ("assistant", "0")]),
    ],
)  # fmt: skip
def test_every_form(form: str, record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    row, _ = read(record)
    assert row["form"] == form and row["text"] == row["tools"] == "" and not row["cut"] and row["references"] == []
    assert said(record) == expected


def test_documents() -> None:
    row, _ = read({"text": "One.\nTwo. "})
    assert (row["form"], row["text"], row["messages"]) == ("text", "One.\nTwo. ", "")
    assert read({"content": "One."}, text="content")[0]["text"] == "One."
    assert read({"text": " "}) == (None, Counter({"dropped, without a text": 1}))


def test_an_input_stays_apart_and_zero_is_one() -> None:
    for given, expected in (("i", {"input": "i"}), (0, {"input": "0"}), ("", {}), (None, {})):
        row, _ = read({"instruction": "a", "input": given, "output": "b"})
        assert json.loads(row["messages"])[0] == {"role": "user", "content": "a", **expected}


def test_several_acceptable_responses() -> None:
    row, _ = read({"instruction": "a", "output": [" ", "b", "c"]})
    assert row["references"] == ["b", "c"] and json.loads(row["messages"])[-1]["content"] == "b"
    assert read({"instruction": "a", "output": ["b"]})[0]["references"] == []
    assert read({"instruction": "a", "output": [None, "b", "c"]})[0]["references"] == ["b", "c"]
    assert read({"prompt": "a", "completion": ["b", "c"]})[0]["references"] == ["b", "c"]


def test_tools_and_their_calls() -> None:
    called = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "Easy."},
    ]
    row, _ = read({"messages": called, "tools": [TOOL]})
    assert json.loads(row["messages"]) == called and json.loads(row["tools"]) == [TOOL]
    # Arguments as JSON, tools as JSON, OpenAI's older names, ShareGPT's.
    text = json.loads(json.dumps(called))
    text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'
    assert json.loads(read({"messages": text, "tools": json.dumps([TOOL])})[0]["messages"]) == called
    older = [called[0], {"role": "assistant", "function_call": CALL["function"]}, {"role": "function", "content": "2"}]
    row, _ = read({"messages": [*older, called[3]], "functions": [TOOL["function"]]})
    assert json.loads(row["tools"]) == [TOOL] and json.loads(row["messages"])[1]["tool_calls"] == [CALL]
    shared = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    row, _ = read({"conversations": shared, "tools": json.dumps([TOOL])})
    messages = json.loads(row["messages"])
    assert messages[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert messages[2] == {"role": "tool", "content": "2"} and json.loads(row["tools"]) == [TOOL]


def test_parts_of_a_content_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image", "url": "x.png"}]
    row, _ = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ["b"]}]})
    first, second = json.loads(row["messages"])
    assert first["content"] == parts and second["content"] == [{"type": "text", "text": "b"}]


def test_what_is_not_to_be_learnt() -> None:
    marks = [{"learn": False}, {"weight": 0}, {"weight": 0.0, "learn": True}, {"weight": 1}, {"learn": True}, {}]
    messages = [
        message
        for mark in marks
        for message in ({"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", **mark})
    ]
    row, _ = read({"messages": messages})
    learnt = [message.get("learn") for message in json.loads(row["messages"])[1::2]]
    assert learnt == [False, False, False, None, None, None]
    assert '"weight"' not in row["messages"]


def test_what_is_left_is_counted() -> None:
    """Published data sets hold the same conversation in several forms."""
    pair = {"instruction": "a", "output": "b", "text": "### Instruction: a ### Response: b"}
    row, notes = read(pair)
    assert row["form"] == "instruction"
    assert notes == {"have a field 'text' that is left, because of their 'instruction'": 1}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    preference = {"prompt": "a", "messages": messages, "chosen": messages, "rejected": messages}
    row, notes = read(preference)
    assert row["form"] == "messages" and sum(notes.values()) == 3
    assert notes["have a rejected response, which is left"] == 1
    # A field that is named like one of another form is left once.
    _, notes = read({"messages": messages, "prompt": "a"}, instruction="prompt", output="answer")
    assert notes == {"have a field 'prompt' that is left, because of their 'messages'": 1}
    _, notes = read({"instruction": "a", "input": 0, "output": True})
    assert notes["have a number or boolean under 'input', read as a text"] == 1


def test_answers_of_akl_generate_are_read_by_their_names() -> None:
    answer = {
        "instruction": "a", "input": "i", "prompt": "a\ni\n", "references": ["x", "y"], "answer": "b", "cut": True,
        "seed": None, "model": "m", "max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    row, _ = read(answer, output="answer")
    assert row["form"] == "instruction" and row["cut"] and row["references"] == []
    assert json.loads(row["messages"]) == [
        {"role": "user", "content": "a", "input": "i"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(UsageError, match="line 7 has no field 'output' beside 'prompt', only instruction, input"):
        read(answer)
    # Of a conversation, the messages are what is answered.
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    talk = {**answer, "instruction": "system: s\n\nuser: a", "input": "", "messages": messages, "tools": [TOOL]}
    row, _ = read(talk, output="answer")
    assert row["form"] == "messages" and json.loads(row["tools"]) == [TOOL] and row["cut"]
    assert json.loads(row["messages"]) == [*messages, {"role": "assistant", "content": "b"}]
    assert read({**talk, "answer": ""}, output="answer")[0] is None


def test_without_a_response_only_a_test_has_a_use_for_it() -> None:
    for record in (
        {"instruction": "a", "output": " "},
        {"prompt": "a", "completion": []},
        {"prompt": "a", "completion": [{"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    ):
        assert read(record) == (None, Counter({"dropped, without a response": 1}))
        assert json.loads(read(record, "test")[0]["messages"]) == [{"role": "user", "content": "a"}]
    alone = {"messages": [{"role": "assistant", "content": "b"}]}
    for record in ({"instruction": " ", "output": "b"}, {"messages": []}, {"prompt": ""}, alone):
        assert read(record) == (None, Counter({"dropped, without a prompt": 1}))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "reply": "b"}, "line 7 fits no form, its fields are question, reply: name them"),
        ({}, "line 7 fits no form, its fields are none"),
        ({"messages": None}, "line 7 fits no form, its fields are none"),
        ({"prompt": "a", "response": "b"}, "line 7 has no field 'output' beside 'prompt', only prompt, response: name"),
        ({"instruction": "a", "response": "b"}, "line 7 has no field 'output' beside 'instruction', only instruction"),
        ({"text": "a", "answer": "b"}, "line 7 has no field 'output' beside 'text', only text, answer"),
        ({"messages": [{"role": "user", "content": "a"}], "answer": "b"}, "no field 'output' beside 'messages'"),
        ({"messages": "hello"}, "line 7: the field 'messages' is a text and no JSON of a list"),
        ({"messages": {"role": "user"}}, "line 7: the field 'messages' is no list but"),
        ({"messages": ["a"]}, "line 7: message 1 is no object but 'a'"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "line 7: message 1 has the unknown role 'narrator'"),
        ({"conversations": [{"from": "pope", "value": "a"}]}, "line 7: message 1 has the unknown role 'pope'"),
        ({"messages": [{"content": "a"}]}, "line 7: message 1 has no role"),
        ({"messages": [{"role": "user", "content": None}]}, r"line 7: message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the field 'message 1: content' is no text but"),
        ({"messages": [{"role": "user", "content": "a", "learn": True}]}, "message 1 is the user's and to be learnt"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "message 1 has 0.5 as its 'weight'"),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "message 1 has 'x' as a call of a tool"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "message 1 has a call of a tool without a"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "is a call of a tool but no JSON"),
        ({"instruction": "a", "output": {"b": 1}}, "message 1 has no role"),
        ({"instruction": "a", "output": "b", "history": [["p"]]}, "the field 'history' has .*, which is no pair"),
        ({"instruction": "\ud800", "output": "b"}, r"line 7 is no JSON in UTF-8 \(.*surrogates"),
        ({"instruction": "a", "output": "b\udfff"}, r"line 7 is no JSON in UTF-8 \(.*surrogates"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "the field 'completion' does not end"),
        ({"chosen": "Human: a", "rejected": "b"}, "has a chosen response without a prompt"),
        ({"prompt": "z", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "has a prompt that is not among the chosen messages"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "a"}]},
         "has a system message and another one under 'system'"),
        ({"messages": [{"role": "user", "content": [b"x"]}]}, "message 1 has .* among the parts of its content"),
    ],
)  # fmt: skip
def test_bad_records_are_one_sentence(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read(record)
    assert str(error.value).startswith("a.jsonl, line 7") and str(error.value).endswith(".")


def test_one_field_for_two_things() -> None:
    with pytest.raises(UsageError, match="the field 'answer' cannot be both instruction and output"):
        Forms(instruction="answer", output="answer")
    with pytest.raises(UsageError, match="the field 'dialog' cannot be both messages and text"):
        Forms(messages="dialog", text="dialog")


def test_fields_of_other_names() -> None:
    assert said({"question": "a", "reply": "b", "id": 1}, instruction="question", output="reply") == TWO
    # What is a form by itself may be one of a pair's fields.
    assert said({"text": "a", "summary": "b"}, instruction="text", output="summary") == TWO
    assert said({"text": "a"}, instruction="text", output="summary") == TWO[:1]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said({"dialog": messages, "messages": "none"}, messages="dialog") == TWO
    assert said({"messages": messages[:1], "label": "b"}, instruction="messages", output="label") == TWO
    # Others beside them are told as ever.
    assert said({"messages": messages}, instruction="question", output="reply") == TWO


def test_a_single_instruction_keeps_its_place_among_the_splits() -> None:
    """Earlier versions hashed instruction and input, or the name."""

    def first_bytes(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)

    assert read({"instruction": "a", "input": "i", "output": "b"})[0]["key"] == first_bytes("a\0i")
    assert read({"prompt": "a", "completion": "b"})[0]["key"] == first_bytes("a\0")
    messages = [{"role": "user", "content": "a"}]
    assert conversation(messages, "docstring", "a.py", 1, name="a.b")["key"] == first_bytes("a.b")
    # The prompt decides, not the response.
    longer = [*messages, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    keys = {conversation([*longer, {"role": "assistant", "content": end}], "messages", "", 1)["key"] for end in "de"}
    assert len(keys) == 1 and keys != {conversation(messages, "messages", "", 1)["key"]}
