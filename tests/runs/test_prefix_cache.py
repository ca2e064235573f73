"""The prefix cache: what it predicts, the gradient, which is exact at the visited latents, and where it is refused."""

import json

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from alignprop.build import build_run
from alignprop.engine.seeding import generator, generators
from alignprop.method.estimators import build_estimator
from alignprop.method.plans import GradientPlan
from alignprop.method.prefix_cache import FULL_CALLS, PrefixCache, blocks_of, build_prefix_cache, is_full
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models import FAMILIES
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import MemoryPolicy
from alignprop.settings.warnings import warnings_for
from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from scripts.bench.families import PROMPTS, load, plain_pipeline
from tests.helpers.schedulers import by_sweep, difference, gradients_of, guided, make_model, reward
from tests.helpers.tiny_pipelines import make_family

STEPS, BATCH, GUIDANCE = 9, 2, 1.5


@pytest.fixture
def model(pipeline_folder):
    model = make_model(pipeline_folder, torch.float64)
    init = model.init_latents
    model.init_latents = lambda streams: init(streams).double()
    return model


def no_gradient(steps, samples):
    """A plan in which no step is active, so that all calls are in the prefix."""
    return GradientPlan.exact(torch.zeros(steps, samples, dtype=torch.bool))


def sample(model, interval, order, plan=None, steps=STEPS, **options):
    """The final latents, and the trajectory. All calls are in the prefix unless there is a plan."""
    sampler = build_sampler(model.scheduler, steps, 0.0)
    plan = plan or no_gradient(steps, BATCH)
    cache = build_prefix_cache(model.denoiser, interval, order)
    rollout = Rollout(model, sampler, GUIDANCE, prefix_cache=cache, **options)
    cond = model.encode_prompts(["a cat", "two dogs"])
    return rollout.sample(generators(range(BATCH), "x"), cond, plan, rollout.network_calls(plan))


class Predicted:
    """A block whose output is, in some calls, on the line through its outputs in the last two full calls before."""

    def __init__(self, block, interval):
        self.forward, self.interval, self.calls, self.known = block.forward, interval, 0, []
        block.forward = self

    def __call__(self, *args, **kwargs):
        now, self.calls = self.calls, self.calls + 1
        if is_full(now, self.interval):
            self.known = [*self.known[-1:], (now, self.forward(*args, **kwargs))]
            return self.known[-1][1]
        (before, one), (last, two) = self.known
        return two + (two - one) / (last - before) * (now - last)


@pytest.mark.parametrize("interval", [2, 3])
def test_blocks_are_predicted_on_the_line_through_the_last_two_full_calls(model, interval):
    ours, _ = sample(model, interval, 1)
    plain, _ = sample(model, 1, 1)
    blocks = [model.denoiser.get_submodule(name) for name in blocks_of(model.denoiser)]
    assert len(blocks) > 5
    predicted = [Predicted(block, interval) for block in blocks]
    expected, _ = sample(model, 1, 1)
    assert predicted[0].calls == STEPS
    assert difference(ours, expected) < 1e-10 < 1e-5 < difference(ours, plain)


def test_it_is_that_of_diffusers_pipeline(tmp_path):
    """FLUX's pipeline with `enable_cache`, which is how a person uses it there."""
    folder = make_family(tmp_path / "flux", "flux")
    flux, pipeline = load("flux", folder), plain_pipeline("flux", folder)
    sampler = build_sampler(flux.scheduler, STEPS, 0.0, **flux.schedule(STEPS))
    rollout = Rollout(flux, sampler, 3.5, prefix_cache=PrefixCache(flux.denoiser, 2, 1))
    plan = no_gradient(STEPS, BATCH)
    cond = flux.encode_prompts(PROMPTS)
    latents, _ = rollout.sample(generators(range(BATCH), "x"), cond, plan, rollout.network_calls(plan))
    settings = dict(height=16, width=16, guidance_scale=3.5, num_inference_steps=STEPS, output_type="pt")
    pictures = [pipeline(prompt=list(PROMPTS), generator=generators(range(2), "x"), **settings).images]
    pipeline.transformer.enable_cache(TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=FULL_CALLS, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=blocks_of(flux.denoiser),
    ))  # fmt: skip
    pictures.append(pipeline(prompt=list(PROMPTS), generator=generators(range(2), "x"), **settings).images)
    with torch.no_grad():
        torch.testing.assert_close(flux.decode(latents), pictures[1], rtol=0, atol=2e-6)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_blocks_that_are_predicted(tmp_path, family):
    """In a predicted call none of them runs; of the whole network little is left."""
    model = load(family, make_family(tmp_path / family, family))
    ran = []
    blocks = [model.denoiser.get_submodule(name) for name in blocks_of(model.denoiser)]
    for block in blocks:
        block.forward = lambda *args, forward=block.forward, **kwargs: ran.append(1) or forward(*args, **kwargs)
    f = Rollout(model, build_sampler(model.scheduler, 3, 0.0, **model.schedule(3)), 1.5).f
    f.cache = PrefixCache(model.denoiser, 2, 1)
    latents, cond, counts = model.init_latents(generators(range(1), "x")), model.encode_prompts(["a cat"]), []
    with torch.no_grad(), f.cache.on():
        for _ in range(FULL_CALLS + 1):
            ran.clear()
            f(latents, model.scheduler.timesteps[0], cond)
            counts.append(len(ran))
    assert counts == [len(blocks)] * FULL_CALLS + [0] and blocks


@pytest.mark.parametrize("keep_steps", [0, 2])
def test_the_gradient_is_exact_at_the_latents_that_are_visited(model, keep_steps):
    first = 6
    sampler = build_sampler(model.scheduler, STEPS, 0.0)
    plan = build_estimator("truncated", first=first)(sampler, BATCH, generator("plan"))
    _, trajectory = sample(model, 2, 1, plan)
    latents, cond = trajectory.stored[first], model.encode_prompts(["a cat", "two dogs"])
    for i in range(first, STEPS):
        output = guided(model, latents, sampler.timesteps[i], cond, GUIDANCE)
        latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * output
    expected = gradients_of(reward(latents), model)
    cache, memory = PrefixCache(model.denoiser, 2, 1), MemoryPolicy(keep_steps=keep_steps)
    finals, ours = by_sweep(model, sampler, plan, torch.float64, prefix_cache=cache, memory=memory)
    assert difference(finals, latents) < 1e-10 and difference(ours, expected) < 1e-10
    assert difference(finals, by_sweep(model, sampler, plan, torch.float64)[0]) > 1e-6


def test_branches_of_guidance_have_caches_of_their_own(model):
    split, joint = (sample(model, 2, 1, memory=MemoryPolicy(guidance_batching=name))[0] for name in ("split", "joint"))
    assert difference(split, joint) < 1e-10


def test_where_guidance_begins_or_ends_the_cache_starts_anew(model):
    """16 calls: 5 without guidance, 6 with and 5 without; each part has its own full calls."""
    options = {"guidance_interval": (0.3, 0.7), "steps": 16}
    ours, _ = sample(model, 2, 1, **options)
    plain, _ = sample(model, 1, 1, **options)
    blocks = [Predicted(model.denoiser.get_submodule(name), 2) for name in blocks_of(model.denoiser)]
    starts, predict = [], model.predict

    def anew_in_each_part(latents, t, branch):
        if not starts or starts[-1] != len(latents):
            for block in blocks:
                block.calls, block.known = 0, []
            starts.append(len(latents))
        return predict(latents, t, branch)

    model.predict = anew_in_each_part
    expected, _ = sample(model, 1, 1, **options)
    assert starts == [BATCH, 2 * BATCH, BATCH]
    assert difference(ours, expected) < 1e-10 < 1e-5 < difference(ours, plain)


@pytest.mark.parametrize("memory", [MemoryPolicy(sweep_chunk=1), MemoryPolicy(keep_steps=2)])
def test_the_division_of_the_batch_changes_nothing(model, memory):
    """Samples with first steps of their own: all have the prefix of the batch, also one by one."""
    active = torch.arange(STEPS)[:, None] >= torch.tensor([7, 5])
    plan, sampler = GradientPlan.exact(active), build_sampler(model.scheduler, STEPS, 0.0)
    assert [plan.select(rows).steps_before_gradient for rows in (slice(0, 1), slice(1, 2))] == [5, 5]
    cache = PrefixCache(model.denoiser, 2, 1)
    whole = by_sweep(model, sampler, plan, torch.float64, prefix_cache=cache)
    parts = by_sweep(model, sampler, plan, torch.float64, prefix_cache=cache, memory=memory)
    assert difference(parts[0], whole[0]) < 1e-10 and difference(parts[1], whole[1]) < 1e-10


def test_the_denoiser_is_afterwards_what_it_was(model):
    x, t, cond = torch.randn(2, 4, 8, 8).double(), torch.tensor(400), model.encode_prompts(["a cat", "two dogs"])
    before = guided(model, x, t, cond, GUIDANCE)
    with pytest.raises(KeyError), PrefixCache(model.denoiser, 2, 1).on():
        raise KeyError
    sample(model, 2, 1)
    assert torch.equal(guided(model, x, t, cond, GUIDANCE), before)
    assert torch.equal(sample(model, 2, 1)[0], sample(model, 2, 1)[0])  # each rollout starts with an empty cache


# ---- in a run


def test_a_run_uses_it_in_training_alone(toy_config):
    fields = dict(num_inference_steps=8, estimator="truncated", num_epochs=1)
    rewards = []
    for interval in (1, 2):
        config = toy_config(run_name=f"r{interval}", train__prefix_cache=interval, **fields)
        trainer = AlignPropTrainer(config)
        trainer.train()
        rows = list(map(json.loads, (trainer.run.folder / "metrics.jsonl").read_text().splitlines()))
        rewards.append({kind: [row["reward"] for row in rows if row["kind"] == kind] for kind in ("train", "eval")})
    assert rewards[0]["eval"][0] == rewards[1]["eval"][0]
    assert rewards[0]["train"][0] != rewards[1]["train"][0] == pytest.approx(rewards[0]["train"][0], rel=0.05)
    assert build_run(toy_config("tiny_evaluate", run_name="e")).rollout.prefix_cache is None


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_inference_steps": 4, "estimator": "truncated"}, "= 2 must be 1 here: 3 of the 4 network calls of the first"),
    ({"sampler": "LCM", "num_inference_steps": 3, "estimator": "truncated"}, "must be 1 here: 2 of the 3"),
    ({"estimator": "randomized"}, r"must be 1 here: \d of the 8 network calls"),
    ({"compile": True}, "train.prefix_cache = 2 needs compile = False"),
])  # fmt: skip
def test_where_it_cannot_act_it_is_refused(toy_config, fields, message):
    options = {"num_inference_steps": 8, "train.total_batch_size": 16, "train.total_samples_per_epoch": 16}
    with pytest.raises(ConfigError, match=message):
        AlignPropTrainer(toy_config(**{"train.prefix_cache": 2, **options, **fields}))


def test_where_it_does_nothing_it_says_so():
    config = get_config("quickstart")
    config.update_from_flattened_dict({"estimator": "full", "train.prefix_cache": 2})
    fields = ["train.prefix_cache", "train.prefix_cache_order"]
    assert warnings_for(config, fields) == ["train.prefix_cache has no effect: it needs an estimator other than 'full'"]
    config.update_from_flattened_dict({"train.prefix_cache": 1})
    assert "train.prefix_cache_order has no effect: it needs train.prefix_cache > 1" in warnings_for(config, fields)
