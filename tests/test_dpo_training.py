"""DPO as a run: pairs of a file and of rollouts, costs, resume, ranks and micro-batches, and what is refused."""

import json
from itertools import pairwise

import pytest
import torch
from conftest import LIGHT, QUICK, two_blocks
from few_steps import going_on, kept, largest, recorded
from PIL import Image

from flowtilt import Trainer, UserError
from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.distributed.world import World
from flowtilt.io.files import read_lines
from flowtilt.plan import Machine, make_plan
from flowtilt.plan.passes import passes_in_all
from flowtilt.playground import world as drawn
from flowtilt.runs.folder import open_run
from flowtilt.training.timing import Phases

CPU = torch.device("cpu")
BRIEF = [one for one in QUICK if not one.startswith("objective.")] + ["evaluate.images=2", "evaluate.samples=1", "evaluate.every=0"]
PAIRS = 5


def write_pairs(folder, number=PAIRS):
    """Pictures of noise, so that no two are alike."""
    folder.mkdir(parents=True)
    prompts = drawn.prompts("train")
    lines = []
    for k in range(number):
        for name in ("w", "l"):
            noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(2 * k + (name == "w")), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / f"{k}{name}.png")
        lines.append(json.dumps({"prompt": prompts[k].text, "chosen": f"{k}w.png", "rejected": f"{k}l.png", "weight": 1 + k}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def offline(run, pairs, *overrides):
    own = [f"objective.pairs={json.dumps(str(pairs))}", "rollout.prompts=3", "rollout.images_per_prompt=2", "objective.times_per_pair=2"]
    return load_recipe("playground-dpo", [*BRIEF, *own, two_blocks(), "evaluate.rewards=['playground']", f"run={run}", *overrides])


def online(run, *overrides):
    return load_recipe("playground-dpo-online", [*BRIEF, two_blocks(), *LIGHT, "rewards.playground=0", f"run={run}", *overrides])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "p")


@pytest.fixture(scope="module")
def read(pairs, tmp_path_factory):
    """The folder of an offline run of two steps with two updates each; tests only read it."""
    run = tmp_path_factory.mktemp("runs") / "offline"
    Trainer(offline(run, pairs)).run()
    return run


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "online"
    Trainer(online(run)).run()
    return run


@pytest.fixture(params=["read", "rolled"])
def done(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def trainer(done, tmp_path):
    """It goes on, with weights that have moved."""
    return going_on(done, tmp_path / "on")


# what a run is -----------------------------------------------------------------------------------------


def test_it_costs_what_the_plan_says(done):
    recipe = open_run(done, [])
    logged = [record["network_evaluations"] for record in read_lines(done / "metrics.jsonl")]
    rows = 2 * 3 * recipe.objective.times_per_pair
    sampled = 3 * 4 * 4 if recipe.objective.type == "dpo" else 0
    assert logged == [sampled + 4 * rows, 2 * (sampled + 4 * rows)] and passes_in_all(recipe).evaluations == logged[-1]
    work = make_plan(recipe, Machine()).work
    assert work["sample"].evaluations == 2 * sampled and work["train"].evaluations == 2 * 4 * rows


def test_it_starts_at_log_2_and_the_second_update_moves_on(done):
    first, second = read_lines(done / "metrics.jsonl")
    assert first["kl"] > 0 and first["skipped_updates"] == 0 and second["optimizer_step"] == 4
    assert first["loss"] != second["loss"]
    assert not [one for one in read_lines(done / "guards.jsonl") if "winner" in one["guard"]]
    assert (done / "lora" / "pytorch_lora_weights.safetensors").is_file() and (done / "report.html").is_file()


def test_a_gone_on_run_is_the_unbroken_one_to_the_bit(done, pairs, tmp_path):
    folder = tmp_path / "run"
    make = offline(folder, pairs, "rollouts=1") if done.name == "offline" else online(folder, "rollouts=1")
    Trainer(make).run()
    again = Trainer(open_run(folder, ["rollouts=2"]), resume=folder)
    assert again.clock.step == 1
    again.run()
    assert kept(folder) == kept(done)


def test_the_micro_batch_is_a_matter_of_memory_only(trainer, monkeypatch):
    found = []
    for size in (96, 3):
        monkeypatch.setattr(trainer.micro_batch, "_first", size)
        trainer.micro_batch.sizes.clear()
        found.append(recorded(monkeypatch))
        trainer.method.step(3, Phases(CPU))
    for (_, whole, sums), (_, parts, others) in zip(*found, strict=True):
        scale = largest(whole)
        assert others == pytest.approx(sums, rel=1e-3, abs=1e-4) and scale > 0
        assert all(torch.allclose(a, b, atol=2e-4 * scale, rtol=1e-2) for a, b in zip(parts, whole, strict=True))


def test_gradients_of_the_ranks_add_up_to_that_of_one(read, tmp_path, monkeypatch):
    method = going_on(read, tmp_path / "on").method
    found, ranks = [], 3
    for world in (World(0, 1, CPU), *(World(rank, ranks, CPU) for rank in range(ranks))):
        monkeypatch.setattr(method, "_world", world)
        found.append(recorded(monkeypatch))
        method.step(3, Phases(CPU))
    whole, *parts = found
    assert len(whole) == 2
    for k, (_, gradient, sums) in enumerate(whole):
        scale = largest(gradient)
        for n, g in enumerate(gradient):
            torch.testing.assert_close(sum(part[k][1][n] for part in parts), g, atol=2e-4 * scale, rtol=1e-2)
        assert {name: sum(part[k][2][name] for part in parts) for name in sums} == pytest.approx(sums, rel=1e-3, abs=1e-4)


def test_times_and_noise_belong_to_a_pairs_place_in_the_run(read, tmp_path):
    method = going_on(read, tmp_path / "on").method
    seen = []
    for step in (3, 4):
        own = method._read(step, [0, 1], [method._pairs[0], method._pairs[1]])
        rows = method.learner._noised(own)
        alone = method.learner._noised(method._read(step, [1], [method._pairs[1]]))
        assert torch.equal(rows.t[2:], alone.t) and torch.equal(rows.eps[2:], alone.eps) and rows.pair.tolist() == [0, 0, 1, 1]
        seen.append(rows)
    assert all(not torch.equal(a.eps, b.eps) and not torch.equal(a.t, b.t) for a, b in pairwise(seen))


def test_an_online_pair_is_the_best_and_the_worst_image_of_its_prompt(rolled, tmp_path, monkeypatch):
    trainer = going_on(rolled, tmp_path / "on")
    method = trainer.method
    scored, _ = method.rollouts.sample(3, trainer.walk.take(6, 3), Phases(CPU))
    learnt = []
    monkeypatch.setattr(method.learner.pairs, "learn", lambda batches, phases: learnt.extend(batches) or {})
    method.learner.learn(3, scored, Phases(CPU))
    by_prompt = {}
    for own, number in learnt:
        assert len(own.positions) == number
        for k, position in enumerate(own.positions):
            by_prompt[position] = own.chosen[k], own.rejected[k]
    advantages = scored.advantages.view(3, 4)
    for prompt in range(3):
        chosen, rejected = by_prompt[3, prompt]
        assert torch.equal(chosen, scored.x0[4 * prompt + int(advantages[prompt].argmax())])
        assert torch.equal(rejected, scored.x0[4 * prompt + int(advantages[prompt].argmin())])


# what is refused ---------------------------------------------------------------------------------------

WRONG = [
    (["objective.pairs="], "objective.pairs: name a file of pairs"),
    (["rewards.playground=1"], "rewards.playground: dpo-offline trains on no reward; give it the weight 0"),
    (["rollout.images_per_prompt=4"], "rollout.images_per_prompt: set it to 2"),
    (["optimizer.steps_per_rollout=4"], "optimizer.steps_per_rollout: 4 updates for 3 pairs per rollout"),
    (["prompts=ocr", "objective.pairs=playground"], 'objective.pairs: "playground" is for prompts = "playground" alone'),
    (["objective.pairs=nowhere.jsonl"], "pairs nowhere.jsonl: No such file"),
    (["rollout.prompts=6"], "5 pairs, but a step takes 6; add pairs or lower rollout.prompts"),
    (["objective.hold_winner=-1"], "objective.hold_winner: must be greater than or equal to 0"),
    (["objective.beta=nan"], "objective.beta: "),
    (["objective.kl=0.1"], "objective.kl: belongs to objective.type = "),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG)
def test_what_could_not_be_trained_is_refused_in_one_line(pairs, tmp_path, overrides, said):
    with pytest.raises(UserError) as caught:
        Trainer(offline(tmp_path / "run", pairs, *overrides))
    assert said in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_bad_row_ends_the_command_with_status_2_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    path = write_pairs(tmp_path / "p")
    (tmp_path / "p" / "3l.png").unlink()
    words = [f"objective.pairs={path}", f"run={tmp_path / 'run'}", two_blocks(), *BRIEF, "rollout.prompts=3", "rollout.images_per_prompt=2"]
    assert main(["train", "playground-dpo", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("flowtilt: pairs ") and 'pairs.jsonl:4: no image 3l.png ("rejected")' in said and not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_pair_file(tmp_path):
    path = write_pairs(tmp_path / "p")
    Trainer(offline(tmp_path / "run", path, "rollouts=1")).run()
    path.write_text(path.read_text() + "\n" + path.read_text())
    with pytest.raises(UserError, match=r"objective\.pairs .*pairs\.jsonl has changed"):
        Trainer(open_run(tmp_path / "run", ["rollouts=2"]), resume=tmp_path / "run")


# pairs that the playground makes -----------------------------------------------------------------------


def test_the_playgrounds_pairs_are_a_function_of_the_seed_and_prefer_what_the_verifier_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["pairs", "playground", "--images", "32", "--per-prompt", "4"]
    for name in ("one", "two"):
        assert main([*words, "-o", name]) == 0
    said = capsys.readouterr().out
    assert "224 network evaluations" in said and "flowtilt train playground-dpo objective.pairs=one" in said
    one, two = (
        sorted((file.relative_to(tmp_path / name), file.read_bytes()) for file in (tmp_path / name).rglob("*.*")) for name in ("one", "two")
    )
    assert one == two
    made = json.loads((tmp_path / "one" / "made.json").read_text())
    records = read_lines(tmp_path / "one" / "pairs.jsonl")
    assert made["pairs"] == len(records) > 0 and made["pairs"] + made["ties"] == 8 and made["images"] == 32
    assert all(record["scores"][0] > record["scores"][1] for record in records)
    assert main([*words, "-o", "one"]) == 2 and "one is there already" in capsys.readouterr().err
    assert main(["pairs", "playground", "--per-prompt", "1", "-o", "three"]) == 2 and not (tmp_path / "three").exists()


def test_a_run_samples_them_once_and_does_not_count_them(tmp_path, monkeypatch, caplog):
    from flowtilt.training.dpo import made

    monkeypatch.setenv("FLOWTILT_PAIRS", str(tmp_path / "cache"))
    monkeypatch.setattr(made, "make", lambda *args, make=made.make, **given: make(*args, images=24, **given))
    own = [*BRIEF, "rollouts=1", "rollout.prompts=2", "rollout.images_per_prompt=2", "optimizer.steps_per_rollout=1"]
    found = []
    for name in ("a", "b"):
        Trainer(load_recipe("playground-dpo", [*own, f"run={tmp_path / name}"])).run()
        found.append(kept(tmp_path / name))
        (folder,) = (tmp_path / "cache").iterdir()
        stamp = (folder / "pairs.jsonl").stat().st_mtime_ns
    assert found[0] == found[1] and stamp == (folder / "pairs.jsonl").stat().st_mtime_ns
    assert read_lines(tmp_path / "a" / "metrics.jsonl")[0]["network_evaluations"] == 2 * 2 * 4
    assert json.loads((folder / "made.json").read_text())["network_evaluations"] == 24 * 7
