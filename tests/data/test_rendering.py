"""That conversations are written as ``apply_chat_template`` writes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from akl_lightning.data.rendering import Rendering, SampleError, Written
from tests.data import tokenizers

MAKERS = {
    "Llama 3": tokenizers.llama3,
    "Gemma": tokenizers.gemma,
    "Qwen3": tokenizers.qwen3,
    "Mistral": tokenizers.mistral,
    "ChatML": tokenizers.base,
    "marks": lambda: tokenizers.base(tokenizers.MARKED),
    "SmolVLM": tokenizers.smolvlm,
    "Phi-3": tokenizers.phi3,
    "gpt-oss": tokenizers.harmony,
}

CONTENTS = st.sampled_from(["Hi", " a\n", "", "é", "<think>\nso\n</think>\n\n4"])
TURNS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


@pytest.mark.parametrize("name", MAKERS)
def test_every_prompt_and_the_whole_are_as_transformers_writes_them(name: str) -> None:
    tokenizer = MAKERS[name]()
    rendering = Rendering(tokenizer)

    @settings(max_examples=20, deadline=None)
    @given(TURNS, st.booleans())
    def conversations(turns: list[tuple[str, str]], asks: bool) -> None:
        said = [part for turn in turns for part in turn]
        roles = ["user", "assistant"] * len(turns)
        contents = [[{"type": "text", "text": text}] if rendering.parts else text for text in said]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        written = Written(rendering, messages, None, asks)
        dated = rendering.texts[0]  # which writes no day but one
        expected = tokenizer.apply_chat_template(
            messages, chat_template=dated, tokenize=False, add_generation_prompt=asks
        )
        assert written.whole == expected
        for index in range(1, len(messages), 2):
            before = messages[:index]
            assert written.prompt(index) == tokenizer.apply_chat_template(
                before, chat_template=dated, tokenize=False, add_generation_prompt=True
            )

    conversations()


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_a_thought_has_the_name_that_the_template_reads(name: str, read: str) -> None:
    write = "{% for m in messages %}{% if m.READ %}({{ m.READ }}){% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    rendering = Rendering(tokenizers.base(write.replace("READ", read)))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "4", name: "two and two"}]
    assert rendering.text(messages) == "Hi<|im_end|>(two and two)4<|im_end|>"
    assert set(messages[1]) == {"role", "content", name}  # they are left as they were


def test_a_template_cannot_change_what_it_is_given() -> None:
    changes = "{% if messages | length > 2 %}{{ messages.pop() }}{% endif %}" + tokenizers.CHATML
    rendering = Rendering(tokenizers.base(changes))
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    with pytest.raises(SampleError, match="unsafe"):
        rendering.text(messages)
    assert len(messages) == 3
