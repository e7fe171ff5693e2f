"""A run whose images a judge on a server compares: from the recipe to the report, and on from a checkpoint."""

import json
import threading

import pytest
from conftest import QUICK, two_blocks

from flowtilt import Trainer
from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.errors import UserError
from flowtilt.io.files import read_lines
from flowtilt.playground.judge import server


@pytest.fixture(scope="module")
def url():
    found = server(0)
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/v1"
    found.shutdown()
    found.server_close()


def overrides(url, folder, *more):
    options = f'{{source="judge", url="{url}", mode="pairs", max_calls=200, price_in=1.0}}'
    return [*QUICK, "rollouts=1", "evaluate.rewards=['playground']", two_blocks(), f"rewards={{judge={options}}}", f"run={folder}", *more]


def test_a_run_is_judged_in_pairs_and_a_repeat_costs_nothing(url, tmp_path):
    recipe = load_recipe("playground", overrides(url, tmp_path / "a"))
    Trainer(recipe).run()
    line = read_lines(tmp_path / "a" / "metrics.jsonl")[0]
    calls = 3 * 4 * 3  # each image of three prompts with three others
    assert line["spent/judge/calls"] <= calls + 1 and line["missing/judge"] == 0
    assert line["reward/judge"] == pytest.approx(0.5)  # win rates, by their nature
    page = (tmp_path / "a" / "report.html").read_text()
    assert "What the judges cost" in page and f"{line['spent/judge/calls']:,.0f} of 200" in page

    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "judges").rename(tmp_path / "kept")
    again = Trainer(load_recipe("playground", overrides(url, tmp_path / "b" / "run")))
    (tmp_path / "kept").rename(tmp_path / "b" / "run" / "judges")
    again.rewards["judge"].opened(tmp_path / "b" / "run" / "judges", 0, 1)
    again.run()
    repeated = read_lines(tmp_path / "b" / "run" / "metrics.jsonl")[0]
    assert repeated["spent/judge/calls"] == line["spent/judge/calls"] and repeated["loss"] == line["loss"]


def test_the_plan_says_what_is_asked_and_when_the_budget_ends(url, tmp_path, capsys):
    assert main(["plan", "playground", *overrides(url, tmp_path / "p"), "rollouts=10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["requests"]["judge"]
    assert found["rollout"] == 3 * 4 * 3 and found["whole"] == 360
    assert found["ends"] == "max_calls = 200 ends the run after about 5 of 10 rollouts"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["evaluate.rewards=['judge']"], "evaluate.rewards: judge compares the images of a prompt within a rollout"),
        (["rewards.judge.ask=Better?"], r"rewards.judge: ask has no \{prompt\}"),
        (["rewards.judge.sourc=x"], r"rewards.judge.sourc: unknown key; did you mean 'rewards.judge.source'"),
        (["rewards.judge.ulr=x"], r"rewards.judge: unknown option 'ulr'; did you mean 'url'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_can_t_work_is_one_line_before_anything_is_written(url, tmp_path, more, line):
    with pytest.raises(UserError, match=line):
        Trainer(load_recipe("playground", overrides(url, tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()
