"""Files that are no whole LoRA, or none, are refused in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_lora import Q

from flowtilt import UserError
from flowtilt.lora.read import read_lora
from flowtilt.playground import pipeline_path


def write(place, tensors, **config):
    place.mkdir()
    if config:
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    save_file({name: x.contiguous() for name, x in tensors.items()}, place / "adapter_model.safetensors")
    return place


PAIR = {f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 8), f"base_model.model.{Q}.lora_B.weight": torch.ones(6, 4)}


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {}, "holds nothing; LoRA weights have names such as"),
        ({"x.weight": torch.ones(2)}, {}, "holds 1 tensors, x.weight first"),
        (dict(list(PAIR.items())[:1]), {"r": 4}, f"{Q} has lora_A and no lora_B"),
        (dict(list(PAIR.items())[1:]), {"r": 4}, f"{Q} has lora_B and no lora_A"),
        (PAIR, {}, "does not tell alpha"),
        (PAIR, {"r": 8}, "says rank 8 for"),
        (PAIR, {"lora_alpha": "much"}, "must be a number"),
        (PAIR, {"peft_type": "LOHA"}, "a LOHA adapter"),
        (PAIR, {"use_dora": True}, "use_dora = True makes it more than a LoRA"),
        (PAIR, {"modules_to_save": ["proj_out"]}, "modules_to_save = ['proj_out']"),
        (PAIR, {"bias": "all"}, "bias = 'all'"),
        (PAIR, {"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({**PAIR, "proj_out.weight": torch.ones(2, 2)}, {"r": 4}, "also holds proj_out.weight"),
        ({**PAIR, f"{Q}.lora_magnitude_vector": torch.ones(2)}, {"r": 4}, "DoRA's magnitudes"),
        ({**PAIR, f"{Q}.lora_A.other.weight": torch.ones(4, 8)}, {"r": 4}, "several adapters"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 8), f"{Q}.lora_B.weight": torch.ones(6, 3)}, {"r": 4}, "no [r, in] and [out, r]"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 8, 1, 1), f"{Q}.lora_B.weight": torch.ones(6, 4, 1, 1)}, {"r": 4}, "no [r, in]"),
        ({f"text_encoder.{name}": x for name, x in PAIR.items()}, {"r": 4}, "only text encoders"),
    ],
)
def test_what_is_no_whole_lora_is_one_line(tmp_path, tensors, config, said):
    with pytest.raises(UserError) as caught:
        read_lora(write(tmp_path / "x", tensors, **config))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_places_without_a_lora_say_what_to_give(tmp_path):
    with pytest.raises(UserError, match="this is a whole pipeline; give it as --model"):
        read_lora(pipeline_path())
    with pytest.raises(UserError, match="no LoRA there; give a run, a checkpoint"):
        read_lora(tmp_path)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        read_lora(tmp_path / "none")
    with pytest.raises(UserError, match=r"`hf download some\.body/A-LoRA`"):
        read_lora("some.body/A-LoRA")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
@pytest.mark.parametrize("content", [b"", b"junk" * 99])
def test_damaged_files_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lora(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
