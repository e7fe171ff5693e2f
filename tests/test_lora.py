"""LoRAs in: every format is read as the same tensors with the same alpha, and what is not a LoRA for this model is one line."""

import pytest
import torch
from conftest import quick
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flowtilt import Trainer, UserError
from flowtilt.build import recipe_of
from flowtilt.lora import Lora, baked, join
from flowtilt.lora.find import split_alpha
from flowtilt.lora.fit import check, shapes_of
from flowtilt.lora.read import read_lora
from flowtilt.lora.write import to_diffusers, to_generator_ema, to_peft
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.playground import pipeline_path
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.roles import ROLES
from flowtilt.policy.start import load_lora
from flowtilt.policy.tuned_model import TunedModel

WRITERS = {"diffusers": to_diffusers, "peft": to_peft, "generator_ema": to_generator_ema}
Q = "transformer_blocks.0.attn.to_q"


def model(dtype="float32"):
    return SD3(load_pipeline("playground", revision=None, dtype=dtype, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(model().network)


def random_lora(shapes, rank=4, alpha=10.0, seed=0, size=0.1, ends=("to_q", "add_v_proj", "to_out.0"), mixed=False):
    """On layers of those endings; `mixed` gives every third another rank and alpha."""
    rng = torch.Generator().manual_seed(seed)
    layers, alphas = {}, {}
    for k, name in enumerate(name for name in shapes if name.endswith(ends)):
        out, inner = shapes[name]
        r = rank + 3 if mixed and k % 3 == 0 else rank
        layers[name] = (torch.randn(r, inner, generator=rng) * size, torch.randn(out, r, generator=rng) * size)
        alphas[name] = alpha / 4 if mixed and k % 3 == 0 else alpha
    return Lora(layers, alphas, "made here")


def same(one, two):
    """The same LoRA bit for bit, wherever its scale stands: files have it in B, a checkpoint in its run's alpha."""
    one, two = baked(one), baked(two)
    assert one.layers.keys() == two.layers.keys()
    for name, pair in one.layers.items():
        assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(pair, two.layers[name], strict=True)), name


def flat(lora, pattern="{}.lora_{}.default.weight"):
    return {pattern.format(name, side): x.clone() for name, pair in lora.layers.items() for side, x in zip("AB", pair, strict=True)}


def inputs():
    rng = torch.Generator().manual_seed(3)
    return torch.randn(2, 8, 8, 8, generator=rng), torch.tensor([0.3, 0.9]), ["a red circle", "two crosses"]


def drawn(drawing, role):
    x, t, texts = inputs()
    with torch.no_grad():
        return drawing.velocity(role, x, t, drawing.model.encode(texts))


# formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_a_round_trip_through_any_two_formats_loses_no_bit_and_no_scale(shapes, tmp_path, first, second):
    lora = random_lora(shapes)
    WRITERS[first](lora, tmp_path / "1")
    read = read_lora(tmp_path / "1")
    WRITERS[second](read, tmp_path / "2")
    same(lora, read)
    same(lora, read_lora(tmp_path / "2"))


@pytest.mark.parametrize("name", ["diffusers", "peft"])
def test_ranks_and_alphas_may_differ_from_layer_to_layer(shapes, tmp_path, name):
    lora = random_lora(shapes, mixed=True)
    assert lora.ranks() == [4, 7] and len(lora.scales()) == 2
    WRITERS[name](lora, tmp_path)
    same(lora, read_lora(tmp_path))


@pytest.mark.parametrize(
    "pattern",
    [
        "{}.lora_{}.weight",
        "{}.lora_{}.generator.weight",
        "module.{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.weight",
        "module._orig_mod.base_model.model.{}.lora_{}.default.weight",
        "_fsdp_wrapped_module.{}._checkpoint_wrapped_module.lora_{}.default.weight",
    ],
)
def test_a_flat_state_dict_is_read_under_any_wrappers_names(shapes, tmp_path, pattern):
    lora = random_lora(shapes)
    torch.save(flat(lora, pattern), tmp_path / "generator_ema.pt")
    same(lora, read_lora(f"{tmp_path}/generator_ema.pt@10"))
    same(lora, read_lora(f"{tmp_path}@10"))


def test_a_flat_state_dict_without_an_alpha_asks_for_it(shapes, tmp_path):
    lora = random_lora(shapes, rank=32, alpha=64.0)
    torch.save(flat(lora), tmp_path / "generator_ema.pt")
    with pytest.raises(UserError, match=r"does not tell alpha; write .*generator_ema\.pt@ALPHA, RTDMD's being 64"):
        read_lora(tmp_path / "generator_ema.pt")
    (tmp_path / "transformer").mkdir()  # as in RTDMD's own checkpoints
    LoraConfig(r=32, lora_alpha=64).save_pretrained(str(tmp_path / "transformer"))
    same(lora, read_lora(tmp_path / "generator_ema.pt"))


def test_what_follows_the_at_sign_overrules_the_file(shapes, tmp_path):
    to_diffusers(random_lora(shapes, alpha=10.0), tmp_path / "lora@7")
    assert set(read_lora(tmp_path / "lora@7").alphas.values()) == {4.0}  # a path that exists is one
    assert set(read_lora(f"{tmp_path}/lora@7@2.5").alphas.values()) == {2.5}
    assert split_alpha("no@where") == (split_alpha("no@where")[0], None)
    for wrong in ("", "x", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="alpha, a positive number"):
            read_lora(f"{tmp_path}/lora@7@{wrong}")


def test_weights_stored_in_half_precision_are_read_exactly(shapes, tmp_path):
    lora = random_lora(shapes)
    half = {name: x.bfloat16() for name, x in flat(lora).items()}
    torch.save(half, tmp_path / "x.pt")
    read = read_lora(f"{tmp_path}/x.pt@10")
    assert all(torch.equal(x, half[name].float()) and x.dtype == torch.float32 for name, x in flat(read).items())


def test_a_folder_that_peft_wrote_scales_as_peft_does(tmp_path):
    """Patterns, which PEFT matches as expressions against the ends of names, and rsLoRA."""
    for k, rs in enumerate((False, True)):
        config = LoraConfig(
            r=4,
            lora_alpha=10,
            use_rslora=rs,
            target_modules=["to_q", "to_k", "to_out.0"],
            rank_pattern={"transformer_blocks.1.attn.to_q": 6, "attn.to_k": 3},
            alpha_pattern={r"transformer_blocks\.[01]\.attn\.to_q": 5, "to_out.0": 1},
            init_lora_weights=False,
        )
        peft = get_peft_model(model().network, config)
        peft.save_pretrained(str(tmp_path / str(k)))
        read = read_lora(tmp_path / str(k))
        assert set(read.ranks()) == {3, 4, 6} and len(read.scales()) > 2
        for name, layer in peft.base_model.model.named_modules():
            if name in read.layers:
                assert read.scale(name) == pytest.approx(layer.scaling["default"], rel=1e-15)
                assert torch.equal(read.layers[name][0], layer.lora_A["default"].weight)
                assert torch.equal(read.layers[name][1], layer.lora_B["default"].weight)


def test_peft_weights_may_be_a_bin_file(shapes, tmp_path):
    lora = random_lora(shapes)
    to_peft(lora, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    same(lora, read_lora(tmp_path))


@pytest.mark.parametrize("pattern", ["transformer.{}.lora_{}.weight", "transformer.{}.lora.{}.weight"])
def test_a_diffusers_file_without_an_alpha_means_what_plain_diffusers_takes_it_for(shapes, tmp_path, pattern):
    lora = random_lora(shapes, alpha=4.0)
    old = {"A": "down", "B": "up"} if ".lora." in pattern else {"A": "A", "B": "B"}
    named = {pattern.format(name, old[side]): x for name, pair in lora.layers.items() for side, x in zip("AB", pair, strict=True)}
    save_file(named, tmp_path / "old.safetensors")
    same(lora, read_lora(tmp_path / "old.safetensors"))
    theirs = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    theirs.load_lora_weights(tmp_path, weight_name="old.safetensors")
    x, t, texts = inputs()
    with torch.no_grad():
        plain = SD3(theirs).velocity(x, t, SD3(theirs).encode(texts))
    torch.testing.assert_close(drawn(TunedModel(model(), [read_lora(tmp_path / "old.safetensors")]), "tuned"), plain, atol=2e-5, rtol=1e-4)


def test_alpha_may_stand_in_a_tensor_beside_its_layer(shapes, tmp_path):
    lora = random_lora(shapes, mixed=True)
    alphas = {f"transformer.{name}.alpha": torch.tensor(alpha) for name, alpha in lora.alphas.items()}
    save_file(flat(lora, "transformer.{}.lora_{}.weight") | alphas, tmp_path / "x.safetensors")
    same(lora, read_lora(tmp_path / "x.safetensors"))


# a run's own -----------------------------------------------------------------------------------------


def test_a_run_its_lora_folder_and_its_checkpoints_are_loras(learnt):
    checkpoint = sorted((learnt / "checkpoints").iterdir())[-1]
    run = read_lora(learnt)
    scale = recipe_of(learnt).lora.alpha / recipe_of(learnt).lora.rank
    assert scale == 2 and run.scales() == [1.0] and read_lora(checkpoint).scales() == [scale]
    for place in (learnt / "lora", learnt / "lora" / "pytorch_lora_weights.safetensors", checkpoint, checkpoint / "ema.safetensors"):
        same(run, read_lora(place))
        assert recipe_of(place) == recipe_of(learnt)
    current = read_lora(checkpoint / "current.safetensors")
    assert current.scales() == [scale] and not torch.equal(current.layers[Q][1], run.layers[Q][1])
    assert recipe_of(pipeline_path()) is None


def test_only_a_checkpoints_own_files_take_the_runs_alpha(shapes, learnt, tmp_path):
    stray = tmp_path / "run" / "from" / "elsewhere"
    stray.mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_bytes((learnt / "recipe.toml").read_bytes())
    torch.save(flat(random_lora(shapes)), stray / "generator_ema.pt")
    with pytest.raises(UserError, match="does not tell alpha"):
        read_lora(stray)


def test_a_stack_draws_the_bits_that_training_drew(tmp_path):
    trainer = Trainer(quick(tmp_path / "run", "rollouts=1", "optimizer.lr=0.05", whole=True))
    trainer.run()
    read = read_lora(tmp_path / "run")
    assert torch.equal(drawn(TunedModel(model(), [read]), "tuned"), drawn(trainer.policy, "ema"))
    assert torch.equal(drawn(TunedModel(model(), [read]), "base"), drawn(trainer.policy, "reference"))


# stacks ----------------------------------------------------------------------------------------------


def test_several_joined_add_what_they_add_one_after_the_other(shapes):
    loras = [
        random_lora(shapes, mixed=True),
        random_lora(shapes, rank=2, alpha=3.0, seed=1, ends=("to_q", "to_k")),
        random_lora(shapes, seed=2, ends=("to_k",)),
    ]
    one = join(loras)
    assert one.layers.keys() == set().union(*(lora.layers for lora in loras)) and one.scales() == [1.0]
    for name, (a, b) in one.layers.items():
        having = [lora for lora in loras if name in lora.layers]
        assert one.rank(name) == sum(lora.rank(name) for lora in having)
        apart = sum(lora.scale(name) * lora.layers[name][1].double() @ lora.layers[name][0].double() for lora in having)
        torch.testing.assert_close(b.double() @ a.double(), apart, atol=1e-7, rtol=0)
    assert join(loras[:1]) is loras[0]
    torch.testing.assert_close(drawn(TunedModel(model(), loras), "tuned"), drawn(TunedModel(model(), [one]), "tuned"), atol=2e-5, rtol=1e-4)


def test_on_a_half_precision_base_a_stack_is_what_the_policy_is_and_two_add_up(shapes):
    lora = random_lora(shapes, ends=tuple(SD3.lora_targets), size=0.05)
    policy = LoraPolicy(model("bfloat16"), rank=4, alpha=10.0, seed=0)
    load_lora(policy, lora)
    stack = TunedModel(model("bfloat16"), [lora])
    assert torch.equal(drawn(stack, "tuned"), drawn(policy, "ema")) and torch.equal(drawn(stack, "base"), drawn(policy, "reference"))
    adapters = [p for name, p in stack.model.network.named_parameters() if ".lora_" in name]
    assert len(adapters) == 2 * len(lora.layers) and all(p.dtype == torch.bfloat16 for p in adapters)
    parts = [
        Lora({name: (a[k::2], b[:, k::2]) for name, (a, b) in lora.layers.items()}, dict.fromkeys(lora.layers, 5.0), str(k)) for k in (0, 1)
    ]
    whole = drawn(stack, "tuned")
    assert (drawn(TunedModel(model("bfloat16"), parts), "tuned") - whole).norm() < (
        drawn(TunedModel(model(), [lora]), "tuned") - whole
    ).norm()


def test_on_a_half_precision_base_each_layer_has_its_own_rank_and_alpha(shapes):
    lora = random_lora(shapes, mixed=True)
    folded = {name: (a, b * lora.scale(name)) for name, (a, b) in lora.layers.items()}
    plain = Lora(folded, {name: float(lora.rank(name)) for name in folded}, "folded")
    one, other = (drawn(TunedModel(model("bfloat16"), [given]), "tuned") for given in (lora, plain))
    # the two round differently, and by less than either is from fp32
    assert plain.scales() == [1.0] and (one - other).norm() < (one - drawn(TunedModel(model(), [lora]), "tuned")).norm()


# for training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [tuple(SD3.lora_targets), ("to_q", "to_k")])
def test_a_policy_starts_as_a_lora_bit_for_bit(shapes, ends):
    """Also as one that changes fewer layers than are trained."""
    lora = random_lora(shapes, ends=ends)
    policy = LoraPolicy(model(), rank=4, alpha=10.0, seed=0)
    load_lora(policy, lora)
    for role in ROLES:
        state = policy.state(role)
        for name, (a, b) in lora.layers.items():
            assert torch.equal(state[f"{name}.lora_A.weight"], a) and torch.equal(state[f"{name}.lora_B.weight"], b)
        assert torch.equal(drawn(policy, role), drawn(TunedModel(model(), [lora]), "tuned"))
        assert all(x.any() for name, x in state.items() if "lora_A" in name)  # what starts at B = 0 can still learn
    assert policy.same_version("old", "current") and policy.same_version("ema", "current")


def test_a_policy_takes_a_lora_of_another_scale_by_rescaling_it(shapes):
    """Bit for bit where the ratio is a power of two, as between a written file, alpha 4, and a run's alpha 16."""
    for alpha, tolerance in ((4.0, 0.0), (10.0, 2e-5)):
        lora = random_lora(shapes, alpha=alpha)
        policy = LoraPolicy(model(), rank=4, alpha=16.0, seed=0)
        load_lora(policy, lora)
        torch.testing.assert_close(drawn(policy, "ema"), drawn(TunedModel(model(), [lora]), "tuned"), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 2}, "rank 2, but lora.rank is 4"),
        ({"mixed": True}, "rank 4, 7, but lora.rank is 4"),
        ({"ends": ("ff.net.2",)}, "layers that are not trained"),
    ],
)
def test_a_policy_refuses_a_lora_that_it_could_not_keep(shapes, given, said):
    policy = LoraPolicy(model(), rank=4, alpha=10.0, seed=0)
    before = policy.state("current")
    with pytest.raises(UserError) as caught:
        load_lora(policy, random_lora(shapes, **given))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in policy.state("current").items())


# refusals --------------------------------------------------------------------------------------------


def test_a_lora_of_another_base_is_told_by_the_layer(shapes):
    wide = {name: (2 * out, 2 * inner) for name, (out, inner) in shapes.items()}
    with pytest.raises(UserError, match=r"to_q is \[256, 256\], but this model's is \[128, 128\]; it belongs to another base"):
        check(random_lora(wide), shapes)
    longer = shapes | {f"transformer_blocks.30.attn.{end}": (128, 128) for end in ("to_q", "to_k")}
    with pytest.raises(UserError, match=r"1 of its \d+ layers are not in this model, transformer_blocks.30.attn.to_q first"):
        check(random_lora(longer), shapes)
    foreign = {"down_blocks.0.attn.to_q": (4, 4)}
    with pytest.raises(UserError, match=r"1 of its 1 layers .* such as transformer_blocks\.0\.attn\.to_q \[128, 128\]"):
        TunedModel(model(), [random_lora(foreign)])


def test_damaged_configurations_are_one_line(shapes, tmp_path):
    to_peft(random_lora(shapes), tmp_path)
    for content in (b"", b"{", b"[]", b"\xff\xfe\x00"):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_config\.json: its configuration is"):
            read_lora(tmp_path)


class Code:
    """Unpickled carelessly, this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_never_run(shapes, tmp_path):
    torch.save({**flat(random_lora(shapes)), "extra": Code(tmp_path / "owned")}, tmp_path / "generator_ema.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        read_lora(f"{tmp_path}/generator_ema.pt@64")
    assert not (tmp_path / "owned").exists()
    torch.save({**flat(random_lora(shapes)), "step": 7}, tmp_path / "generator_ema.pt")
    with pytest.raises(UserError, match="holds step, a int, instead of named tensors alone"):
        read_lora(f"{tmp_path}/generator_ema.pt@64")
