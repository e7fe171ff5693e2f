# ruff: noqa: F811 - pytest gives the fixture by its name
"""What the report says of files that it can't read, and what it calls the score."""

import os
from pathlib import Path

import pytest
from test_report import evaluation, lines, report, run  # noqa: F401 - run is a fixture

from flowtilt.config import load_recipe, to_toml
from flowtilt.config.held_out import score_name_of
from flowtilt.training.display import Display

# damaged files ---------------------------------------------------------------------------------------


def test_what_could_not_be_read_is_counted_and_said_once(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"rollout": 40, "loss"\n\xff\xfe\n{"loss": 3}\n'
            + b"[" * 3000
            + b"\n{"
            + b'"rollout": 31, "loss": '
            + b"9" * 5000
            + b"}\n"
            + b"\0" * 37
        )
    (run / "environment.json").write_text('{"a":' * 500 + "1" + "}" * 500)
    lines(run / "evaluations.jsonl", [evaluation(0, 0.31), {"rollout": 15}, evaluation(30, 0.93)])
    (run / "guards.jsonl").write_text('{"guard": "x"}\n')
    page = report(run)
    assert page.text.count("Not all of the run's files could be read") == 1
    for said in (
        "metrics.jsonl: 4 lines cannot be read, 1 line without a rollout",
        "environment.json: cannot be read",
        "evaluations.jsonl: 1 evaluation without a score",
        "guards.jsonl: 1 line without a rollout",
    ):
        assert page.says(said), said


def test_of_a_whole_run_nothing_is_said_to_be_lost(run: Path) -> None:
    assert "could be read" not in report(run).text


def test_a_pipe_or_a_folder_in_a_files_place_is_not_waited_for(run: Path) -> None:
    for name, make in (("metrics.jsonl", os.mkfifo), ("summary.json", os.mkdir)):
        (run / name).unlink()
        make(run / name)
    page = report(run)
    assert page.says("metrics.jsonl: cannot be read") and page.says("summary.json: cannot be read")


# words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "judged", "name"),
    [
        ("playground", None, "held-out score"),
        ("mine.txt", "mine.txt", "score on the training prompts"),
        ("mine.txt", "./mine.txt", "score on the training prompts"),
        ("mine.txt", "others.txt", "held-out score"),
    ],
)
def test_the_terminal_and_the_page_call_the_score_what_it_is(
    prompts: str, judged: str | None, name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("playground", [f"prompts={prompts}", *([f"evaluate.prompts={judged}"] if judged else [])])
    display = Display(3, 0, ("reward/total", "reward"), score_name=score_name_of(recipe))
    display.evaluation(2, 0.5, {})
    display.close()
    assert f"after 2 rollouts: {name} 0.500" in capsys.readouterr().err
    (run / "recipe.toml").write_text(to_toml(recipe))
    assert report(run).says(f"the {name} rose")
