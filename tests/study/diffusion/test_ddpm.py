import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lafq.rng import generator
from lafq.study.diffusion.ddpm import (
    ALPHA_BAR,
    BETAS,
    add_noise,
    ancestral_step,
    ddim_step,
    sample,
    sampler,
    sampler_noise,
    trailing_timesteps,
)


def scheduler(**settings):
    settings |= {"clip_sample": False, "timestep_spacing": "trailing"}
    return DDPMScheduler(1000, 1e-4, 0.02, "linear", **settings)


def test_forward_process_is_diffusers():
    x0, noise, t = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    theirs = scheduler().add_noise(x0, noise, t)
    torch.testing.assert_close(add_noise(x0, t, noise), theirs, rtol=1e-4, atol=1e-5)
    assert ALPHA_BAR[0] == pytest.approx(1 - 1e-4)


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_one_reverse_trajectory_is_diffusers(steps):
    theirs = scheduler(variance_type="fixed_small")
    torch.testing.assert_close(theirs.betas, BETAS.float(), rtol=1e-6, atol=0)
    # Both in float64: in float32 alone 1 - abar has lost its digits near t = 0, and rounding adds
    # up over 1,000 steps.
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = BETAS, 1 - BETAS, ALPHA_BAR
    theirs.set_timesteps(steps)
    timesteps = trailing_timesteps(steps)
    assert timesteps == theirs.timesteps.tolist()
    g = torch.Generator().manual_seed(1)
    ours = other = torch.randn(1, 1, 8, 8, generator=g, dtype=torch.float64)
    for i, t in enumerate(timesteps):
        t_next = timesteps[i + 1] if i + 1 < steps else -1
        eps = 0.9 * torch.tanh(ours) + 0.05
        state = g.get_state()
        noise = torch.zeros_like(ours)
        if t_next >= 0:
            noise = torch.randn(ours.shape, generator=g, dtype=torch.float64)
        ours = ancestral_step(ours, eps, noise, t, t_next)
        g.set_state(state)
        other = theirs.step(eps, t, other, generator=g).prev_sample
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


def test_the_deterministic_step_is_diffusers():
    theirs = DDIMScheduler(1000, 1e-4, 0.02, "linear", timestep_spacing="trailing")
    theirs.config.clip_sample, theirs.alphas_cumprod = False, ALPHA_BAR
    theirs.set_timesteps(50)
    x, eps = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64, generator=generator(3))
    for t, s in itertools.pairwise(trailing_timesteps(50)):
        other = theirs.step(eps, t, x).prev_sample
        torch.testing.assert_close(ddim_step(x, eps, None, t, s), other, rtol=1e-9, atol=1e-9)


def test_the_sampler_with_gradients_draws_the_same_images(tiny):
    images = sampler(tiny, sampler_noise(range(1, 3), 3, seed=7)).detach()
    rounded = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(rounded, sample(tiny, 2, 3, seed=7, first=1))


def test_any_number_of_steps_gives_as_many_timesteps():
    for steps in range(1, 1001):
        timesteps = trailing_timesteps(steps)
        assert (len(timesteps), timesteps[0]) == (steps, 999) and timesteps[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(timesteps))


def test_an_images_noise_is_its_own(tiny):
    alone = sample(tiny, 5, 3, seed=7, batch_size=5)
    in_pairs = sample(tiny, 5, 3, seed=7, batch_size=2)
    assert (alone.int() - in_pairs.int()).abs().max() <= 1
    assert torch.equal(sample(tiny, 2, 3, seed=7), sample(tiny, 2, 3, seed=7))
    assert not torch.equal(alone, sample(tiny, 5, 3, seed=8))


def test_noise_does_not_depend_on_the_model_or_the_batch(tiny):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.seen = []

        def forward(self, x, t):
            self.seen.append(x.clone())
            return torch.zeros_like(x)

    recorder = Recorder()
    sample(recorder, 3, 2, seed=5, batch_size=2)
    first_of_batch_two = recorder.seen[2]
    assert torch.equal(first_of_batch_two[0], torch.randn(1, 32, 32, generator=generator(5, 2)))


@pytest.mark.parametrize(("images", "steps"), [(0, 5), (-1, 5), (1, 0), (1, 1001)])
def test_bad_input(tiny, images, steps):
    with pytest.raises(ValueError, match="asked for"):
        sample(tiny, images, steps, seed=0)
