"""The scheduler for plain diffusers: our own sampler's images, its levels, its generators, and files."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from tiny_pipelines import flux

from flowtilt.errors import UserError
from flowtilt.flow import predict_x0, sigma_schedule
from flowtilt.models.flux import Flux
from flowtilt.models.levels import Levels
from flowtilt.models.opening import load_pipeline
from flowtilt.models.sd3 import SD3
from flowtilt.playground import pipeline_path
from flowtilt.policy.tuned_model import TunedModel
from flowtilt.sampling.sampler import Sampler, decode
from flowtilt.schedulers import CPSScheduler
from flowtilt.seeding import noise

TEXTS = ["two crosses", "a yellow square above a green circle"]
START = noise(0, "test", [(0,), (1,)], (8, 8, 8))


@pytest.fixture(scope="module")
def pipeline():
    found = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipeline, texts=TEXTS, start=START, guidance=1.0, **options):
    options = {"num_inference_steps": 4, "max_sequence_length": 1, "output_type": "pt", **options}
    return pipeline(texts, latents=start.clone(), guidance_scale=guidance, **options).images


def cps(pipeline, eta, *seeds):
    """The pipeline with its scheduler, an image's noise from its seed."""
    pipeline.scheduler = CPSScheduler.from_config(pipeline.scheduler.config, eta=eta)
    pipeline.scheduler.generator = [torch.Generator().manual_seed(seed) for seed in seeds] or None
    return pipeline


def same_noise(*seeds, steps=3):
    """As the sampler asks for it, what these generators give step after step."""
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [torch.cat([torch.randn(1, *START.shape[1:], generator=rng) for _ in range(steps)]) for rng in rngs]
    return lambda rows, j: torch.stack([drawn[k][j] for k in rows.tolist()])


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("eta", [0.4, 0.9, 1.0])
def test_plain_diffusers_draws_what_our_sampler_draws(pipeline, guidance, eta):
    theirs = draw(cps(pipeline, eta, 5, 6), guidance=guidance)
    stack = TunedModel(SD3(pipeline), [])
    latents = Sampler("cps", 4, guidance, eta)(stack, "base", START, stack.model.encode(TEXTS), 2, same_noise(5, 6))
    torch.testing.assert_close(decode(stack, latents, 2), theirs, atol=2e-5, rtol=0)


def test_eta_0_is_euler(pipeline):
    ours = draw(cps(pipeline, 0.0))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.shift)
    theirs = draw(pipeline, num_inference_steps=None, sigmas=[1 - k / 4 for k in range(4)])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_eta_1_noises_the_predicted_data_anew():
    scheduler = CPSScheduler(shift=3.0, eta=1.0)
    scheduler.set_timesteps(4)
    x, v = START, START.flip(0)
    found = scheduler.step(v, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, 0.1 * predict_x0(x, v, 1.0) + 0.9 * z)


# levels ----------------------------------------------------------------------------------------------


def test_levels_are_those_of_our_sampler_and_given_ones_are_not_shifted_again():
    scheduler = CPSScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert scheduler.eta == 0.9
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), atol=1e-7, rtol=0)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 900.0, 750.0, 500.0]), atol=1e-3, rtol=0)
    scheduler.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), atol=1e-7, rtol=0)
    scheduler.set_shift(1.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_levels_may_be_given_as_timesteps_as_the_parent_takes_them():
    scheduler = CPSScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[1000, 900.0, 500])
    assert scheduler.timesteps.tolist() == [1000.0, 900.0, 500.0]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.5, 0.0]))
    scheduler.set_timesteps(sigmas=[1.0, 0.5], timesteps=[1000.0, 400.0], num_inference_steps=2)
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0] and scheduler.timesteps.tolist() == [1000.0, 400.0]


def test_it_and_its_parent_are_made_from_each_others_configuration():
    scheduler = CPSScheduler(shift=3.0, eta=0.5)
    assert set(scheduler.compatibles) == {CPSScheduler, FlowMatchEulerDiscreteScheduler}
    for kind in scheduler.compatibles:
        other = kind.from_config(scheduler.config)
        assert other.config.shift == 3.0 and CPSScheduler.from_config(other.config).eta == 0.5


def test_dynamic_shifting_takes_its_shift_from_mu():
    for kind, mu in (("exponential", 1.0986123), ("linear", 3.0)):
        scheduler = CPSScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        scheduler.set_timesteps(4, mu=mu)
        torch.testing.assert_close(scheduler.sigmas, sigma_schedule(4, 3.0))
        with pytest.raises(ValueError, match="needs mu"):
            scheduler.set_timesteps(4)


def test_flux_draws_at_the_shifted_levels(tmp_path):
    place = flux(tmp_path)
    model = Flux(load_pipeline(str(place), revision=None, dtype="float32", device=torch.device("cpu")), resolution=16, t5_length=8)
    pipeline = cps(model.pipeline, 0.9)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", num_inference_steps=3, output_type="latent", **model.call_options(1.0))
    torch.testing.assert_close(pipeline.scheduler.sigmas, model.levels(3))


def test_steps_are_counted_and_never_looked_up(pipeline):
    scheduler = CPSScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x = START
    for j in range(4):
        assert scheduler.step_index == (j or None)
        x = scheduler.step(torch.zeros_like(x), 123.4, x, generator=torch.Generator().manual_seed(j), return_dict=False)[0]
    with pytest.raises(ValueError, match="no step is left"):
        scheduler.step(x, 0.0, x)
    # the second half alone, as image to image does
    half = StableDiffusion3Img2ImgPipeline(**pipeline.components)
    half.set_progress_bar_config(disable=True)
    cps(half, 0.9)
    options = {"num_inference_steps": 4, "max_sequence_length": 1, "output_type": "pt"}
    half("two crosses", image=torch.rand(1, 3, 32, 32), strength=0.5, **options)
    assert half.scheduler.begin_index == 2 and half.scheduler.step_index == 4


# noise -----------------------------------------------------------------------------------------------


def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(pipeline):
    both = draw(cps(pipeline, 0.9, 1, 2))
    alone = [draw(cps(pipeline, 0.9, k + 1), TEXTS[k : k + 1], START[k : k + 1]) for k in range(2)]
    torch.testing.assert_close(torch.cat(alone), both, atol=5e-5, rtol=0)
    other = draw(cps(pipeline, 0.9, 1, 3))
    torch.testing.assert_close(other[0], both[0], atol=5e-5, rtol=0)
    assert (other[1] - both[1]).abs().max() > 0.05


def test_one_generator_repeats_a_call_and_the_argument_of_a_step_comes_first(pipeline):
    cps(pipeline, 0.9)
    found = []
    for seed in (4, 4, 5):
        pipeline.scheduler.generator = rng = torch.Generator().manual_seed(seed)
        found.append(
            pipeline(TEXTS, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=1, output_type="pt", generator=rng).images
        )
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    scheduler, steps = pipeline.scheduler, []
    for seed in (4, 5):
        scheduler.generator = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(4)
        steps.append(scheduler.step(START, 0.0, START, generator=[torch.Generator().manual_seed(k) for k in (0, 1)]).prev_sample)
    assert torch.equal(steps[0], steps[1])
    with pytest.raises(ValueError, match="3 generators for 2 images"):
        scheduler.step(START, 0.0, START, generator=[torch.Generator()] * 3)


def test_without_a_generator_of_its_own_the_pipelines_seeds_make_images_reproducible(pipeline):
    cps(pipeline, 0.9)

    def images(texts, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "pt"}
        return pipeline(texts, generator=generators, **options).images

    found = images(TEXTS, 1, 2)
    torch.randn(5)  # torch's global generator has no part in it
    assert torch.equal(images(TEXTS, 1, 2), found)
    alone = torch.cat([images(TEXTS[:1], 1), images(TEXTS[1:], 2)])
    torch.testing.assert_close(alone, found, atol=5e-5, rtol=0)
    other = images(TEXTS, 1, 3)
    torch.testing.assert_close(other[0], found[0], atol=5e-5, rtol=0)
    assert (other[1] - found[1]).abs().max() > 0.05


def test_noise_that_comes_from_the_first_latents_is_new_at_every_step_and_has_their_bits_in_any_precision():
    def noises(start, batch=slice(None)):
        scheduler = CPSScheduler(shift=3.0, eta=1.0)
        scheduler.set_timesteps(4)
        x, found = start[batch], []
        for s_next in (0.9, 0.75, 0.5):
            v = x.float()  # so that the predicted data are x (1 - s), known exactly
            s = float(scheduler.sigmas[len(found)])
            x = scheduler.step(v, 0.0, x).prev_sample
            found.append((x - (1 - s_next) * (1 - s) * v) / s_next)
        return torch.stack(found)

    z = noises(START)
    flat = z.flatten()
    assert abs(float(flat.mean())) < 0.05 and abs(float(flat.std()) - 1) < 0.05
    assert (z[0] - z[1]).abs().max() > 1 and (z[:, 0] - z[:, 1]).abs().max() > 1
    torch.testing.assert_close(noises(START, slice(1, 2)), z[:, 1:], atol=1e-5, rtol=0)
    half = START.bfloat16()
    torch.testing.assert_close(noises(half), noises(half.float()), atol=1e-5, rtol=0)
    scheduler = CPSScheduler()
    scheduler.set_timesteps(4)
    scheduler.step(START, 0.0, START)
    with pytest.raises(ValueError, match="2 first latents for 1 images"):
        scheduler.step(START[:1], 0.0, START[:1])


def test_half_precision_is_rounded_once():
    scheduler = CPSScheduler(shift=3.0)
    x, v = START.bfloat16(), START.flip(0).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        scheduler.set_timesteps(4)
        results.append(scheduler.step(v.to(dtype), 0.0, x.to(dtype), generator=torch.Generator().manual_seed(0)).prev_sample)
    assert results[0].dtype == torch.bfloat16 and torch.equal(results[0], results[1].bfloat16())


# files and bad input ---------------------------------------------------------------------------------


def test_eta_survives_files_of_the_scheduler_and_of_its_pipeline(pipeline, tmp_path):
    cps(pipeline, 0.7).scheduler.save_pretrained(tmp_path / "scheduler")
    assert CPSScheduler.from_pretrained(tmp_path / "scheduler").eta == 0.7
    assert CPSScheduler.from_config(pipeline.scheduler.config).eta == 0.7
    assert CPSScheduler.from_config(pipeline.scheduler.config, eta=0.2).eta == 0.2
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(again.scheduler, CPSScheduler) and again.scheduler.eta == 0.7
    assert again.scheduler.config.shift == pipeline.scheduler.config.shift == 2.0


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"eta": 1.1}, "eta must be within 0 and 1, not 1.1"),
        ({"eta": -0.1}, "eta must be within 0 and 1, not -0.1"),
        ({"eta": float("nan")}, "eta must be within 0 and 1, not nan"),
        ({"stochastic_sampling": True}, "does not go with stochastic_sampling = True"),
        ({"shift_terminal": 0.02}, "does not go with shift_terminal = 0.02"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas = False"),
    ],
)
def test_other_samplers_settings_are_refused(made, said):
    with pytest.raises(ValueError, match=said):
        CPSScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, **made)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give num_inference_steps, sigmas or timesteps"),
        ({"sigmas": [1.0, 0.5, 0.0]}, "without the last 0"),
        ({"sigmas": [0.5, 0.9]}, "must fall"),
        ({"sigmas": [1.2, 0.9]}, "must fall"),
        ({"sigmas": []}, "must fall"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 4}, "2 sigmas for num_inference_steps = 4"),
        ({"timesteps": [500.0, 900.0]}, "timesteps must fall within"),
        ({"timesteps": [1000.0], "num_inference_steps": 4}, "1 timesteps for num_inference_steps = 4"),
        ({"timesteps": [1000.0], "sigmas": [1.0, 0.5]}, "2 sigmas for 1 timesteps"),
    ],
)
def test_levels_that_are_none_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        CPSScheduler().set_timesteps(**given)


def test_a_step_before_its_levels_are_set_is_refused():
    with pytest.raises(ValueError, match="call set_timesteps first"):
        CPSScheduler().step(START, 1000.0, START)


@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_stock_levels_are_those_of_diffusers_without_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(Levels.fixed(shift).stock()(steps), scheduler.sigmas, atol=1e-6, rtol=1e-5)


def test_sd3s_ten_stock_levels_are_the_published_codes():
    found = Levels.fixed(3.0).stock()(10)
    torch.testing.assert_close(found[[1, 2, 7, 8, 9]], torch.tensor([0.9601, 0.9133, 0.4649, 0.2780, 0.0089]), atol=1e-4, rtol=0)


def test_a_family_whose_pipeline_passes_sigmas_has_no_stock_levels():
    with pytest.raises(UserError, match=r"model\.levels"):
        Levels(lambda steps: 1.0 + steps).stock()
