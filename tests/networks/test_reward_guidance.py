"""Reward guidance: its gradient against plain autograd, how far it moves and when, and the task that compares it."""

from dataclasses import replace

import pytest
import torch

from alignprop.engine.seeding import generators
from alignprop.engine.speed import Timed
from alignprop.method.chain import Sampler
from alignprop.method.reward_guidance import RewardGuidance, strengths
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models.base import select
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import MemoryPolicy
from rewards import RewardError, as_reward
from tests.helpers.schedulers import guided as classifier_free
from tests.helpers.toy_rewards import redness

STEPS, SCALE = 4, 3.0
PROMPTS = ["a cat", "a dog", "two red circles"]


def colourful(images, prompts, metadata):
    """Its gradient differs between pixels, and its direction between prompts."""
    lengths = torch.tensor([float(len(p)) for p in prompts])
    return (images[:, 0] * images[:, 1]).mean(dim=(1, 2)) * lengths - images[:, 2].square().mean(dim=(1, 2))


@pytest.fixture(params=["epsilon", "v_prediction"])
def model(request, pipelines):
    return StableDiffusion.load(str(pipelines[request.param]))


@pytest.fixture
def plain_model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


def guidance(model, reward=colourful, eta=0.0, memory=None, sampler=None, **options):
    options = dict(strength=0.2, through="x0", schedule="constant", window=(0.0, 1.0)) | options
    sampler = sampler or build_sampler(model.scheduler, STEPS, eta)
    return RewardGuidance(Rollout(model, sampler, SCALE, memory=memory), as_reward(reward), **options)


def inputs(model, rows=slice(None)):
    """Fresh generators, conditioning, prompts and metadata of some of the samples."""
    metadata = [{}] * len(PROMPTS)
    cond = select(model.encode_prompts(PROMPTS), rows)
    return generators(range(len(PROMPTS)), "x")[rows], cond, PROMPTS[rows], metadata[rows]


def plain(guide):
    streams, cond, *_ = inputs(guide.rollout.model)
    return guide.rollout(streams, cond, None)


def relative_difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def unit(gradient):
    """Each sample's with a root mean square of 1."""
    flat = gradient.flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True) * flat.shape[1] ** 0.5).view_as(gradient)


def autograd_direction(model, sampler, i, latents, through, reward=colourful):
    """The definition, in one graph."""
    cond = model.encode_prompts(PROMPTS)
    latents = latents.clone().requires_grad_()
    output = classifier_free(model, latents, sampler.timesteps[i], cond, SCALE)
    predicted = float(sampler.p[i]) * latents
    predicted = predicted + float(sampler.q[i]) * (output if through == "denoiser" else output.detach())
    reward(model.decode(predicted), PROMPTS, None).sum().backward()
    return output.detach(), unit(latents.grad)


@pytest.mark.parametrize("memory", [
    MemoryPolicy(), MemoryPolicy(decode_chunk=2, guidance_batching="split"), MemoryPolicy(residency="phase"),
])  # fmt: skip
@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_the_gradient_is_that_of_autograd(model, through, memory):
    guide = guidance(model, through=through, memory=memory)
    streams, *rest = inputs(model)
    latents = model.init_latents(streams)
    for i in (0, STEPS - 1):
        output, expected = autograd_direction(model, guide.rollout.sampler, i, latents, through)
        model_output, direction = guide.look_ahead(i, latents, *rest)
        torch.testing.assert_close(model_output, output)
        assert relative_difference(direction, expected) < 1e-5


def test_the_two_ways_differ(plain_model):
    latents = plain_model.init_latents(generators(range(3), "x"))
    sampler = build_sampler(plain_model.scheduler, STEPS, 0.0)
    found = [autograd_direction(plain_model, sampler, 1, latents, through)[1] for through in ("denoiser", "x0")]
    assert relative_difference(*found) > 0.05


def test_from_pure_noise_the_prediction_alone_has_a_direction(plain_model):
    """Zero terminal SNR: p = 0 at the first step, and with it ∂x̂0/∂x where f is held constant."""
    sampler = build_sampler(plain_model.scheduler, STEPS, 0.0)
    sampler = replace(sampler, p=torch.zeros(STEPS), q=torch.full((STEPS,), -1.0))
    streams, *rest = inputs(plain_model)
    latents = plain_model.init_latents(streams)
    output, direction = guidance(plain_model, sampler=sampler).look_ahead(0, latents, *rest)
    predicted = (-output).requires_grad_()
    colourful(plain_model.decode(predicted), PROMPTS, None).sum().backward()
    assert relative_difference(direction, unit(predicted.grad)) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_a_tiny_strength_gives_the_plain_pictures(plain_model, through, eta):
    guide = guidance(plain_model, strength=1e-7, through=through, eta=eta)
    torch.testing.assert_close(guide(*inputs(plain_model)), plain(guide), rtol=0, atol=1e-5)
    guide.strengths += 0.1
    assert relative_difference(guide(*inputs(plain_model)), plain(guide)) > 0.01


def test_a_move_has_the_length_and_the_direction_that_it_should(plain_model):
    # So strong that rounding of the latents themselves does not count.
    guide = guidance(plain_model, window=(0.75, 1.0), through="denoiser", strength=20.0)
    steps = []
    streams, cond, *rest = inputs(plain_model)
    guide.rollout.sample(streams, cond, on_step=lambda i, x, f, following: steps.append((x, following)))
    before, after = steps[-1]
    moved = guide(*inputs(plain_model)) - after
    _, direction = guide.look_ahead(STEPS - 1, before, cond, *rest)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), 20 * (after - before).flatten(1).norm(dim=1))
    assert relative_difference(unit(moved), direction) < 1e-4


def test_steps_outside_the_window_are_untouched(plain_model):
    guide, looked = guidance(plain_model, window=(0.25, 0.75)), []
    own, following = guide.look_ahead, guide.rollout.next_latents
    guide.look_ahead = lambda i, *args: looked.append(i) or own(i, *args)
    chain = []
    guide.rollout.next_latents = lambda *args: chain.append(following(*args)) or chain[-1]
    guide(*inputs(plain_model))
    guided, chain[:] = list(chain), []
    plain(guide)
    assert looked == [1, 2]
    # x[2], which step 1 moves, is met again as what step 2 starts from.
    assert torch.equal(guided[0], chain[0]) and torch.equal(guided[1], chain[1])
    assert not torch.equal(guided[2], chain[2])


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_a_sample_does_not_depend_on_the_others(plain_model, through):
    together = guidance(plain_model, through=through)(*inputs(plain_model))
    alone = [guidance(plain_model, through=through)(*inputs(plain_model, slice(j, j + 1))) for j in range(3)]
    chunked = guidance(plain_model, through=through, memory=MemoryPolicy(sweep_chunk=2))(*inputs(plain_model))
    assert relative_difference(torch.cat(alone), together) < 1e-4
    assert relative_difference(chunked, together) < 1e-4


@pytest.mark.parametrize("through", ["denoiser", "x0"])
def test_guided_pictures_have_a_higher_reward(plain_model, through):
    guide = guidance(plain_model, redness, through=through, strength=0.3)
    scores = [redness(plain_model.decode(x), PROMPTS, None) for x in (plain(guide), guide(*inputs(plain_model)))]
    assert (scores[1] > scores[0] + 0.01).all()


def test_a_flat_reward_moves_nothing_and_one_without_a_finite_gradient_is_refused(plain_model):
    flat = guidance(plain_model, lambda images, prompts, metadata: (images * 0).sum(dim=(1, 2, 3)))
    assert torch.equal(flat(*inputs(plain_model)), plain(flat))

    def root(images, prompts, metadata):
        return (images * 0).sum(dim=(1, 2, 3)).sqrt()

    with pytest.raises(RewardError, match="reward 'root' has no finite gradient to follow"):
        guidance(plain_model, root)(*inputs(plain_model))


def test_a_gradient_too_small_for_its_square_still_has_a_direction(plain_model):
    def faint(images, prompts, metadata):
        return colourful(images, prompts, metadata) * 1e-30

    latents = [guidance(plain_model, reward)(*inputs(plain_model)) for reward in (faint, colourful)]
    assert relative_difference(*latents) < 1e-4


CHAIN = Sampler(
    timesteps=torch.arange(4), a=torch.ones(4), b=torch.ones(4), s=torch.zeros(4),
    alpha=torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double(), sigma=torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]).double(),
)  # fmt: skip


@pytest.mark.parametrize(("schedule", "window", "expected"), [
    ("constant", (0.0, 1.0), [0.1, 0.1, 0.1, 0.1]),
    ("constant", (0.5, 1.0), [0.0, 0.0, 0.1, 0.1]),
    ("constant", (0.3, 0.4), [0.0, 0.1, 0.0, 0.0]),
    ("noise", (0.0, 1.0), [0.16, 0.12, 0.08, 0.04]),
    ("late", (0.0, 1.0), [0.04, 0.08, 0.12, 0.16]),
    ("noise", (0.0, 0.5), [0.8 / 7, 0.6 / 7, 0.0, 0.0]),
])  # fmt: skip
def test_strengths_have_the_mean_that_was_asked_for(schedule, window, expected):
    torch.testing.assert_close(strengths(CHAIN, 0.1, schedule, window), torch.tensor(expected).double())


def test_a_window_between_two_steps_is_refused():
    with pytest.raises(ConfigError, match=r"guide.window = \(0.4, 0.6\) has none of the 4 sampler steps"):
        strengths(CHAIN, 0.1, "constant", (0.4, 0.6))


def test_the_clock_counts_pictures():
    clock = Timed(lambda streams, cond: torch.zeros(len(streams)), torch.device("cpu"))
    assert clock.seconds_per_picture == 0
    clock([1, 2, 3], None), clock([1], None)
    clock.seconds = 6.0
    assert clock.pictures == 4 and clock.seconds_per_picture == 1.5
