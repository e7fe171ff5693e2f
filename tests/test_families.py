"""Every model family passes its conformance checks on a small random pipeline of the true classes."""

import pytest
import tiny_pipelines
import torch

from flowtilt.config import ModelSettings
from flowtilt.conformance import Conformance

CPU = torch.device("cpu")
SIZES = (16, 24)
FAMILIES = {
    "sd35": {"t5_length": 40},
    "flux": {"t5_length": 40},
    "qwen_image": {"options": {"text_length": 320}},
    "aura_flow": {"options": {"text_length": 40}},
    "z_image": {"options": {"text_length": 128}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = getattr(tiny_pipelines, name)(tmp_path_factory.mktemp(name))
        return str(made[name])

    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_conforms(folders, name):
    settings = ModelSettings(path=folders(name), **FAMILIES[name])
    wrong = [str(check) for check in Conformance(settings, CPU, SIZES).checks() if not check.right]
    assert not wrong, "\n".join(wrong)
