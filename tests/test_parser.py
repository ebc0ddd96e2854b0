"""Sentences about mistakes, whatever words jsonargparse has for them."""

import pytest
from jsonargparse import ArgumentParser

from akl_lightning.parser import OneSentenceParser, one_sentence

KNOWN = {
    "union": """Parser key "trainer.max_epochs":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'int'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: three""",
    "option": """Parser key "trainer.strategy":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'str'>, <class 'lightning.pytorch.strategies.strategy.Strategy'>]
  Errors:
    - Expected a <class 'str'>
    - Problem with given class_path 'akl_lightning.parallel.FSDP2Strategy':
        Option 'foo' is not accepted
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='foo', val='1')""",
    "nested": """Parser key "model.criterion.divergence":
  Problem with given class_path 'akl_lightning.divergences.AdaptiveKL':
    Parser key "mu":
      Expected a <class 'float'>. Got value: x""",
}
"""What version 4.53 says."""


def test_what_is_known_becomes_a_sentence() -> None:
    assert [one_sentence(message) for message in KNOWN.values()] == [
        "trainer.max_epochs: expected int or null, got 'three'.",
        "trainer.strategy: FSDP2Strategy has no option foo; --trainer.strategy.help FSDP2Strategy lists those it has.",
        "model.criterion.divergence.mu: expected float, got 'x'.",
    ]


@pytest.mark.parametrize(
    ("name", "word", "other"),
    [
        ("union", "Expected a", "Wanted a"),
        ("union", "Given value:", "Given:"),
        ("option", "Problem with given class_path", "Trouble with"),
    ],
)
def test_other_words_are_all_kept(name: str, word: str, other: str) -> None:
    message = KNOWN[name].replace(word, other)
    assert one_sentence(message) == " ".join(message.replace('Parser key "', "").replace('":', ":").split())


@pytest.mark.parametrize(
    ("name", "word", "other", "said"),
    [
        ("union", "Errors:", "Reasons:", "trainer.max_epochs: expected int or null, got 'three'."),
        (
            "option",
            "is not accepted",
            "is unknown",
            "trainer.strategy: akl_lightning.parallel.FSDP2Strategy: Option 'foo' is unknown",
        ),
        (
            "nested",
            'Parser key "mu"',
            "Argument mu",
            "model.criterion.divergence: akl_lightning.divergences.AdaptiveKL: Argument mu: Expected a <class "
            "'float'>. Got value: x",
        ),
        ("nested", "Problem with", "Trouble with", "model.criterion.divergence.mu: expected float, got 'x'."),
    ],
)
def test_around_other_words_there_is_a_sentence(name: str, word: str, other: str, said: str) -> None:
    assert one_sentence(KNOWN[name].replace(word, other)) == said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("The flux of --trainer.max_epochs\n  is 'three'", "The flux of --trainer.max_epochs is 'three'"),
        ('Setting "lr":\n  Does not validate', 'Setting "lr": Does not validate'),
        ('Parser key "config": File does not exist: none.yaml', "config: File does not exist: none.yaml"),
        ("", ""),
    ],
)
def test_an_unknown_wording_passes_through_and_ends_with_2(
    message: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: ArgumentParser, *args: object, **settings: object) -> None:
        self.error(message)

    monkeypatch.setattr(ArgumentParser, "parse_args", fail)
    with pytest.raises(SystemExit) as end:
        OneSentenceParser().parse_args([])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n(--help lists the options)\n"
