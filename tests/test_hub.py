"""What comes from the hub: of a pipeline what diffusers reads of it, of a LoRA its weights, and what to do where it does not come."""

import shutil

import pytest
import tiny_pipelines
import torch
from hub_stand_in import COMMIT, serving
from huggingface_hub import constants
from test_lora import random_lora

from flowtilt.build import model_settings
from flowtilt.cli import catalogue, main
from flowtilt.config import ModelSettings
from flowtilt.errors import UserError
from flowtilt.io import hub as hubs
from flowtilt.lora.fit import shapes_of
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers, to_generator_ema
from flowtilt.models.opening import fingerprint, load_pipeline, open_model

CPU = torch.device("cpu")
NAME = "owner/tiny-3.5"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pipeline as its repository has it: with fp16 duplicates, another format, and the checkpoint in a single file."""
    folder = tiny_pipelines.sd35(tmp_path_factory.mktemp("hub"))
    for component, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        shutil.copy(folder / component / f"{name}.safetensors", folder / component / f"{name}.fp16.safetensors")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "text_encoder_3" / "model.safetensors.index.fp16.json").write_text("{}")
    (folder / "text_encoder_3" / "model.fp16-00001-of-00002.safetensors").write_bytes(b"never read")
    (folder / "sd3.5_medium.safetensors").write_bytes(b"never read")
    (folder / "README.md").write_text("a model")
    return folder


@pytest.fixture
def hub(tmp_path, published):
    with serving(tmp_path) as found:
        found.repositories[NAME] = published
        yield found


def loaded(path=NAME):
    return load_pipeline(path, revision=None, dtype="float32", device=CPU)


def test_of_a_pipeline_only_what_diffusers_reads_is_fetched_once_and_later_without_a_network(hub, published, capsys, monkeypatch):
    pipeline = loaded()
    assert f"{NAME}: downloading " in capsys.readouterr().err
    unread = {"fp16", ".bin", "sd3.5_medium", "README"}
    assert hub.sent and not [name for name in hub.sent if any(part in name for part in unread)]
    local = loaded(str(published))
    for name in ("transformer", "text_encoder_3", "vae"):
        theirs, ours = getattr(local, name).state_dict(), getattr(pipeline, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    first = len(hub.sent)
    loaded()
    assert len(hub.sent) == first and not capsys.readouterr().err
    assert fingerprint(NAME, None) == {"commit": COMMIT}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(loaded().vae.state_dict()["decoder.conv_in.weight"], pipeline.vae.state_dict()["decoder.conv_in.weight"])


def test_a_part_of_a_pipeline_is_named_where_there_is_no_network(hub, monkeypatch):
    found, files = hubs.pipeline(NAME)
    hubs.fetch(found, [file for file in files if not file.startswith("vae/diff")])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"vae/\*\.safetensors is missing; fetch it .* with `flowtilt download owner/tiny-3\.5`"):
        loaded()


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_a_gated_model_says_where_to_accept_and_whether_to_log_in(hub, tmp_path, token):
    hub.gated.add(NAME)
    hub.refused.add(NAME)
    if token:
        (tmp_path / "token").write_text(token)
    with pytest.raises(UserError, match=r"accept its licence at https://huggingface.co/owner/tiny-3\.5") as caught:
        loaded()
    assert ("hf auth login" in str(caught.value)) == (token is None) and hubs.allowed(NAME)
    with pytest.raises(UserError, match="is gated: accept its licence"):
        catalogue.get([NAME])


def test_a_repository_without_a_pipeline_says_what_it_may_be(hub, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    hub.repositories["owner/some-lora"] = tmp_path / "lora"
    with pytest.raises(UserError, match=r"give it as --lora owner/some-lora and its base as --model; .*owner/some-lora-diffusers"):
        loaded("owner/some-lora")
    with pytest.raises(UserError, match=r"model owner/some-lora is no pipeline of diffusers .* give it as --lora owner/some-lora"):
        catalogue.get(["owner/some-lora"])
    with pytest.raises(UserError, match="model owner/nothing is not on the hub either"):
        loaded("owner/nothing")


def test_the_vae_keeps_the_bits_of_its_file_whatever_the_network_computes_in(published):
    half, single = (load_pipeline(str(published), revision=None, dtype=dtype, device=CPU) for dtype in ("bfloat16", "float32"))
    assert half.transformer.dtype == torch.bfloat16 and half.text_encoder_3.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert all(torch.equal(x, single.vae.state_dict()[name]) for name, x in half.vae.state_dict().items())
    assert any((x.bfloat16().float() != x).any() for x in half.vae.state_dict().values())


def test_a_model_without_a_recipe_is_opened_at_512_pixels_at_most(published):
    settings = ModelSettings(path=str(published))
    assert open_model(settings, CPU, at_most=8).resolution == 8
    assert open_model(settings, CPU, at_most=512).resolution == open_model(settings, CPU).resolution == 16
    assert open_model(settings.model_copy(update={"resolution": 12}), CPU, at_most=8).resolution == 12


def test_keys_of_the_model_may_be_given_in_place_of_the_recipes():
    found = model_settings("owner/name", None, resolution=256, dtype="float16", t5_length=256, levels="stock")
    assert (found.path, found.resolution, found.dtype, found.t5_length, found.levels) == ("owner/name", 256, "float16", 256, "stock")
    with pytest.raises(UserError, match=r"model\.t5_length"):
        model_settings(None, None, t5_length=-1)


# LoRAs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loras(hub, published, tmp_path):
    """RTDMD's repository with a LoRA per stage, and one with a file of its own name."""
    lora = random_lora(shapes_of(loaded(str(published)).transformer), rank=4, alpha=8.0)
    for stage in ("cold_start", "rtdmd"):
        to_generator_ema(lora, tmp_path / "two" / stage)
        (tmp_path / "two" / stage / "adapter_config.json").unlink()
    to_diffusers(lora, tmp_path / "one")
    (tmp_path / "one" / "pytorch_lora_weights.safetensors").rename(tmp_path / "one" / "style.safetensors")
    (tmp_path / "one" / "picture.png").write_bytes(b"never read")
    hub.repositories |= {"Harahan/SD35M-RTDMD": tmp_path / "two", "owner/style": tmp_path / "one"}
    return lora


def test_a_lora_is_given_as_a_hub_id_a_folder_of_it_or_with_its_alpha(hub, loras, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "Harahan/SD35M-RTDMD/rtdmd@8": "two/rtdmd/generator_ema.pt@8",
        "Harahan/SD35M-RTDMD/cold_start/generator_ema.pt@8": "two/rtdmd/generator_ema.pt@8",
        "owner/style": "one/style.safetensors",
        f"owner/style@{COMMIT}": "one/style.safetensors",
        f"Harahan/SD35M-RTDMD/rtdmd@{COMMIT}@8": "two/rtdmd/generator_ema.pt@8",
    }
    for place, file in given.items():
        found, local = read_lora(place), read_lora(tmp_path / file)
        assert found.layers.keys() == local.layers.keys() == loras.layers.keys() and found.alphas == local.alphas
    assert not [name for name in hub.sent if name.endswith(".png")]
    sent = len(hub.sent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_lora("owner/style").layers.keys() == loras.layers.keys() and len(hub.sent) == sent
    assert read_lora(f"owner/style@{COMMIT}").layers.keys() == loras.layers.keys() and len(hub.sent) == sent


def test_a_commit_that_is_not_there_and_a_name_in_its_place_are_one_line_each(hub, loras):
    with pytest.raises(UserError, match=r"lora owner/style@v1: what follows the @ is alpha, .* or a commit's 40 .* not 'v1'"):
        read_lora("owner/style@v1")
    with pytest.raises(UserError, match=r"lora owner/style: .* owner/style has no such revision on the hub"):
        read_lora(f"owner/style@{'f' * 40}")


def test_a_repository_of_several_loras_names_them(hub, loras):
    with pytest.raises(UserError, match="holds several; give one of Harahan/SD35M-RTDMD/cold_start, Harahan/SD35M-RTDMD/rtdmd"):
        read_lora("Harahan/SD35M-RTDMD@64")


def test_a_lora_that_is_neither_here_nor_there_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file or folder, and owner/gone is not on the hub either"):
        read_lora("owner/gone")
    with pytest.raises(UserError, match="this is a whole pipeline; give it as --model"):
        read_lora(NAME)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"lora runs/typo: no such file or folder$"):  # the hub is not asked
        read_lora("runs/typo")


# downloads by name ----------------------------------------------------------------------------------------


def test_download_takes_a_models_id_checks_every_file_and_says_how_much(hub, published, tmp_path, capsys):
    assert main(["download", NAME, "--to", str(tmp_path / "here")]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "here" / NAME)] and "downloading" in said.err
    folder = tmp_path / "here" / NAME
    assert not list(folder.rglob("*fp16*")) and not list(folder.glob("*.safetensors"))
    assert loaded(str(folder)).transformer.config.num_layers == 3
    broken = folder / "vae" / "diffusion_pytorch_model.safetensors"
    broken.write_bytes(b"x" * broken.stat().st_size)
    assert main(["download", NAME, "--to", str(tmp_path / "here")]) in (0, 2)
    assert main(["download", NAME, "--to", str(tmp_path / "here")]) == 0
    assert broken.read_bytes() == (published / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(hubs.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"can't download .*: 0\.0 MB free in .*HF_HOME"):
        loaded()
    assert hub.sent == [f"{NAME}/model_index.json"]


def test_a_recipes_name_stands_for_its_model_its_rewards_and_its_prompts():
    needs = catalogue.needs(["sd35m-geneval"])
    assert list(needs.models) == ["stabilityai/stable-diffusion-3.5-medium"]
    assert needs.weights == ["mask2former", "clip-l", "clip-tokenizer"] and needs.sets == ["geneval-train", "geneval"]
    assert list(catalogue.needs(["sd35m"]).models) == list(needs.models) and not catalogue.needs(["sd35m"]).weights
    both = catalogue.needs(["sd35m", "geneval"])
    assert (list(both.models), both.weights, both.sets) == (list(needs.models), needs.weights, ["geneval"])
    assert not catalogue.needs(["playground"]).models


def test_caches_under_older_names_are_found(tmp_path, monkeypatch):
    from flowtilt.io.published import Hub as Entry
    from flowtilt.io.published import find

    entry = Entry("x", "new/name", COMMIT, ("x.pt",), former=("old/name",), elsewhere=("~/.cache/x/x.pt",))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"x\.pt is missing"):
        find(entry, "x")
    own = tmp_path / ".cache" / "x" / "x.pt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"1")
    assert find(entry, "x") == own
    old = tmp_path / "cache" / "models--old--name" / "snapshots" / COMMIT / "x.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"1")
    assert find(entry, "x") == old


def test_a_mirror_is_asked_first_and_the_publisher_where_it_fails(tmp_path, monkeypatch):
    from flowtilt.io import published

    asked = []

    def fetch(url, path, **_):
        asked.append(url)
        if "mirror" in url:
            raise UserError("gone")
        return path

    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setenv("FLOWTILT_WEIGHTS", str(tmp_path))
    entry = published.Url("x", "https://a/x.pt", "00", mirror="https://mirror/x.pt")
    assert published.download(entry) == tmp_path / "x.pt" and asked == ["https://mirror/x.pt", "https://a/x.pt"]
