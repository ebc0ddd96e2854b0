"""The benchmark as a whole, at a tiny size: all of its rows."""

import pytest

from recipes.benchmark_sampling import main


def test_everybody_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    main(prompts=16, new_tokens=2, rounds=1, memory=0.1)
    said = capsys.readouterr().out
    rows = ("generate, 16 prompts", "GenerateEngine, later", "ContinuousBatching, later", "off-policy", "on rollouts")
    found = [next((line.split() for line in said.splitlines() if row in line), [row]) for row in rows]
    assert all(float(row[-1]) > 0 for row in found)  # of the first of its section
    assert found[0][-1] == found[3][-1] == "1.00"
