"""Configurations of other code, Python and YAML: a recipe, or one line; nothing in them runs."""

from pathlib import Path

from hypothesis import strategies as st

from flowtilt.convert import convert
from fuzzing._mutations import damaged

BASE = """import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 7
    config.pretrained = pretrained = ml_collections.ConfigDict()
    pretrained.model = "some/model"
    config.sample = sample = ml_collections.ConfigDict()
    sample.num_steps = 40
    config.train = train = ml_collections.ConfigDict()
    train.clip_range = 1e-4
    config.reward_fn = ml_collections.ConfigDict()
    return config
"""
PYTHON = """import os, imp
base = imp.load_source("base", os.path.join(os.path.dirname(__file__), "base.py"))
GROUPS = 6

def one(n=2, *, m=(1, 2)):
    gpu_number = 2
    config = base.get_config()
    config.dataset = os.path.join(os.getcwd(), f"dataset/{'ocr'}")
    config.sample.num_image_per_prompt = 8
    config.sample.num_batches_per_epoch = int(GROUPS / (gpu_number * 3 / 8))
    config.sample.sde_window_range = (0, config.sample.num_steps // 2)
    while n < 5:
        n += 1
    for k in [1, 2, 3]:
        if k > 2 and not m:
            break
    config.reward_fn = {"ocr": 1.0, "mine": 0.5}
    return config
"""
YAML = """model: {pretrained_path: some/model, image_resolution: 512, generator_lora: {rank: 16, lora_alpha: 32, load_path: a.pt}}
grpo:
  num_steps: 4
  num_image_per_prompt: 12
  sample_batch_size: 6
  num_batches_per_epoch: 4
  reward_fn: {pickscore: 1.0, geneval: 2.0}
  last_step_loss: {enabled: true, weight: 0.002, ac_consistency_epsilon_timestep: 50, bp_enabled: true}
dmd: {denoising_step_list: [1000, 750, 500, 250], fake_update_ratio: 10}
prompt_path: dataset/geneval
"""
STATEMENTS = (
    "config.seed = {}",
    "config.sample.num_steps = {}",
    "config.sample.num_image_per_prompt = {}",
    "config.train.batch_size = {}",
    "config.train.timestep_fraction = {}",
    "config.mixed_precision = {}",
    "config.reward_fn = {}",
    "config.other = {}",
    "config[{}] = 1",
    "config = {}",
    "s = {0}\n    for k in [1] * 1: s = s + s",
    "s = {0}\n    while True: s = [s, s]",
    "for k in {}: pass",
    "config.sample = config",
    "break",
    "return {}",
    "assert {}",
    "gpu_number = {}",
)
VALUES = (
    "0", "-1", "1e300", "0x" + "f" * 5000, '"a"', "[]", "{}", "{1: 2}", "{[]: 1}", "(1, 2)", "None", "float('nan')", "int('9' * 9)",
    "config", "base", "base.get_config", "one(1)", "f'{config}'", "min([])", "len(5)", "1 + 'a'", "[1] + [2]", "not config", "missing",
    "1" + "+1" * 3000, "(" * 150 + "1" + ")" * 150, "config.sample", "os.path.join(1)", "2 ** 31", "1 / 0",
    "ml_collections.ConfigDict({1: 2})",
    "lambda: 1", "1 if config else 2", "'\\ud800'", "dict([[1, 2]])", "round(1.5, 10**9)", "'x' in 5",
)  # fmt: skip
ENTRIES = (
    "2026-13-45", "2026-01-01", "[1, [2]]", "{a: 1}", "&a {b: *a}", "&a [*a, *a]", "!!timestamp x", "!!bool x", '!!int ""',
    "!!python/name:os.system",
    "!!binary x", "!!set {1}", "~", "-5", "0", ".nan", ".inf", "1e400", "0b", "0o9", "1_000", "x", '"\\ud800"', "9" * 5000, "[" * 300,
    "[&l1 [x, x], &l2 [*l1, *l1], &l3 [*l2, *l2]]", "? [1]\n",
)  # fmt: skip
KEYS = (
    "grpo.num_steps", "grpo.sample_batch_size", "grpo.num_image_per_prompt", "grpo.reward_fn", "grpo.learning_rate", "grpo.beta", "model",
    "model.generator_lora.lora_alpha", "model.dtype", "dmd.fake_update_ratio", "dmd.denoising_step_list", "train.total_steps",
    "train.batch_size", "eval.reward_fn", "eval.eval_interval", "grpo.last_step_loss.ac_consistency_epsilon_timestep", "grpo", "1",
    "prompt_path",
)  # fmt: skip


def inputs() -> st.SearchStrategy[tuple[str, bytes, int | None]]:
    """The file's name, its bytes, and for how many GPUs."""
    body = st.lists(st.builds(str.format, st.sampled_from(STATEMENTS), st.sampled_from(VALUES)), min_size=1, max_size=3)
    code = body.map(lambda lines: PYTHON.replace("    return config", "".join(f"    {line}\n" for line in lines) + "    return config"))
    entry = st.builds(_entry, st.sampled_from(KEYS), st.sampled_from(ENTRIES))
    added = st.lists(entry, min_size=1, max_size=3).map("".join)
    first, second = st.just(YAML), st.just(YAML.replace("grpo:", "train:").replace("dmd:", "ac_dmd: {}\ndmd:"))
    text = st.builds("{}{}".format, first | second | st.sampled_from(["grpo: {}\n", "dmd: {}\n"]), added)
    encoded = lambda found: found.map(lambda one: one.encode(errors="surrogatepass"))  # noqa: E731
    return st.tuples(
        st.one_of(
            st.tuples(st.just("one.py"), encoded(code) | damaged([PYTHON.encode()])),
            st.tuples(st.just("one.yaml"), encoded(text) | damaged([YAML.encode()])),
        ),
        st.sampled_from([None, 8]),
    ).map(lambda found: (*found[0], found[1]))


def _entry(key: str, value: str) -> str:
    """A block with one key; a key that is there already is replaced, as YAML's last one holds."""
    *tables, last = key.split(".")
    text = f"{last}: {value}"
    for table in reversed(tables):
        text = f"{table}: {{{text}}}"
    return text + "\n"


def read(payload: tuple[str, bytes, int | None], folder: Path) -> None:
    """Converts the file and writes the recipe."""
    name, data, gpus = payload
    (folder / "base.py").write_text(BASE)
    (folder / name).write_bytes(data)
    convert(f"{folder / name}:one" if name.endswith(".py") else str(folder / name), gpus).toml().encode()
