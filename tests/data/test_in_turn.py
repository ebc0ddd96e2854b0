"""Which templates are trusted to write one message after another, and that they do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from akl_lightning.data.in_turn import in_turn
from akl_lightning.data.rendering import Rendering, Written
from akl_lightning.data.templates import BEHIND_MESSAGE, CHATML
from tests.data import tokenizers

LOOP = "{% for m in messages %}BODY{{ m['role'] + m['content'] }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
WITH_SYSTEM = LOOP.replace("BODY", "{% if loop.first and messages[0]['role'] != 'system' %}Be short.{% endif %}") + ASKS
NUMBERED = LOOP.replace("BODY", "{% set n = loop.index %}{{ n ~ ', ' ~ loop.index0 }}") + ASKS

TRUSTED = {
    "plain": "plain",
    "alpaca": "alpaca",
    "a format": "Q: {instruction} {input}\nA:",
    "chatml": "chatml",
    "another ChatML": tokenizers.CHATML,
    "parts": tokenizers.SMOLVLM,
    "a system prompt of its own": WITH_SYSTEM,
    "numbers": NUMBERED,
    "set before": "{% set name = 'x' %}" + LOOP.replace("BODY", "{{ name }}") + ASKS,
    "asks by documents": LOOP.replace("BODY", "") + ASKS.replace("'assistant:'", "documents is defined"),
    "what all begin with": "{{ bos_token }}{{ tools }}" + LOOP.replace("BODY", "") + ASKS,
}

LOOKS = {
    "the last": LOOP.replace("BODY", "{% if loop.last %}last{% endif %}") + ASKS,
    "how many": LOOP.replace("BODY", "{{ messages | length }}") + ASKS,
    "how many of the loop": LOOP.replace("BODY", "{{ loop.length }}") + ASKS,
    "another one": LOOP.replace("BODY", "{{ messages[-1]['role'] }}") + ASKS,
    "the next": LOOP.replace("BODY", "{{ loop.nextitem }}") + ASKS,
    "others of the messages": LOOP.replace("in messages", "in messages[1:]").replace("BODY", "") + ASKS,
    "some of the messages": LOOP.replace("in messages", "in messages if m['content']").replace("BODY", "") + ASKS,
    "two loops": LOOP.replace("BODY", "") * 2 + ASKS,
    "whether it asks": LOOP.replace("BODY", "{{ add_generation_prompt }}") + ASKS,
    "something behind": LOOP.replace("BODY", "") + ASKS + "{{ eos_token }}",
    "something behind for no prompt": LOOP.replace("BODY", "") + ASKS.replace("{% endif", "{% else %}end{% endif"),
    "asks by what was said": LOOP.replace("BODY", "") + ASKS.replace("'assistant:'", "messages[0]['role']"),
    "asks by tools": LOOP.replace("BODY", "") + ASKS.replace("'assistant:'", "tools"),
    "asks by what was set": "{% set x = messages[0]['role'] %}"
    + LOOP.replace("BODY", "")
    + ASKS.replace("'assistant:'", "x"),
    "asks with another condition": LOOP.replace("BODY", "") + ASKS.replace("prompt %}", "prompt and not tools %}"),
    "carries something on": "{% set ns = namespace(x=0) %}"
    + LOOP.replace("BODY", "{% set ns.x = 1 %}")
    + ASKS.replace("'assistant:'", "ns.x"),
    "the messages by another name": "{% set all = messages %}" + LOOP.replace("BODY", "{{ all | length }}") + ASKS,
    "marks": tokenizers.MARKED,
    "Qwen3": tokenizers.QWEN3,
    "Llama 3": tokenizers.LLAMA3,
    "Phi-3": tokenizers.PHI3,
    "gpt-oss": tokenizers.HARMONY,
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS)
def test_templates_that_may_look_ahead_are_not_trusted(name: str) -> None:
    assert in_turn(LOOKS[name]) is None


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.sampled_from(["Hi", " a\n", "", "é"])}
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", TRUSTED)
def test_every_prompt_is_as_rendered_by_itself(name: str) -> None:
    rendering = Rendering(tokenizers.phi3(), TRUSTED[name])

    @settings(max_examples=20, deadline=None)
    @given(MESSAGES, st.booleans())
    def every_prompt(messages: list, prompt: bool) -> None:
        if rendering.parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        assert rendering.pieces(messages, None) is not None
        written = Written(rendering, messages, None, prompt)
        assert written.whole == rendering.text(messages, None, prompt)
        for index in range(1, len(messages)):
            assert written.prompt(index) == rendering.text(messages[:index], None, prompt=True)

    every_prompt()


def test_what_cannot_be_told_apart_is_rendered_prompt_by_prompt() -> None:
    rendering = Rendering(tokenizers.base(), CHATML.replace("END", "'<|im_end|>'"))
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    for other in ({"content": f"Hi{BEHIND_MESSAGE}"}, {"reasoning": "so"}, {"content": None}):
        messages = [{**question, **other}, answer]
        assert rendering.pieces(messages, None) is None
        written = Written(rendering, messages, None)
        assert written.whole == rendering.text(messages)
        assert written.prompt(1) == rendering.text(messages[:1], prompt=True)


def test_a_template_that_fails_as_it_asks_is_not_taken_apart() -> None:
    template = in_turn(LOOP.replace("BODY", "") + ASKS.replace("'assistant:'", "raise_exception('no more')"))
    assert template is not None
    assert template.pieces([{"role": "user", "content": "Hi"}], None, {}) is None
