"""Configurations of other code become recipes without being executed. The files here are written for the tests, in the others' form."""

import pytest

from flowtilt.cli import main
from flowtilt.config import load_recipe
from flowtilt.convert import convert
from flowtilt.errors import UserError

BASE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 7
    config.num_epochs = 300
    config.mixed_precision = "bf16"
    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = ""
    pretrained.revision = "main"
    config.sample = sample = ml_collections.ConfigDict()
    sample.sde_window_size = 2
    sample.num_steps = 40
    sample.guidance_scale = 4.5
    sample.global_std = True
    sample.noise_level = 0.7
    config.train = train = ml_collections.ConfigDict()
    train.learning_rate = 3e-4
    train.adam_beta2 = 0.999
    train.clip_range = 1e-4
    train.beta = 0.0
    train.sft = 0.0
    train.timestep_fraction = 0.99
    config.reward_fn = ml_collections.ConfigDict()
    return config
"""
GRPO = """
import os, imp
base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))
GROUPS = 6

def start():
    config = base.get_config()
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    return config

def words():
    gpu_number = 4
    config = start()
    config.dataset = os.path.join(os.getcwd(), "dataset/ocr")
    config.sample.num_steps = 10
    config.sample.train_batch_size = 3
    config.sample.num_image_per_prompt = 8
    config.sample.num_batches_per_epoch = int(GROUPS / (gpu_number * config.sample.train_batch_size / config.sample.num_image_per_prompt))
    assert config.sample.num_batches_per_epoch % 2 == 0, "even"
    config.train.batch_size = config.sample.train_batch_size
    config.train.gradient_accumulation_steps = config.sample.num_batches_per_epoch // 2
    config.train.beta = 0.04
    config.train.sft = 0.5 if gpu_number > 2 else 0.0
    config.reward_fn = {"ocr": 1.0, "mine": 0.5}
    return config

def few():
    config = words()
    config.sample.guidance_scale = 1
    config.sample.sde_window_size = 3
    config.sample.sde_window_range = (0, config.sample.num_steps // 2)
    config.sample.sde_type = "cps"
    return config

def shell():
    config = start()
    config.sample.num_steps = os.cpu_count()
    return config
"""
NFT = """
import imp, os
base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))

def get_config(name):
    return globals()[name]()

def _made(n_gpus, rewards={}, kind="geneval"):
    config = base.get_config()
    size = 9
    config.sample.num_image_per_prompt = 6
    while True:
        if size < 1:
            assert False, "no size"
        if 4 * 6 % (n_gpus * size) == 0:
            config.sample.train_batch_size = size
            config.sample.num_batches_per_epoch = 4 * 6 // (n_gpus * size)
            break
        size -= 1
    config.dataset = os.path.join(os.getcwd(), f"dataset/{kind}")
    config.sample.num_steps = 10
    config.sample.guidance_scale = 1.0
    config.sample.solver = "dpm2"
    config.sample.deterministic = True
    config.pretrained.model = "some/model"
    config.beta, config.decay_type = 0.1, 2
    config.reward_fn = rewards
    return config

def sd3():
    return _made(n_gpus=2, rewards={"geneval": 1.0})
"""
RTDMD = """
model: {pretrained_path: some/model, image_resolution: 512, generator_lora: {enabled: true, rank: 16, lora_alpha: 32, load_path: a.pt}}
grpo:
  num_steps: 4
  noise_level: 0.9
  sde_type: cps
  num_image_per_prompt: 12
  sample_batch_size: 6
  num_batches_per_epoch: 4
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-5
  beta: 0.02
  reward_fn: {pickscore: 1.0, geneval: 2.0}
  step_selection: {enabled: true, num_train_steps: 2}
  last_step_loss: {enabled: true, loss_type: ac_dmd, weight: 0.002, real_guidance_scale_max: 3.5, bp_enabled: true, bp_reward_margin: 2.0}
prompt_path: dataset/geneval
"""


@pytest.fixture
def place(tmp_path):
    for name, text in {"base.py": BASE, "grpo.py": GRPO, "nft.py": NFT, "rtdmd.yaml": RTDMD}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_configuration_of_flow_grpo_becomes_a_recipe_and_what_it_lacks_is_listed(place, capsys):
    assert main(["convert", f"{place}/grpo.py:words", "-o", f"{place}/words.toml"]) == 0
    told = capsys.readouterr()
    recipe = load_recipe(place / "words.toml")
    r, o = recipe.rollout, recipe.objective
    assert (o.type, o.clip_range, o.kl, o.eta, o.window) == ("grpo", 1e-4, 0.04, 0.7, "all")
    assert (r.prompts, r.images_per_prompt, r.steps, r.guidance, recipe.optimizer.steps_per_rollout) == (6, 8, 10, 4.5, 2)
    assert (recipe.prompts, recipe.evaluate.prompts, recipe.seed, recipe.rollouts) == ("ocr-train", "ocr", 7, 300)
    assert recipe.model.dtype == "bfloat16" and recipe.reward_table()["mine"].source.endswith("mine.py:mine")
    for said in ("no counterpart: train.sft = 0.5", "rewards.mine: not built in"):
        assert said in told.err and said in (place / "words.toml").read_text()


def test_the_window_of_a_fast_configuration_is_taken_and_the_default_of_the_others_is_not(place):
    o = load_recipe_of(place, "grpo.py:few").objective
    assert (o.window, o.window_size, o.span, o.sde) == ("random", 3, (0, 5), "cps")


def load_recipe_of(place, name):
    (place / "out.toml").write_text(convert(f"{place}/{name}").toml())
    return load_recipe(place / "out.toml")


def test_a_configuration_of_diffusionnft_is_followed_through_its_loops_and_arguments(place):
    recipe = load_recipe_of(place, "nft.py:sd3")
    o, r = recipe.objective, recipe.rollout
    assert (o.type, o.beta, o.old_policy, o.times_per_image) == ("nft", 0.1, "delayed", 9)
    assert (r.prompts, r.images_per_prompt, r.solver, r.guidance) == (4, 6, "dpm2", 1.0)
    assert recipe.evaluate.rewards == ("geneval/correct", "geneval/strict")


def test_one_of_rtdmd_says_for_how_many_gpus_it_counts_and_reads_no_pickle(place):
    found = convert(f"{place}/rtdmd.yaml", gpus=2)
    tree = found.tree
    assert tree["rollout"] | {"prompts": 4, "images_per_prompt": 12, "eta": 0.9} == tree["rollout"]
    assert tree["objective"]["backprop"] == {"pickscore": 1.0} and tree["objective"]["margin"] == 2.0
    assert tree["objective"]["matching"] == 0.002 and tree["optimizer"]["steps_per_rollout"] == 2 and tree["lora"]["rank"] == 16
    assert found.unmatched == {"grpo.beta": 0.02} and any("a.pt, a pickle" in line for line in found.notes)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("grpo.py:shell", "`os.cpu_count()` is code, and a configuration is not executed"),
        ("grpo.py", "name one of its configurations"),
        ("grpo.py:none", "there is no function none; there are start, words, few, shell"),
        ("grpo.py:start", "says nowhere for how many GPUs"),
        ("missing.py:x", "no such file"),
    ],
)
def test_what_can_not_be_read_is_one_line(place, capsys, file, said):
    assert main(["convert", f"{place}/{file}"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        '__import__("os").system("touch {0}/ran")',
        'open("{0}/ran", "w")',
        "config.seed = [x for x in range(9)]",
        "config.seed = (lambda: 1)()",
        'config.seed = "a" * 10**9',
        "config.seed = 9 ** 9 ** 9",
        "config.seed.__class__ = 1",
        "while True: pass",
        "import subprocess",
        'config.seed = f"{{config:>9999999999}}"',
        "config.seed = 0xffffffffffffffffffff",
        "config.itself = config",
        "config.seed = {{[]: 1}}",
        "for k in 5: pass",
        "break",
    ],
    ids=range(15),
)
def test_code_in_a_configuration_is_refused_with_its_line_and_not_run(place, line):
    body = f"def one():\n    config = ml_collections.ConfigDict()\n    config.seed = 1\n    {line.format(place)}\n    return config\n"
    (place / "code.py").write_text("import ml_collections\n" + body)
    with pytest.raises(UserError, match=r"code\.py:5: ") as caught:
        convert(f"{place}/code.py:one")
    assert "\n" not in str(caught.value) and not (place / "ran").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("grpo: {num_image_per_prompt: 0}", "grpo.num_image_per_prompt = 0 is no value"),
        ("grpo: {num_steps: [4]}", "grpo.num_steps = [4] is no value"),
        ("grpo: {reward_fn: [pickscore]}", "grpo.reward_fn = "),
        ("grpo: {last_step_loss: {ac_consistency_epsilon_timestep: x}}", 'timestep = "x" is no value'),
        ("grpo: {reward_fn: {pickscore: 1}, seed: 2026-13-45}", "not YAML that can be read: month must be"),
        ("grpo: &a {b: *a}", "not YAML that can be read: more than 100,000 values"),
        ("grpo: !!bool x", "not YAML that can be read"),
    ],
)
def test_a_value_that_no_such_configuration_has_is_one_line(tmp_path, line, said):
    (tmp_path / "x.yaml").write_text(line)
    with pytest.raises(UserError) as caught:
        convert(f"{tmp_path}/x.yaml", 8)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_configuration_says_stays_within_a_comment(tmp_path):
    said = "a\\nsource = 1 \\ud800"
    lines = (
        "grpo: {num_steps: 4, reward_fn: {pickscore: 1}, x: {1: 2}}",
        f'model: {{pretrained_path: some/model, other: {{load_path: "{said}"}}}}',
    )
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    written = convert(f"{tmp_path}/x.yaml", 8).toml()
    assert written.encode() and "\nsource" not in written and "# no counterpart: grpo.x.1 = 2" in written and "source = 1" in written
