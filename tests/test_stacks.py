"""LoRAs on top of one another: what lay beneath in training is named in every file, put there, and nothing else is taken for it."""

import hashlib
import json
import shutil

import pytest
import torch
from conftest import quick
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from test_export import LOADERS, by_diffusers, by_us, load_as_diffusers, plain
from test_lora import WRITERS, Q, flat, model, random_lora, same

from flowtilt import UserError
from flowtilt.build import build_policy
from flowtilt.config import load_recipe, to_toml
from flowtilt.evaluate.assess import assess
from flowtilt.evaluate.side_by_side import sample
from flowtilt.lora import PARENTS, Lora, baked, fingerprint, is_named, join
from flowtilt.lora.find import CONFIG
from flowtilt.lora.fit import check, shapes_of
from flowtilt.lora.read import read_lora
from flowtilt.lora.stacked import keep, kept, leading, read_onto, read_stack
from flowtilt.lora.write import to_diffusers, to_generator_ema, to_peft
from flowtilt.playground import pipeline_path
from flowtilt.policy.lora import LoraPolicy
from flowtilt.policy.start import load_lora
from flowtilt.runs import checkpoint
from flowtilt.runs.export import export, write_result

COLD = {"mixed": True, "seed": 1}
RL = {"rank": 2, "alpha": 3.0, "seed": 2, "ends": ("to_q", "to_v")}


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(model().network)


def on(lora, *beneath):
    """The same LoRA, as trained on top of those."""
    return Lora(lora.layers, lora.alphas, lora.source, tuple(map(fingerprint, beneath)))


def write_run(folder, lora, *places):
    """A run by hand: its recipe, which names what is beneath, and its LoRA."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(to_toml(quick(folder, f"lora.on={json.dumps([str(place) for place in places])}", whole=True)))
    to_diffusers(lora, folder / "lora")
    return folder


@pytest.fixture
def cold(shapes, tmp_path):
    return write_run(tmp_path / "cold", random_lora(shapes, **COLD))


@pytest.fixture
def tuned(shapes, cold, tmp_path):
    """A run on top of `cold`."""
    return write_run(tmp_path / "rl", on(random_lora(shapes, **RL), read_lora(cold)), cold)


def hashes(loras):
    return [fingerprint(lora) for lora in loras]


def refused(*places):
    with pytest.raises(UserError) as caught:
        read_stack(places)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# which LoRA it is ------------------------------------------------------------------------------------


def test_a_lora_is_the_same_one_in_every_format_and_as_a_checkpoint(learnt, tmp_path):
    newest = sorted((learnt / "checkpoints").iterdir())[-1]
    for to in ("diffusers", "peft", "generator_ema"):
        export([learnt], tmp_path / to, to)
    places = [learnt, learnt / "lora", newest, newest / "ema.safetensors", *(tmp_path / to for to in WRITERS)]
    assert len({fingerprint(read_lora(place)) for place in places}) == 1
    half = {name: x.bfloat16() for name, x in flat(read_lora(learnt)).items()}
    torch.save(half, tmp_path / "half.pt")
    others = [f"{learnt}@16", newest / "current.safetensors", f"{tmp_path / 'half.pt'}@64"]
    assert len({fingerprint(read_lora(place)) for place in (learnt, *others)}) == 4


def test_fingerprints_of_the_first_version_are_still_known(shapes):
    """It had B as it is and alpha in them; runs on disk name their parents by those."""
    lora = random_lora(shapes)
    old = hashlib.sha256()
    for layer, (a, b) in sorted(lora.layers.items()):
        old.update(f"{layer} {list(a.shape)} {list(b.shape)} {float(lora.alphas[layer]).hex()}\n".encode())
        old.update(a.numpy().tobytes() + b.numpy().tobytes())
    assert is_named(lora, old.hexdigest()) and is_named(lora, fingerprint(lora)) and old.hexdigest() != fingerprint(lora)
    assert not is_named(random_lora(shapes, alpha=8.0), old.hexdigest()) and not is_named(lora, "0" * 64)


def test_layers_have_no_order_and_every_number_counts(shapes):
    lora = random_lora(shapes)
    backwards = Lora(dict(reversed(lora.layers.items())), lora.alphas, "elsewhere", ("a" * 64,))
    assert fingerprint(backwards) == fingerprint(lora)
    name, (a, b) = next(iter(lora.layers.items()))
    nudged = a.clone()
    nudged[-1, -1] = torch.nextafter(a[-1, -1], torch.tensor(9.0))
    split = {name: (a.view(-1, 2 * a.shape[1]), b.view(2 * len(b), -1))}  # the same bytes in other shapes
    for layers in ({name: (nudged, b)}, split, {f"{name}.x": (a, b)}):
        rest = {key: pair for key, pair in lora.layers.items() if key != name}
        alphas = dict.fromkeys(rest | layers, 10.0)
        assert fingerprint(Lora(rest | layers, alphas, "")) != fingerprint(lora)


# what files say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", WRITERS)
@pytest.mark.parametrize("second", WRITERS)
def test_what_lies_beneath_comes_through_any_two_formats(shapes, tmp_path, first, second):
    lora = on(random_lora(shapes), random_lora(shapes, **COLD), random_lora(shapes, seed=7))
    WRITERS[first](lora, tmp_path / "1")
    WRITERS[second](read_lora(tmp_path / "1"), tmp_path / "2")
    read = read_lora(tmp_path / "2")
    assert read.parents == lora.parents and len(lora.parents) == 2
    same(lora, read)


def test_a_checkpoint_says_what_its_run_was_trained_on(shapes, cold, tuned):
    lora = read_lora(tuned)
    state = checkpoint.Checkpoint(1, {"parents": list(lora.parents)}, {"ema": flat(lora, "{}.lora_{}.weight")})
    folder = checkpoint.save(tuned, state, keep=1)
    assert hashes(read_stack([f"{folder}@2"])) == hashes(read_stack([tuned])) == hashes([read_lora(cold), lora])


def test_plain_diffusers_and_peft_pass_over_it_and_keep_the_scale(shapes, tmp_path):
    bare = random_lora(shapes, **COLD)
    for name, writer in (("diffusers", to_diffusers), ("peft", to_peft)):
        drawn = []
        for place, lora in (("bare", bare), ("on", on(bare, random_lora(shapes)))):
            writer(lora, tmp_path / name / place)
            drawn.append(by_diffusers(LOADERS[name](pipeline_path(), tmp_path / name / place)))
        assert torch.equal(*drawn) and (drawn[0] - by_diffusers(plain(pipeline_path()))).abs().max() > 0.02
        torch.testing.assert_close(by_us(pipeline_path(), [bare]), drawn[0], atol=1e-4, rtol=0)
    with safe_open(tmp_path / "diffusers" / "on" / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert set(opened.metadata()) == {"format", "lora_adapter_metadata", PARENTS}
    pipeline = load_as_diffusers(pipeline_path(), tmp_path / "diffusers" / "on")
    layer = pipeline.transformer.get_submodule("transformer_blocks.1.attn.to_q")
    assert layer.scaling["default_0"] == 1 != bare.scale("transformer_blocks.1.attn.to_q")


def test_the_configuration_beside_generator_ema_is_still_pefts(shapes, tmp_path):
    to_generator_ema(on(random_lora(shapes), random_lora(shapes, **COLD)), tmp_path)
    with pytest.warns(UserWarning, match=PARENTS):
        config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.parametrize("said", ["nonsense", '["not a hash"]', '{"a": 1}', 7])
def test_damage_there_is_one_line(shapes, tmp_path, said):
    to_generator_ema(random_lora(shapes), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | {PARENTS: said}))
    assert "its list of base LoRAs is damaged" in refused(tmp_path)


# reading a stack -------------------------------------------------------------------------------------


def test_what_lies_beneath_is_added_from_the_run(cold, tuned):
    whole = hashes([read_lora(cold), read_lora(tuned)])
    for places in ([tuned], [cold, tuned], [tuned / "lora"], [cold / "lora", tuned / "lora" / "pytorch_lora_weights.safetensors"]):
        assert hashes(read_stack(places)) == whole
    assert leading(read_stack([cold, tuned])) == leading(read_stack([tuned])) == tuned / "lora" / "pytorch_lora_weights.safetensors"


def test_from_the_runs_own_copies_where_the_parent_has_changed_or_gone(shapes, cold, tuned):
    whole = read_stack([tuned])
    keep(whole[:1], tuned)
    same(whole[0], read_lora(kept(tuned)[0]))
    to_diffusers(random_lora(shapes, seed=8), cold / "lora")  # trained further
    assert hashes(read_stack([tuned])) == hashes(whole)
    shutil.rmtree(cold)
    assert hashes(read_stack([tuned])) == hashes(whole)


def test_copies_are_read_in_order_beyond_nine(shapes, tmp_path):
    many = [random_lora({"a.to_q": (4, 4)}, rank=1, seed=k) for k in range(11)]
    keep(many, tmp_path)
    assert hashes(read_stack(kept(tmp_path))) == hashes(many)


def test_a_stack_of_three_is_found_from_its_top(shapes, cold, tuned, tmp_path):
    two = read_stack([tuned])
    for k, places in enumerate(([tuned], [cold, tuned])):
        top = write_run(tmp_path / str(k), on(random_lora(shapes, seed=5), *two), *places)
        assert hashes(read_stack([top])) == hashes(read_stack([tuned, top])) == hashes([*two, read_lora(top)])


def test_a_missing_parent_of_a_loose_file_is_refused(cold, tuned, tmp_path):
    loose = tmp_path / "elsewhere" / "rl.safetensors"
    loose.parent.mkdir()
    shutil.copy(tuned / "lora" / "pytorch_lora_weights.safetensors", loose)
    short = fingerprint(read_lora(cold))[:12]
    said = refused(loose)
    assert f"{loose}: was trained on top of {short}, which is not given; give --lora PARENT --lora {loose}" in said
    assert hashes(read_stack([cold, loose])) == hashes(read_stack([tuned]))


def test_another_parent_is_refused_by_its_hash(shapes, cold, tuned, tmp_path):
    other = write_run(tmp_path / "other", random_lora(shapes, seed=9))
    wanted, given = (fingerprint(read_lora(place))[:12] for place in (cold, other))
    said = refused(other, tuned)
    assert f"on top of {wanted} ({cold} in its recipe), but before it stands {other}/lora/" in said and f"({given})" in said
    assert "before it stands" in refused(f"{cold}@9", tuned)  # another alpha makes it another one
    to_diffusers(read_lora(other), cold / "lora")
    assert f"({cold} in its recipe), which is not there any more" in refused(tuned)


def test_order_matters_for_those_that_name_others_and_for_no_one_else(shapes, cold, tuned, tmp_path):
    free = write_run(tmp_path / "free", random_lora(shapes, seed=4))
    assert "before it stands" in refused(free, tuned)  # never added in the midst: what is given there may be meant as its parent
    whole, other = hashes(read_stack([tuned])), fingerprint(read_lora(free))
    assert hashes(read_stack([tuned, free])) == [*whole, other]
    assert hashes(read_stack([free, cold, tuned])) == [other, *whole]
    assert "before it stands" in refused(cold, free, tuned)
    assert "before it stands" in refused(tuned, tuned)
    assert hashes(read_stack([tuned, cold])) == [*whole, whole[0]]
    reversed_pair = write_run(tmp_path / "both", on(random_lora(shapes, seed=5), read_lora(cold), read_lora(free)), cold, free)
    assert "before it stands" in refused(free, cold, reversed_pair)
    assert len(read_stack([cold, free, reversed_pair])) == 3


def test_a_recipe_that_names_its_own_run_is_refused(shapes, tmp_path):
    odd = write_run(tmp_path / "odd", on(random_lora(shapes), random_lora(shapes, **COLD)), tmp_path / "odd")
    assert "which is not there any more" in refused(odd)


# for training ----------------------------------------------------------------------------------------


def test_the_recipe_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    recipe = quick(tmp_path / "run", 'lora.on=["one", "one@64", "some/model"]', "lora.init=one@8")
    assert recipe.lora.on == (f"{tmp_path}/one", f"{tmp_path}/one@64", "some/model") and recipe.lora.init == f"{tmp_path}/one@8"
    (tmp_path / "again.toml").write_text(to_toml(recipe))
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "again.toml") == recipe
    with pytest.raises(UserError, match=r"lora\.on"):
        quick(tmp_path / "run", 'lora.on=[""]')


def test_what_is_put_beneath_a_policy_is_checked_against_its_network(shapes, cold, tuned):
    loras = read_stack([tuned])
    assert hashes(loras) == hashes(read_stack([cold, tuned]))
    assert read_stack([]) == []
    for lora in loras:
        check(lora, shapes)
        with pytest.raises(UserError, match="belongs to another base"):
            check(lora, {"another.to_q": (4, 4)})


def test_training_goes_on_only_upon_what_a_lora_was_trained_on(cold, tuned, tmp_path):
    beneath = read_stack([cold])
    same(read_lora(tuned), read_onto(tuned, beneath))
    same(read_lora(cold), read_onto(cold, beneath))
    with pytest.raises(UserError, match=r"lora\.init .* on top of \w{12} \(.*cold in its recipe\).*; name its base LoRAs in lora\.on"):
        read_onto(tuned, [])


def test_a_policy_of_a_recipe_does_not_start_from_the_top_of_a_stack_alone(tuned, tmp_path):
    from flowtilt.distributed import world as distributed

    with pytest.raises(UserError, match=r"name its base LoRAs in lora\.on"):
        build_policy(quick(tmp_path / "next", f"lora.init={tuned}", "lora.rank=2", "lora.alpha=3", whole=True), distributed.start())


# out and drawn ---------------------------------------------------------------------------------------


def differ(one, other):
    return (one - other).abs().max() > 0.01


def test_joined_is_one_after_the_other_and_stands_on_the_base(tuned):
    stack = read_stack([tuned])
    one = join(stack)
    assert one.parents == () and join([*stack[1:], stack[0]]).parents == stack[1].parents != ()
    ours = by_us(pipeline_path(), stack)
    torch.testing.assert_close(by_us(pipeline_path(), [one]), ours, atol=1e-4, rtol=0)
    assert differ(by_us(pipeline_path(), stack[:1]), ours) and differ(by_us(pipeline_path(), stack[1:]), ours)


@pytest.mark.parametrize("to", ["diffusers", "peft", "pipeline"])
def test_the_export_of_a_run_is_its_whole_stack(tuned, tmp_path, to):
    base = tmp_path / "base"  # in float32, so that merging rounds nothing
    plain(pipeline_path()).save_pretrained(base)
    export([tuned], tmp_path / "out", to, model=str(base))
    theirs, ours = by_diffusers(LOADERS[to](base, tmp_path / "out")), by_us(base, read_stack([tuned]))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert differ(theirs, by_us(base, []))
    if to != "pipeline":
        assert read_lora(tmp_path / "out").parents == () and len(read_stack([tmp_path / "out"])) == 1


def test_an_export_for_rtdmd_is_one_lora_of_the_summed_rank(shapes, tmp_path):
    cold = write_run(tmp_path / "cold", random_lora(shapes))
    top = write_run(tmp_path / "rl", on(random_lora(shapes, seed=2), read_lora(cold)), cold)
    line = export([top], tmp_path / "out", "generator_ema")
    assert "with rank 8 and alpha 16" in line
    theirs = by_diffusers(LOADERS["generator_ema"](pipeline_path(), tmp_path / "out"))
    torch.testing.assert_close(theirs, by_us(pipeline_path(), read_stack([top])), atol=1e-4, rtol=0)


@pytest.fixture
def carded(shapes, cold, tmp_path):
    """A run as training leaves it: copies of what lies beneath, its LoRA, and a card."""
    folder, beneath = tmp_path / "carded", read_stack([cold])
    recipe = quick(folder, f"lora.on={json.dumps([str(cold)])}", "lora.rank=2", "lora.alpha=3", whole=True)
    folder.mkdir()
    (folder / "recipe.toml").write_text(to_toml(recipe))
    keep(beneath, folder)
    policy = LoraPolicy(model(), rank=2, alpha=3.0, seed=0)
    load_lora(policy, random_lora(shapes, **RL))
    write_result(policy, folder, recipe, 3, [fingerprint(lora) for lora in beneath])
    return folder


def snippet(card):
    scope = {}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"]


def test_the_cards_snippet_adds_both_in_plain_diffusers(shapes, carded):
    card = (carded / "lora" / "README.md").read_text()
    assert f"- on top of `{carded}/on/1`, which has to be loaded, too" in card and "rank 2 (alpha 2)" in card
    pipe, stack = snippet(card), read_stack([carded])
    top = baked(random_lora(shapes, **RL)).layers[Q][1]
    assert len(stack) == 2 and torch.equal(stack[1].layers[Q][1], top)
    whole = by_diffusers(pipe)
    torch.testing.assert_close(whole, by_us(pipeline_path(), stack), atol=1e-4, rtol=0)
    for name, part in (("beneath_1", stack[0]), ("top", stack[1])):
        pipe.set_adapters([name], [1])
        alone = by_diffusers(pipe)
        torch.testing.assert_close(alone, by_us(pipeline_path(), [part]), atol=1e-4, rtol=0)
        assert differ(alone, whole)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_the_card_of_the_joined_export_loads_that_one_file(carded, tmp_path, to):
    export([carded], tmp_path / "out", to)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank 9 (alpha 9)" in card and "joined with what it was trained on top of" in card
    assert str(carded) not in card and "set_adapters" not in card
    pipe = snippet(card)
    assert isinstance(pipe.transformer, PeftModel) == (to == "peft")
    torch.testing.assert_close(by_diffusers(pipe), by_us(pipeline_path(), read_stack([carded])), atol=1e-4, rtol=0)


def test_an_evaluation_lists_what_was_stacked(cold, tuned, tmp_path):
    for k, places in enumerate(([tuned], [cold, tuned])):
        results = assess(tmp_path / str(k), loras=places, images=2, steps=1)
        told = results["protocol"]["lora"]
        assert [part["path"] for part in told] == [f"{run}/lora/pytorch_lora_weights.safetensors" for run in (cold, tuned)]


def test_a_sample_is_of_the_whole_stack(cold, tuned, tmp_path):
    def drawn(*loras):
        return sample(["a red circle"], tmp_path / "x.png", loras=loras, steps=2, base_too=False).read_bytes()

    whole = drawn(tuned)
    assert whole == drawn(cold, tuned) != drawn(cold)
