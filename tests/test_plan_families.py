"""`flowtilt plan` for every family: published sizes, what a network reads, what its passes cost, messages, a geometry for a time."""

import tomllib

import pytest
import tiny_pipelines
import torch

from flowtilt import UserError, load_recipe
from flowtilt.config import ModelSettings
from flowtilt.models.captions import SOURCE
from flowtilt.models.conditioning import Conditioning
from flowtilt.models.family import Family
from flowtilt.models.opening import FAMILIES, adapted, load_pipeline
from flowtilt.plan import Machine, make_plan, proposal
from flowtilt.plan.components import build_pipeline
from flowtilt.plan.geometry import find_geometry
from flowtilt.plan.judges import gradient_of, judging
from flowtilt.plan.meter import measure
from flowtilt.plan.network import batch, conditioning, costs_of, weights_of
from flowtilt.plan.published import PUBLISHED
from flowtilt.plan.wire import gathered, summed
from flowtilt.rewards.named import parse

CPU = torch.device("cpu")
TINY = ["flux2_klein", "qwen_image", "z_image", "sana", "lumina2", "chroma", "aura_flow", "kontext"]

# published configurations -------------------------------------------------------------------------


def test_every_family_has_a_published_configuration():
    assert {kind for kind, _ in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("black-forest-labs/FLUX.1-Kontext-dev", 11_901.4),
        ("black-forest-labs/FLUX.2-klein-4B", 3_875.5),
        ("black-forest-labs/FLUX.2-dev", 32_219.0),
        ("Qwen/Qwen-Image", 20_430.4),  # 20,430,401,088: the 40.86 GB of its files
        ("Qwen/Qwen-Image-Edit-2511", 20_430.4),
        ("Qwen/Qwen-Image-2.1", 7_115.1),
        ("Tongyi-MAI/Z-Image", 6_154.9),
        ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", 1_604.5),
        ("Alpha-VLLM/Lumina-Image-2.0", 2_610.0),
        ("fal/AuraFlow-v0.3", 6_845.0),
        ("lodestones/Chroma1-HD", 8_900.0),
    ],
)
def test_networks_have_their_published_sizes_and_give_velocities_like_the_latents(name, millions):
    settings = ModelSettings(path=name, dtype="bfloat16", resolution=512)
    model = adapted(settings, build_pipeline(find_geometry(name), "bfloat16"), False)
    assert weights_of(model.network).number / 1e6 == pytest.approx(millions, rel=5e-3)
    one, found = batch(model, conditioning(model), 1), []
    with torch.no_grad():
        measure(lambda: found.append(model.velocity(one.x0, one.t, one.conditioning)))
    assert found[0].shape == one.x0.shape and found[0].dtype == torch.float32


# a network's passes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = str(getattr(tiny_pipelines, name)(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


@pytest.mark.parametrize("name", TINY)
def test_a_pass_costs_on_the_meta_device_what_it_does_on_a_cpu(name, folders):
    own = {"options": {"source_resolution": 32}} if name == "kontext" else {}
    settings = ModelSettings(path=folders(name), dtype="float32", resolution=32 if name == "aura_flow" else 64, **own)
    real = adapted(settings, load_pipeline(settings.path, revision=None, dtype="float32", device=CPU), False)
    made = adapted(settings, build_pipeline(find_geometry(settings.path), "float32"), False)
    assert made.latent_shape == real.latent_shape and made.protocol == real.protocol
    words, blank = (
        real.read("two crosses"),
        made.blank(len(next(iter(real.read("two crosses").values()))) if real.ragged else made.text_length),
    )
    blank.pop(SOURCE, None)
    assert {key: (x.shape, x.dtype) for key, x in words.items()} == {key: (x.shape, x.dtype) for key, x in blank.items()}
    given = conditioning(made)
    shapes = {key: torch.ones(x.shape, dtype=x.dtype) for key, x in given.distinct.items()}
    sources = None if given.sources is None else torch.ones(given.sources.shape)
    same = Conditioning(shapes, torch.zeros(3, dtype=torch.long), given.lengths, sources)
    x, t = torch.zeros(3, *real.latent_shape), torch.full((3,), 0.5)
    with torch.no_grad():
        actual = measure(lambda: real.velocity(x, t, same)).flops
    computed = costs_of(settings, 4, 4.0).forward.at(3).flops
    # adapters are merged into an fp32 base before, so a pass of the policy costs what the network's own does
    assert {key: count for key, count in computed.items() if count} == pytest.approx(actual)


def test_a_family_of_a_users_own_that_does_not_say_what_it_reads_is_one_line():
    with pytest.raises(UserError, match=r"^plan: Family does not say"):
        Family.blank(object.__new__(Family), 8)


# messages, time -----------------------------------------------------------------------------------


def test_a_ring_sends_what_it_must():
    # of a sum each rank has to hear of W - 1 others and pass the result on; nothing is sent to oneself
    assert summed(100, 1) == gathered(100, 1) == 0
    assert summed(100, 2) == 100 and gathered(100, 2) == 100 and summed(100, 4) == 150 and gathered(100, 4) == 300


def test_gradients_are_sent_once_an_update_and_a_sharded_base_once_a_pass():
    one, eight = (make_plan(load_recipe("sd35m-ocr"), Machine(gpus=gpus)) for gpus in (1, 8))
    assert not one.messages and "network" not in one.work and one.efficiency == 1
    gradients = eight.messages["gradients"]
    assert gradients.number == 2 and gradients.sent == pytest.approx(2 * summed(eight.costs.trained.bytes, 8))
    sharded = make_plan(load_recipe("sd35m-ocr", ['shard="base"', "micro_batch=18"]), Machine(gpus=8))
    passes = sharded.messages["gathering of the sharded base"].sent / gathered(sum(sharded.costs.shards) / 8, 8)
    # 144 images in 8 parts of 18 x 10 steps; 2 updates of 72 images on average and 80 on the fullest rank, x 9 times in parts of 18 rows:
    # forward, backward, the reference's, and in the second update the old policy's
    assert passes == pytest.approx(80 + 80 * 3.5, rel=0.03)
    assert sharded.peak.total < eight.peak.total and sharded.hours > eight.hours


def test_slower_links_and_more_machines_cost_hours():
    def hours(**machine):
        return make_plan(load_recipe("sd35m-ocr", ['shard="base"', "micro_batch=18"]), Machine(gpus=16, **machine)).hours

    assert hours() < hours(nodes=2) < hours(nodes=2, between="ethernet") < hours(nodes=2, between="1")
    with pytest.raises(UserError, match="--nodes 3 does not divide --gpus 16"):
        Machine(gpus=16, nodes=3)
    with pytest.raises(UserError, match="--network is a number of GB/s or one of nvlink"):
        Machine(gpus=16, between="string")


def test_a_proposal_fits_the_time_and_keeps_groups():
    hours = 24
    found = proposal(load_recipe("sd35m-geneval"), Machine("4090"), hours)
    assert found.plan.fits and 0.8 * hours < found.plan.hours <= hours
    r = found.changed_recipe.rollout
    assert r.images_per_prompt >= 12 and found.changed_recipe.rollouts >= 150
    assert "Given up" in found.text("sd35m-geneval") and proposal(found.changed_recipe, Machine("4090"), hours).changed == {}


def test_a_proposal_uses_its_time_ends_the_guide_with_the_run_and_repeats_the_overrides():
    overrides = ["optimizer.clip=0.5", "rollout.prompts=12"]
    recipe = load_recipe("sd35m-24gb-geneval", overrides)
    found = proposal(recipe, Machine("3090"), 16)
    rollouts = found.changed_recipe.rollouts
    assert 0.95 * 16 < found.plan.hours <= 16 and rollouts < 300
    assert found.changed["objective.guide"] == tuple((round(x * rollouts / 300, 2), y) for x, y in recipe.objective.guide)
    text = found.text("sd35m-24gb-geneval", overrides)
    assert "-16h.toml optimizer.clip=0.5\n" in text and tomllib.loads(text)["rollout"]["prompts"] == 8  # what it changes is not overridden


def test_where_nothing_sensible_fits_other_cards_are_named():
    with pytest.raises(UserError, match=r"no geometry of sd35m-geneval .* fits 0.5 h on 1 x 4090; .*8 x"):
        proposal(load_recipe("sd35m-geneval"), Machine("4090"), 0.5)


def test_where_the_memory_is_too_small_for_any_geometry_it_is_the_memory_that_is_named():
    with pytest.raises(UserError, match=r"needs \d+\.\d GiB, most in encode, and no smaller resolution fits the 8 GiB of this 4090"):
        proposal(load_recipe("sd35m-24gb-ocr"), Machine("4090", memory=8), 24)


@pytest.mark.parametrize("name", ["sd35m-24gb-ocr", "sd35m-24gb-geneval", "sd35m-24gb-pickscore"])
def test_recipes_for_one_card_are_done_in_a_day(name):
    # the lowest utilisation that was measured of a method
    small, large = (make_plan(load_recipe(name), Machine(gpu, utilisation=0.21)) for gpu in ("4090", "h100"))
    assert small.fits and small.hours < 24 and large.fits and large.hours < 8
    assert small.recipe.rollout.images_per_prompt >= 12 and small.recipe.guards == "stop"


# RTDMD --------------------------------------------------------------------------------------------


def test_stages_of_rtdmd_have_a_fake_score_and_follow_rewards():
    cold, rl = (make_plan(load_recipe(f"playground-rtdmd-{stage}"), Machine()) for stage in ("cold", "rl"))
    for plan in (cold, rl):
        assert plan.resident["gradient and AdamW"] == 6 * plan.costs.trained.bytes
    assert {"decode", "reward"} & {phase.name for phase in cold.phases} == set() and "decode" not in cold.work
    assert cold.costs.update(3, False).at(4).saved == pytest.approx(3 * cold.costs.update(1, False).at(4).saved, rel=0.05)


def test_a_followed_reward_costs_its_network_and_the_way_back():
    (found,) = judging(parse(["clipscore"]), 512).sources.values()
    forward = sum(judging(parse(["clipscore"]), 512).models["clip-l"].image.values())
    # to the images alone: weights have no gradient, so the way back costs about as much as the way there
    assert 1.9 < sum(gradient_of(found, 512).flops.values()) / forward < 2.6
