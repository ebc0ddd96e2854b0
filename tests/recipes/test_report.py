"""The table at the end of a run."""

from rich.console import Console

from common.report import comparison_table


def printed(rows: dict[str, dict[str, float]], title: str) -> list[str]:
    console = Console(width=80)
    with console.capture() as said:
        console.print(comparison_table(rows, title))
    return [line.rstrip() for line in said.get().splitlines() if line.strip()]


def test_what_no_model_has_takes_no_place() -> None:
    rows = {
        "student before": {"fkl": 1.25, "rouge_l": 12.34, "length": 5.0},
        "student after": {"fkl": 0.5},
        "teacher": {"length": 5.0},
    }
    assert printed(rows, "Held-out split") == [
        "Held-out split",
        " model             FKL  ROUGE-L",
        " ──────────────────────────────",
        " student before  1.250     12.3",
        " student after   0.500        -",
    ]


def test_all_that_is_measured_on_responses_fits_a_terminal() -> None:
    figures = dict.fromkeys(("cross_entropy", "fkl", "rkl", "head_error", "tail_error"), 9.999)
    lines = printed({"student before": {**figures, "perplexity": 22026.4, "rouge_l": 100.0}}, "")
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines) and "22026.4" in lines[-1]
