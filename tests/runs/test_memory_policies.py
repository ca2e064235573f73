"""Every combination of memory settings gives the gradient of plain autograd, and the same pictures."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from alignprop.build import build_run
from alignprop.engine.seeding import generator, generators
from alignprop.lora.adapters import trained_parameters
from alignprop.memory.accounting import Account
from alignprop.memory.checkpointing import apply_policy, checkpoint_layers, decode_in_tiles
from alignprop.memory.lean import make_lean
from alignprop.memory.planner import Choice
from alignprop.method import estimators
from alignprop.method.guidance import GuidedDenoiser
from alignprop.models.loading import load_model
from alignprop.models.sd import StableDiffusion
from alignprop.prompts import draw_prompts
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES, chunks
from alignprop.trainer import AlignPropTrainer
from config.align_prop import TINY
from scripts.bench.families import encode_with_graph

STEPS, BATCH = 2, 2


class InDouble(StableDiffusion):
    def init_latents(self, generators):
        return super().init_latents(generators).double()


@pytest.fixture
def make_trainer(toy_config, pipeline_folder):
    def make(**memory):
        config = toy_config(
            per_gpu_capacity=BATCH, train__total_batch_size=BATCH, train__total_samples_per_epoch=BATCH,
            num_inference_steps=STEPS, estimator="full", eval_reward_fn="", **memory,
        )  # fmt: skip
        trainer = AlignPropTrainer(config, model=InDouble.load(str(pipeline_folder), dtype=torch.float64))
        for parameter in trainer.weights.parameters:
            parameter.data = parameter.data.double().normal_(0, 0.3, generator=generator("w", parameter.numel()))
        return trainer

    return make


def gradient(trainer):
    (indices,) = trainer.micro_batches()
    plan = trainer.estimator(trainer.run.rollout.sampler, BATCH, generator("plan"))
    rewards = trainer.add_gradients((0, 0), indices, plan).rewards
    found = torch.cat([p.grad.flatten() for p in trainer.weights.parameters])
    trainer.weights.zero_grad()
    return found, rewards


def by_autograd(trainer, first=0):
    """∂(mean loss)/∂θ through the plain chain, in one graph from step `first` on; the loss is minus the reward."""
    model, sampler = trainer.run.model, trainer.run.rollout.sampler
    prompts, metadata = draw_prompts(trainer.prompts, 0, 0, torch.arange(BATCH))
    cond, f = encode_with_graph(model, prompts), GuidedDenoiser(model, trainer.config.guidance_scale)
    latents = model.init_latents(generators(range(BATCH), 0, 0, "noise"))
    for i, t in enumerate(sampler.timesteps):
        with torch.set_grad_enabled(i >= first):
            latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * f(latents, t, cond)
    rewards = trainer.run.reward(model.decode(latents), prompts, metadata)
    grads = torch.autograd.grad(-rewards.mean(), trainer.weights.parameters)
    return torch.cat([g.flatten() for g in grads]), rewards.detach()


def relative_difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


CHUNKS = {"sweep_chunk": (0, 1), "decode_chunk": (0, 1), "guidance_batching": ("joint", "split")}
KEPT_OR_PHASE = ({"keep_steps": 0}, {"keep_steps": 1}, {"keep_steps": 2}, {"residency": "phase", "keep_steps": 0})


def combinations(shift):
    """All settings without a shift; with one, 8 in which each pair of values occurs, and which differ by the shift."""
    values = list(itertools.product(*CHUNKS.values()))
    for k, more in enumerate(KEPT_OR_PHASE):
        first = (0, 3, 5, 6)[(k + shift) % 4]  # of an even number of bits; its complement has the others
        for row in (first, 7 - first) if shift else range(8):
            yield {"residency": "all", **dict(zip(CHUNKS, values[row], strict=True)), **more}


@pytest.mark.parametrize(  # each pair of two of the three, in all four ways
    ("shift", "layers"),
    enumerate([(False, False, False), (False, True, True), (True, False, True), (True, True, False)]),
    ids=lambda value: value if isinstance(value, int) else "".join("-x"[f] for f in value),
)  # fmt: skip
def test_every_combination_gives_the_gradient_of_autograd(make_trainer, shift, layers):
    names = ("block_checkpointing", "decoder_checkpointing", "lean")
    plain = {"block_checkpointing": False, "decoder_checkpointing": False, "lean": False}
    expected, expected_rewards = by_autograd(make_trainer(**{f"memory__{k}": v for k, v in plain.items()}))
    assert expected.norm() > 0
    trainer = make_trainer(**{f"memory__{name}": flag for name, flag in zip(names, layers, strict=True)})
    for settings in combinations(shift):
        trainer.run.use(Choice("fast", replace(trainer.run.choice.memory, **settings), BATCH))
        found, rewards = gradient(trainer)
        assert relative_difference(found, expected) <= 1e-12, settings
        assert relative_difference(rewards, expected_rewards) <= 1e-12, settings


@pytest.mark.parametrize(("estimator", "memory"), [
    ("full", {}), ("full", {"sweep_chunk": 1, "decode_chunk": 1}), ("full", {"keep_steps": 1}),
    ("full", {"keep_steps": 2, "guidance_batching": "split"}), ("truncated", {"sweep_chunk": 1}),
    ("truncated", {"keep_steps": 1}),
    ("full", {"lean": True, "block_checkpointing": True, "guidance_batching": "split"}),
])  # fmt: skip
def test_the_gradient_of_a_text_encoder_is_that_of_autograd(make_trainer, estimator, memory):
    """Its own, beside the denoiser's, of which each is compared by itself."""
    fields = {f"memory__{name}": value for name, value in memory.items()}
    trainer = make_trainer(train_text_encoder=True, **fields)
    model, steps = trainer.run.model, trainer.run.rollout.sampler.num_steps
    names = list(trained_parameters(model))
    first = steps - 1 if estimator == "truncated" else 0
    trainer.estimator = lambda sampler, count, draw: estimators.truncated(sampler, count, first=first)
    expected = split(names, trainer, by_autograd(trainer, first)[0])
    found = split(names, trainer, gradient(trainer)[0])
    for part, vector in expected.items():
        assert vector.norm() > 0 and relative_difference(found[part], vector) <= 1e-12, part


def split(names, trainer, vector):
    """A vector of all parameters, by whether they are of the text encoder."""
    pieces, found = vector.split([p.numel() for p in trainer.weights.parameters]), {True: [], False: []}
    for name, piece in zip(names, pieces, strict=True):
        found["text_encoder" in name].append(piece)
    return {part: torch.cat(several) for part, several in found.items()}


def test_the_policies_need_less_and_less(make_trainer):
    """On the CPU, with the real tensors of a step, but for those that only a GPU can be rid of."""
    peaks = {}
    for name in POLICIES:
        trainer = make_trainer(memory_policy=name)
        account = Account("cpu")
        account.track(trainer.run.model.denoiser, trainer.run.model.decoder)
        with account:
            gradient(trainer)
        peaks[name] = account.peak
    assert peaks["roomy"] > peaks["fast"] > peaks["lean"] > peaks["balanced"] >= peaks["smallest"]


def test_applying_a_policy_twice_changes_nothing(make_trainer):
    trainer = make_trainer(memory_policy="smallest")
    once, _ = gradient(trainer)
    apply_policy(trainer.run.model, trainer.run.choice.memory)
    assert torch.equal(gradient(trainer)[0], once)


@pytest.mark.parametrize(("count", "size", "sizes"), [
    (5, 2, [2, 2, 1]), (4, 0, [4]), (3, 9, [3]), (0, 2, []), (0, 0, []),
])  # fmt: skip
def test_chunks(count, size, sizes):
    assert [len(range(count)[part]) for part in chunks(count, size)] == sizes
    assert [j for part in chunks(count, size) for j in range(count)[part]] == list(range(count))


# ---- a decode in tiles, which is an approximation


@pytest.fixture
def vae():
    """The bundled VAE, and smooth latents of a picture that is four times as wide and high as its own."""
    model = load_model(str(TINY / "pipeline"))
    channels = model.latent_shape[0]
    coarse = torch.randn(1, channels, 8, 8, generator=generator("tiles"))
    return model, torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic")


def decoded(model, latents):
    """(picture, gradient, bytes at most) of a decode with its backward pass."""
    latents = latents.clone().requires_grad_()
    with Account("cpu") as account:
        picture = model.decode(latents)
        picture.square().mean().backward()
    return picture.detach(), latents.grad, account.peak


def test_tiles_take_less_memory_and_their_pictures_differ_a_little(vae):
    model, latents = vae
    make_lean(model.decoder)
    checkpoint_layers(model.decoder)
    whole, gradient, peak = decoded(model, latents)
    decode_in_tiles(model.decoder, 128)
    picture, tiled_gradient, tiled_peak = decoded(model, latents)
    assert tiled_peak < 0.35 * peak
    assert 0 < (picture - whole).abs().mean() < 0.03
    assert 0.9 < torch.cosine_similarity(tiled_gradient.flatten(), gradient.flatten(), dim=0) < 1
    decode_in_tiles(model.decoder, 0)
    again, *_ = decoded(model, latents)
    assert torch.equal(again, whole)


def test_the_gradient_through_tiles_is_that_of_plain_autograd(vae):
    model, latents = vae
    plain = copy.deepcopy(model.decoder)
    decode_in_tiles(model.decoder, 64)
    plain.use_tiling, plain.tile_latent_min_size, plain.tile_sample_min_size = True, 16, 64
    _, gradient, _ = decoded(model, latents)
    model.decoder = plain
    _, expected, _ = decoded(model, latents)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("side", [16, 48, 112])
def test_tiles_make_a_picture_of_the_same_size(vae, side):
    model, latents = vae
    decode_in_tiles(model.decoder, side)
    assert model.decode(latents).shape == (1, 3, 256, 256)


def test_pictures_of_one_tile_are_decoded_whole(vae):
    model, latents = vae
    whole = model.decode(latents)
    decode_in_tiles(model.decoder, 256)
    assert torch.equal(model.decode(latents), whole)


def test_what_cannot_be_tiled_is_one_line(vae):
    model, _ = vae
    for side in (15, 40, 100):  # diffusers would put tiles of such a side together wrongly
        with pytest.raises(
            ConfigError, match=rf"^memory\.decode_tiles = {side} must be a multiple of 16 for this model"
        ):
            decode_in_tiles(model.decoder, side)
    with pytest.raises(ConfigError, match=r"^memory\.decode_tiles = 64 must be 0: a Linear has no tiles"):
        decode_in_tiles(torch.nn.Linear(1, 1), 64)


def test_an_evaluation_has_the_tiles_of_training(toy_config):
    options = dict(resolution=64, memory__decode_tiles=32)
    for config in (toy_config(**options), toy_config("evaluate", **options)):
        decoder = build_run(config).model.decoder
        assert decoder.use_tiling and decoder.tile_sample_min_size == 32
