"""What may be a reward, and what it may answer: each kind works, anything else is one line."""

import numpy as np
import pytest
import torch

import flowtilt as ft
from flowtilt import RewardOutput, UserError
from flowtilt.rewards import load_reward

IMAGES = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 4, 4).contiguous()
PROMPTS = ["a", "b", "c"]
WANT = torch.tensor([0.0, 0.5, 1.0])


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Brightness:
    def __call__(self, images, prompts):
        return brightness(images, prompts)


class OnDevice(Brightness):
    def __init__(self, *, device, gain=1.0):
        self.device, self.gain = device, gain


class Module(torch.nn.Module):
    def forward(self, images, prompts):
        return brightness(images, prompts)


# what may be a reward -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward",
    [
        brightness,
        lambda images, prompts: images.mean((1, 2, 3)),
        Brightness,
        Brightness(),
        OnDevice,
        Module,
        Module(),
        Brightness().__call__,
    ],
    ids=["function", "lambda", "class", "instance", "class with device", "module class", "module", "method"],
)
def test_each_kind_of_callable_is_a_reward(reward):
    torch.testing.assert_close(ft.score({"mine": reward}, IMAGES, PROMPTS)["mine"], WANT)


@pytest.mark.parametrize("name", ["function", "anonymous", "Class", "Bare", "instance", "partial_one"])
def test_each_kind_may_be_in_a_file(name, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from functools import partial\n"
        "def function(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "anonymous = lambda images, prompts: function(images, prompts)\n"
        "class Bare:\n    def __call__(self, images, prompts):\n        return function(images, prompts)\n"
        "class Class(Bare):\n    def __init__(self, *, device):\n        assert str(device) == 'cpu'\n"
        "instance = Bare()\npartial_one = partial(function)\n"
    )
    torch.testing.assert_close(ft.score(f"{tmp_path}/mine.py:{name}", IMAGES, PROMPTS)[name], WANT)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (3, r"rewards\.mine: 3 \(int\) is not a reward; want a function of images and prompts"),
        (None, r"None \(NoneType\) is not a reward"),
        (torch.zeros(3), "is not a reward"),
        (type("Empty", (), {}), r"Empty has no __call__\(self, images, prompts\)"),
        (lambda images: images, r"takes \(images\), but is called with images and prompts"),
        (lambda: 0, r"takes \(\), but is called with"),
        (lambda images, prompts, extra: 0, r"takes \(images, prompts, extra\)"),
        (type("Needs", (Brightness,), {"__init__": lambda self, path: None}), r"building Needs failed: TypeError: .*'path'"),
        ("nothing", "no reward 'nothing'; built in are aesthetic"),
    ],
)
def test_what_is_no_reward_is_one_line(reward, said):
    with pytest.raises(UserError, match=said) as caught:
        ft.score({"mine": reward}, IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_options_go_to_functions_and_classes_and_unknown_ones_are_refused():
    assert load_reward("mine", OnDevice, options={"gain": 2.0}).gain == 2.0
    with pytest.raises(UserError, match="unknown option 'gian'; did you mean 'gain'"):
        load_reward("mine", OnDevice, options={"gian": 2.0})


# what it may answer -------------------------------------------------------------------------------------


def answers():
    yield from ((f"tensor {dtype}", WANT.to(dtype)) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))
    yield "tensor float8", WANT.to(torch.float8_e4m3fn)
    yield "tensor with a gradient", WANT.clone().requires_grad_()
    yield from ((f"numpy {kind}", WANT.numpy().astype(kind)) for kind in ("float64", "float32", "float16"))
    yield "list", WANT.tolist()
    yield "tuple", tuple(WANT.tolist())
    yield "list of tensors", list(WANT)
    yield "list of numpy numbers", list(WANT.numpy())
    yield "RewardOutput", RewardOutput(WANT)
    yield "dict", {"score": WANT}


@pytest.mark.parametrize("answer", [pytest.param(answer, id=name) for name, answer in answers()])
def test_scores_come_in_any_form_of_real_numbers(answer):
    found = ft.score({"mine": lambda images, prompts: answer}, IMAGES, PROMPTS)["mine"]
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, WANT)


@pytest.mark.parametrize(
    "answer",
    [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2], dtype=torch.uint8), np.array([0, 1, 2]), [0, 1, 2]],
    ids=["int64", "uint8", "numpy", "list"],
)
def test_integers_are_scores(answer):
    assert ft.score({"mine": lambda images, prompts: answer}, IMAGES, PROMPTS)["mine"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("answer", [torch.tensor([True, False, True]), np.array([True, False, True]), [True, False, True]])
def test_yes_and_no_are_1_and_0(answer):
    assert ft.score({"mine": lambda images, prompts: answer}, IMAGES, PROMPTS)["mine"].tolist() == [1, 0, 1]


def test_the_other_keys_of_a_dict_are_details():
    found = ft.score({"mine": lambda images, prompts: {"score": WANT, "red": [1, 2, 3]}}, IMAGES, PROMPTS)
    assert list(found) == ["mine", "mine/red"] and found["mine/red"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.zeros(2), r"returned a tensor of shape \[2\] and float32, want a tensor of shape \[3\], one score per image"),
        (torch.zeros(3, 1), r"returned a tensor of shape \[3, 1\] and float32, want"),
        (torch.tensor(0.5), r"returned a tensor of shape \[\] and float32, want"),
        (0.5, "returned a float, want a tensor of shape"),
        (np.zeros((3, 1)), r"returned an array of shape \[3, 1\] and float64"),
        (np.array(["a", "b", "c"]), r"returned an array of shape \[3\] and <U1"),
        (None, r"returned None \(is a return missing\?\)"),
        ("good", "returned a str"),
        (["1", "2", "3"], r"returned a list of 3 values \(str\)"),
        ([[1], [2], [3]], r"returned a list of 3 values \(list\)"),
        ([1.0, None, 2.0], r"returned a list of 3 values \(float, NoneType\)"),
        (torch.zeros(3, dtype=torch.complex64), r"returned a tensor of shape \[3\] and complex64"),
        ([1j, 1j, 1j], r"returned a list of 3 values \(complex\)"),
        (torch.zeros(3, device="meta"), "on the meta device"),
        (torch.zeros(3).to_sparse(), "returned a sparse_coo tensor"),
        (torch.tensor([0.0, torch.inf, 1.0]), 'infinite for "b"; return NaN where there is no score'),
        ([0.0, 1.0, -float("inf")], 'infinite for "c"'),
        (torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64), r'1e\+300, which is too large for float32, for "b"'),
        ({"scores": WANT}, "returned a dict with 'scores', want a key \"score\""),
        ({"score": WANT, "red": [1]}, r"reward mine/red: returned a list of 1 values"),
        ({"score": WANT, 3: WANT}, "details are a dict"),
        ((WANT, ["", "", ""]), r"returned a tuple of 2 values \(Tensor, list\)"),
    ],
)
def test_any_other_answer_is_one_line_that_says_what_came_and_what_was_wanted(answer, said):
    with pytest.raises(UserError, match=said) as caught:
        ft.score({"mine": lambda images, prompts: answer}, IMAGES, PROMPTS)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("reward mine")


def test_nan_is_a_missing_score():
    found = ft.score({"mine": lambda images, prompts: [0.0, float("nan"), 1.0]}, IMAGES, PROMPTS)["mine"]
    assert found.isnan().tolist() == [False, True, False]
