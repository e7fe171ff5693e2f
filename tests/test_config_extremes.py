"""Values, files and names of a recipe beyond all reason are one short line."""

import pytest
from test_config import file, refusal

# extremes --------------------------------------------------------------------------------------------

LARGE = [
    ("lora.alpha=1e300", "lora.alpha: must be less than or equal to 1000000, not 1e+300"),
    ("optimizer.lr=1e300", "optimizer.lr: must be less than or equal to 1000000"),
    ("optimizer.clip=1e300", "optimizer.clip: must be less than or equal to 1000000000000"),
    ("rewards.x=1e300", "rewards.x: must be less than or equal to 1000000 or must be a valid string"),
    ("rewards.x=", "rewards.x: is empty, give it a value"),
    ("lora.rank=1000000000", "lora.rank: must be less than or equal to 16384"),
    (f"micro_batch={'9' * 25}", "micro_batch: must be less than or equal to 10000000 or must be 'auto'"),
    (f"evaluate.images={'9' * 30}", "evaluate.images: must be less than or equal to 10000000"),
    ("tags.two=1000000000000", "tags.two: must be less than or equal to 10000"),
    (f"seed={'9' * 5000}", "seed: must be a valid integer, not '999"),
    (f"seed=0x{'f' * 5000}", "seed: a number of more than 300 digits"),
    (f"model.options.x=0x{'f' * 5000}", "model.options.x: a number of more than 300 digits"),
    ("rollout.images_per_prompt=9999999", "images in a rollout are too many; at most 10000000"),
    ("name=..", "name: String should match pattern"),
    (f"name={'n' * 300}", "name: String should have at most 100 characters"),
    (f"rollouts={'[' * 3000}{']' * 3000}", ""),
    (f"{'.'.join('a' * 3000)}=1", ""),
]


@pytest.mark.parametrize(("override", "message"), LARGE, ids=[override[:24] for override, _ in LARGE])
def test_a_value_beyond_all_reason_is_one_short_line(override, message):
    said = refusal("playground", override)
    assert message in said and "\n" not in said and len(said) < 8_000


@pytest.mark.parametrize(
    "text",
    [
        f"seed = {'9' * 5000}",
        f"x = {'[' * 3000}{']' * 3000}",
        f"x = {'{a=' * 3000}",
        f"{'.'.join('a' * 3000)} = 1",
        'base = "a\\u0000b"',
        f'base = "{"n" * 300}"',
        f'base = "{"n/" * 3000}"',
    ],
    ids=["digits", "brackets", "tables", "dots", "zero byte", "long name", "long path"],
)
def test_a_file_beyond_all_reason_is_one_line(tmp_path, text):
    said = refusal(str(file(tmp_path, text)))
    assert "\n" not in said and said.startswith("recipe ")


@pytest.mark.parametrize("source", ["n" * 300, "n/" * 3000, "a\0b", ""])
def test_a_source_that_can_be_no_file_is_one_line(source):
    assert "no such recipe or file" in refusal(source)
