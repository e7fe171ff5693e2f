"""Runs side by side: which are one method, what they are called, which can't be compared, and what is said of them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import LONGER, quick
from test_report import HOSTILE, Page, lines, samples

from flowtilt.cli import main
from flowtilt.config import load_recipe, to_toml
from flowtilt.errors import UserError
from flowtilt.report.compare import as_json, compare, text, write_comparison

SCORES = (0.2, 0.4, 0.8)


def make(folder: Path, *overrides: str, scores: tuple[float, ...] = SCORES, each: int = 1000, **more: Any) -> Path:
    """A finished run: an evaluation every 10 rollouts, `each` network evaluations, 2 s and 3 optimizer steps a rollout."""
    folder.mkdir(parents=True)
    last = 10 * (len(scores) - 1)
    recipe = load_recipe("playground", [f"rollouts={last or 1}", *overrides])
    (folder / "recipe.toml").write_text(to_toml(recipe))
    spent = [{"rollout": s, "network_evaluations": each * s, "optimizer_step": 3 * s, "seconds": 2.0 * s} for s in range(1, last + 1)]
    lines(folder / "metrics.jsonl", [record | {"loss": 0.5} for record in spent])
    scored = [{"rollout": 10 * k, "score": score, "column": "playground_strict", "images": 240} for k, score in enumerate(scores)]
    lines(folder / "evaluations.jsonl", [record | {"seconds": 2.0 * record["rollout"]} | more for record in scored])
    (folder / "summary.json").write_text(json.dumps({"recipe": "playground", "rollouts": last, "seconds": 2.0 * last}))
    return folder


@pytest.fixture
def six(tmp_path: Path) -> list[Path]:
    """Two methods of three seeds: the second is twice as fast, in everything."""
    slow = [make(tmp_path / f"slow-{s}", f"seed={s}", scores=(0.2, 0.4 + s / 100, 0.8 + s / 100)) for s in range(3)]
    scores = [(0.2, 0.8 + s / 100, 0.8 + s / 100) for s in range(3)]
    return slow + [make(tmp_path / f"fast-{s}", f"seed={s}", "objective.beta=0.5", scores=scores[s]) for s in range(3)]


def page(comparison: Any, folder: Path) -> Page:
    write_comparison(comparison, folder / "compare.html")
    found = Page((folder / "compare.html").read_text())
    assert not found.open, f"left open: {found.open}"
    return found


def names(*runs: Path, **options: Any) -> list[tuple[str, list[int]]]:
    return [(method.label, method.seeds) for method in compare(runs, **options).methods]


def test_runs_that_differ_only_in_the_seed_are_one_method_named_by_what_differs(six):
    assert names(*six) == [("beta=1.0", [0, 1, 2]), ("beta=0.5", [0, 1, 2])]


def test_what_changes_no_result_makes_no_other_method(tmp_path):
    a = make(tmp_path / "a")
    unlike = [
        "name=x",
        "micro_batch=4",
        "rollouts=99",
        "run=r",
        "guards=off",
        'track=["wandb"]',
        "checkpoint.every=3",
        "evaluate.samples=1",
    ]
    b = make(tmp_path / "b", "seed=1", *unlike, "rewards.playground={weight=1.0}")
    (method,) = compare([a, b]).methods
    assert method.seeds == [0, 1]


def test_with_several_differences_the_first_keeps_its_name_and_others_say_what_they_changed(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", "optimizer.lr=1e-3")
    c = make(tmp_path / "c", "rollout.steps=9", "rewards.jpeg_size=0.1")
    assert [label for label, _ in names(a, b, c)] == ["playground", "lr=0.001", "rollout.steps=9, rewards.jpeg_size=0.1"]


def test_a_reward_of_ones_own_is_called_by_its_name(tmp_path):
    (tmp_path / "mine.py").write_text("def light(images, prompts):\n    return images.mean((1, 2, 3))\n")
    a, b = make(tmp_path / "a"), make(tmp_path / "b", f"rewards.mine={tmp_path / 'mine.py'}:light")
    assert [label for label, _ in names(a, b)] == ["without reward mine", "with reward mine"]


def test_what_is_no_run_among_runs_is_left_out_with_a_word(tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    words = ["compare", str(make(tmp_path / "a")), str(tmp_path / "sweep"), "-o", str(tmp_path / "page.html")]
    assert main(words) == 0 and f"left out, as no run: {tmp_path / 'sweep'}" in capsys.readouterr().err


def test_recipes_of_different_names_are_called_by_them(tmp_path):
    a, b = make(tmp_path / "a", "name=one"), make(tmp_path / "b", "name=two", "ema=0.5")
    assert [label for label, _ in names(a, b)] == ["one", "two"]


def test_a_label_puts_runs_together_whatever_their_recipes(tmp_path):
    a, b, c = make(tmp_path / "a"), make(tmp_path / "b", "ema=0.5"), make(tmp_path / "c", "ema=0.7")
    found = compare([a, b, c], labels={"both": [b, c]})
    assert [(m.label, len(m.entries)) for m in found.methods] == [("playground", 1), ("both", 2)]
    assert any("both are not of one recipe: ema" in note for note in found.notes)


def test_costs_are_read_off_the_straight_line_and_compared_with_the_first(six):
    found = compare(six, targets=[0.6])
    slow, fast = found.methods
    # the middle seed crosses .6 at 10 + 10 (.6 - .41) / (.81 - .41) = 14.75 rollouts of a thousand; the fast one at 10 (.4 / .61)
    assert found.reach(slow, "evaluations", 0.6).span.value == pytest.approx(14_750)
    assert found.reach(slow, "seconds", 0.6).span.value == pytest.approx(29.5)
    assert found.reach(fast, "optimizer-steps", 0.6).span.value == pytest.approx(30 * 0.4 / 0.61)
    against = found.reach(fast, "evaluations", 0.6).against
    assert against and against.of.value == pytest.approx(10 * 0.4 / 0.61 / 14.75)
    assert found.reach(slow, "evaluations", 0.6).against is None


def test_a_score_that_half_the_seeds_never_reached_is_not_reached(six, tmp_path):
    found = compare(six, targets=[0.815])
    assert "not reached (in 20, fastest seed 19.9)  1 of 3" in text(found)
    assert page(found, tmp_path).says("not reached in 20, fastest seed 19.9 1 of 3")
    assert "No method reached 0.815. The highest final score is that of beta=1.0 and beta=0.5, 0.810" in text(found).replace("\n  ", " ")
    rows = as_json(found)["methods"][0]["reach"]
    assert rows[0]["cost"] == {"median": None, "low": pytest.approx(19_875), "high": None} and rows[0]["runs"] == 1


def test_without_a_target_a_round_score_is_taken_that_every_method_reached(six, tmp_path):
    found = compare(six)
    assert found.targets == [0.8] and not found.chosen
    assert page(found, tmp_path).says("the highest round one that the median of every method reached and no run began with")
    flat = make(tmp_path / "flat", "ema=0.5", scores=(0.2, 0.2, 0.1))
    assert compare([flat]).targets == []


def test_scores_are_also_compared_where_the_shortest_run_ends(tmp_path):
    long, short = make(tmp_path / "a"), make(tmp_path / "b", "ema=0.5", scores=(0.2, 0.5))
    found = compare([long, short])
    assert found.at_equal_cost(found.methods[0], "evaluations").value == pytest.approx(0.4)
    assert found.final(found.methods[0]).value == pytest.approx(0.8)


def unfinished(folder: Path, *overrides: str, **more: Any) -> Path:
    """A run of 100 rollouts that is going on."""
    run = make(folder, *overrides, **more)
    (run / "summary.json").unlink()
    return run


def test_a_method_whose_run_ended_before_is_not_judged(tmp_path):
    long = make(tmp_path / "long", scores=(0.2, 0.3, 0.4, 0.8))
    short = make(tmp_path / "short", "ema=0.5", scores=(0.2, 0.35))
    for runs in ((long, short), (short, long)):
        said = " ".join(text(compare(runs, targets=[0.6])).split())
        assert "did not get there" not in said and "was first" not in said
        assert "ema=0.98 reached 0.6 after 25 k network evaluations. Runs ended before that, ema=0.5 at 10 k," in said
        assert "so which is first is not known. At 10 k network evaluations, where the shortest run ends," in said
        assert "the highest score is that of ema=0.5, 0.350." in said
    first, second = (" ".join(text(compare(runs, targets=[0.6])).split()) for runs in ((long, short), (short, long)))
    assert "not known (ended at 0.4 x the first's cost)" in first and "not known (the first ended at 0.4 x this cost)" in second


def test_a_method_that_went_further_without_getting_there_is_judged(tmp_path):
    fast, slow = make(tmp_path / "fast"), make(tmp_path / "slow", "ema=0.5", scores=(0.2, 0.25, 0.3))
    said = " ".join(text(compare([fast, slow], targets=[0.6])).split())
    assert "ema=0.98 was first to 0.6, after 15 k network evaluations; ema=0.5 had not reached it after 20 k." in said
    assert "more than 1.3 x (did not get there)" in said
    assert "less than 0.75 x (the first did not get there)" in " ".join(text(compare([slow, fast], targets=[0.6])).split())
    rows = as_json(compare([fast, slow], targets=[0.6]))["methods"][1]["reach"]
    assert rows[0]["against_baseline"] == {"median": pytest.approx(20 / 15), "low": None, "high": None, "bound": ">"}


def test_nobody_is_first_to_a_score_that_a_base_has(tmp_path):
    a = make(tmp_path / "a", scores=(0.3, 0.4, 0.8))
    young = unfinished(tmp_path / "young", "ema=0.5", "seed=1", scores=(0.345,))
    found = compare([a, young])
    said = text(found)
    assert found.targets == [] and "was first" not in said and "after 0" not in said
    assert "nothing can be compared yet" in said
    given = text(compare([a, make(tmp_path / "b", "ema=0.6", scores=(0.5, 0.6, 0.7))], targets=[0.4]))
    assert "was first" not in given and "at the start" in given


def test_the_page_says_what_the_terminal_says(six, tmp_path):
    found = compare(six, targets=[0.6])
    said, shown = text(found), page(found, tmp_path)
    assert "beta=0.5 was first to 0.6, after 6.56 k network evaluations; beta=1.0 after 14.8 k." in said
    assert shown.says("beta=0.5 was first to 0.6, after 6.56 k network evaluations; beta=1.0 after 14.8 k.")
    assert "0.810 (0.800 to 0.820)" in said and shown.says("0.810 0.800 to 0.820")
    assert "0.44 x (0.44 to 0.44)" not in said and "0.44 x" in said and shown.says("0.44 ×")
    assert max(map(len, said.splitlines())) <= 110


def test_the_chosen_axis_leads_and_the_others_are_a_tab_away(six, tmp_path):
    shown = page(compare(six, axis="seconds"), tmp_path)
    buttons = [attrs for attrs in shown.all("input") if attrs["type"] == "radio"]
    assert [attrs["id"] for attrs in buttons] == ["by-seconds", "by-evaluations", "by-rollouts", "by-optimizer-steps"]
    assert ["checked" in attrs for attrs in buttons] == [True, False, False, False]
    assert len([attrs for attrs in shown.all("svg") if attrs.get("role") == "img"]) == 4


def test_seeds_that_overlap_are_said_to(six, tmp_path):
    close = make(tmp_path / "close", "objective.beta=0.5", "seed=3", scores=(0.2, 0.41, 0.8))
    found = compare([*six[:3], close], targets=[0.6])
    assert "overlap, so that their order may be chance" in text(found)
    assert "overlap" not in text(compare(six, targets=[0.6]))


def test_a_cost_that_was_not_logged_is_no_axis(tmp_path):
    a = make(tmp_path / "a")
    lines(a / "metrics.jsonl", [{"rollout": s, "seconds": 2.0 * s} for s in range(1, 21)])
    assert compare([a], axis="seconds").axes == ["seconds", "rollouts"]
    with pytest.raises(UserError, match="lacks network_evaluations"):
        compare([a])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("evaluate.steps=7", "evaluate.steps is 20"),
        ("evaluate.images=12", "evaluate.images is 240"),
        ("evaluate.guidance=2.0", "evaluate.guidance is 1.0"),
        ("evaluate.solver=heun", "evaluate.solver is euler"),
        ("evaluate.solver=cps", "evaluate.eta is none"),
        ("evaluate.prompts=mine.txt", "evaluate.prompts is playground"),
        ('evaluate.rewards=["playground"]', "evaluate.rewards is playground_strict"),
        ("model.path=other", "model.path is playground"),
    ],
)
def test_runs_that_were_not_judged_alike_are_refused_unless_mixed(tmp_path, override, key):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", override)
    with pytest.raises(UserError, match=key) as error:
        compare([a, b])
    assert str(a) in str(error.value) and str(b) in str(error.value) and "--mixed" in str(error.value)
    found = compare([a, b], mixed=True)
    assert len(found.methods) == 2 and "Scores can't be compared" in text(found)
    shown = page(found, tmp_path)
    assert shown.says(key) and shown.says("do not sample from the same noise")


def test_a_run_whose_evaluation_was_changed_on_its_way_is_refused(tmp_path):
    a = make(tmp_path / "a")
    records = [json.loads(line) for line in (a / "evaluations.jsonl").read_text().splitlines()]
    lines(a / "evaluations.jsonl", [records[0] | {"images": 24}, *records[1:]])
    with pytest.raises(UserError, match=r"evaluate\.images is 24, then 240 within"):
        compare([a])


def test_what_makes_a_comparison_less_sure_is_noted(tmp_path):
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", "ema=0.5", "seed=1", "rollouts=50")
    c = make(tmp_path / "c", "ema=0.5", scores=(0.3, 0.4))
    (a / "environment.json").write_text(json.dumps({"device": "A100", "processes": 8}))
    (b / "environment.json").write_text(json.dumps({"device": "H100"}))
    said = " ".join(compare([a, b, c]).notes)
    assert "Not finished: ema=0.5, seed 1 (20 of 50 rollouts)" not in said, "the summary says that it ended"
    (b / "summary.json").unlink()
    said = " ".join(compare([a, b, c]).notes)
    assert "Not finished: ema=0.5, seed 1 (20 of 50 rollouts)" in said
    assert "ema=0.98 has 0; ema=0.5 has 0, 1" in said
    assert "ema=0.5 after 10 and 20 rollouts" in said
    assert "different machines: 8 x A100; H100" in said
    assert "Before training, seed 0 scores 0.2000" in said and "0.3000" in said
    assert compare([a]).notes == []


def test_images_from_the_same_noise_stand_side_by_side(six, tmp_path):
    for run in six[1:3] + six[4:]:
        samples(run, 0)
        samples(run, 20)
    shown = page(compare(six), tmp_path)
    alts = [image["alt"] or "" for image in shown.all("img")]
    assert [alt.partition(":")[0] for alt in alts[:3]] == [f"two red circles, {name}" for name in ("base", "beta=1.0", "beta=0.5")]
    assert shown.says("from the same noise (seed 1)"), "of seed 0 nothing was kept"
    others = compare([six[1], six[5]])
    assert page(others, tmp_path).says("other seeds sample from other noise")


def test_guards_are_marked_on_the_curve_of_their_run_and_told_once(six, tmp_path):
    for run in six[:2]:
        lines(run / "guards.jsonl", [{"rollout": 10, "guard": "no_contrast", "message": "beta does nothing"}])
    shown = page(compare(six), tmp_path)
    assert shown.says("no_contrast, beta=1.0 , seed 0 at rollout 10, seed 1 at rollout 10: beta does nothing")
    flags = [attrs for attrs in shown.all("g") if (attrs.get("class") or "").startswith("flag")]
    assert len(flags) == 2 * 4, "two seeds on four axes"
    assert "Triangles mark" in shown.text and "Triangles" not in page(compare(six[2:]), tmp_path).text


def test_nothing_that_a_recipe_or_a_label_says_becomes_markup(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", "ema=0.5")
    for run in (a, b):
        samples(run, 20, prompt=HOSTILE, note=HOSTILE)
        lines(run / "guards.jsonl", [{"rollout": 10, "guard": HOSTILE, "message": HOSTILE}])
    found = compare([a], labels={HOSTILE + "\x1b[31m": [b]})
    shown = page(found, tmp_path)
    assert len(shown.all("script")) == 1 and not [image for image in shown.all("img") if "evil" in (image["src"] or "")]
    assert "\x1b" not in text(found)


def test_one_run_alone_is_only_its_curve(tmp_path):
    found = compare([make(tmp_path / "a")])
    assert "playground: final score 0.800." in text(found) and "of the first" not in text(found)
    assert page(found, tmp_path).says("playground: final score 0.800.")


def test_each_mistake_ends_in_one_clear_line(tmp_path, capsys):
    a, twin = str(make(tmp_path / "a")), str(make(tmp_path / "twin"))
    young = make(tmp_path / "young", "ema=0.5")
    (young / "evaluations.jsonl").unlink()
    out = ["-o", str(tmp_path / "page.html")]
    for words, said in (
        ([str(tmp_path / "nowhere")], "not a run"),
        ([], "which runs?"),
        ([str(young)], "no evaluation yet"),
        ([a, a + "/."], "given twice"),
        ([a, twin], "same recipe and seed"),
        ([a, "--label", "x"], "NAME=RUN,RUN"),
        ([a, "--label", f"x={a}", "--label", f"x={twin}"], "two --label of one name"),
        ([a, "--label", f"playground={twin}"], "two methods are called playground"),
        ([a, "--target", "nan"], "must be a number"),
        ([a, "--axis", "hours"], "--axis"),
    ):
        assert main(["compare", *words, *out]) == 2, words
        complaint = capsys.readouterr().err.strip()
        assert complaint.startswith("flowtilt: ") and said in complaint and "\n" not in complaint, complaint
    assert not (tmp_path / "page.html").exists()
    assert main(["compare", "--label", f"x={a}", "--label", f"y={twin}", *out]) == 0


def test_a_real_pair_of_runs_is_compared_without_torch(learnt, tmp_path):
    from flowtilt import Trainer

    other = tmp_path / "other"
    Trainer(quick(other, *LONGER, "optimizer.lr=1e-4", whole=True)).run()
    words = [str(learnt), str(other), "--axis", "optimizer-steps", "-o", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")]
    code = f"import sys; from flowtilt.cli import main; assert main({['compare', *words]!r}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lr=0.003" in done.stdout and "lr=0.0001" in done.stdout and "note:" not in done.stdout
    found = json.loads((tmp_path / "c.json").read_text())
    assert [method["runs"][0]["optimizer_step"] for method in found["methods"]] == [[0, 4, 8]] * 2
    assert found["methods"][0]["runs"][0]["scores"][0] == found["methods"][1]["runs"][0]["scores"][0], "before training, the same images"
    shown = Page((tmp_path / "c.html").read_text())
    assert len(shown.all("img")) == 4 * 3 and shown.says("from the same noise (seed 0)")


# files in other folders --------------------------------------------------------------------------------


def with_prompts(folder: Path, content: str, *, known: bool = True, name: str = "mine.txt") -> Path:
    """A run on a prompt file beside it."""
    folder.mkdir()
    file = folder / name
    file.write_text(content)
    made = make(folder / "run", f"prompts={file}", f"evaluate.prompts={file}")
    digest = hashlib.sha256(content.encode()).hexdigest()
    entries = [{"key": key, "path": str(file), "sha256": digest} for key in ("prompts", "evaluate.prompts")]
    (made / "sources.json").write_text(json.dumps({"files": entries if known else []}))
    return made


@pytest.mark.parametrize("known", [True, False])
def test_the_same_prompts_in_two_folders_are_one_protocol_and_one_method(tmp_path, known):
    a, b = (with_prompts(tmp_path / name, "a cat\n", known=known) for name in "ab")
    assert len(compare([a, b], labels={"both": [a, b]}).methods) == 1 and not compare([a, b], labels={"both": [a, b]}).odd


def test_the_same_prompts_under_another_name_are_the_same(tmp_path):
    a, b = with_prompts(tmp_path / "a", "a cat\n"), with_prompts(tmp_path / "b", "a cat\n", name="other.txt")
    assert not compare([a, b], labels={"both": [a, b]}).odd


def test_other_prompts_of_the_same_name_are_another_protocol_and_are_named(tmp_path):
    a, b = with_prompts(tmp_path / "a", "a cat\n"), with_prompts(tmp_path / "b", "a dog\n")
    with pytest.raises(UserError, match=r"evaluate\.prompts is mine\.txt \(sha256:\w+\) in .* and mine\.txt \(sha256:\w+\) in"):
        compare([a, b])
