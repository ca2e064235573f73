"""Every estimator's sweep against its definition in plain autograd, and what of it must be zero."""

import inspect
import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import trainable_parameters
from alignprop.method import estimators
from alignprop.method.estimators import ESTIMATORS, build_estimator
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models.base import select
from tests.helpers.definitions import DEFINITIONS, Chain
from tests.helpers.schedulers import difference, guided, make_model

STEPS, BATCH, GUIDANCE = 8, 3, 3.0
PROMPTS = ["a cat", "two dogs", "a red circle"]
SET = {"first": 5, "minmax": (0, STEPS)}


def options_of(name):
    """Every option of an estimator, defaults included."""
    parameters = inspect.signature(ESTIMATORS[name]).parameters.values()
    return {p.name: SET.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def chain_of(kind, pipelines, dtype):
    """A model and a sampler: DDIM for either prediction, or the same network in a flow-matching chain."""
    model = make_model(pipelines["v_prediction" if kind == "v_prediction" else "epsilon"], dtype)
    init = model.init_latents
    model.init_latents = lambda gens: init(gens).to(dtype)
    if kind == "flow":
        return model, build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), STEPS)
    return model, build_sampler(model.scheduler, STEPS)


def reward(latents, sample):
    """[n, ...] -> their summed rewards; another function for each sample."""
    weights = torch.randn(latents.shape[1:], generator=generator("reward", sample), dtype=latents.dtype)
    return (weights * latents.sin()).sum()


def gradients(value, model):
    parameters = list(trainable_parameters(model.denoiser).values())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def by_definition(name, model, sampler, plan, **options):
    cond, total = model.encode_prompts(PROMPTS), 0
    for b, g in enumerate(generators(range(BATCH), "x")):
        own = select(cond, [b])
        start = model.init_latents([g])
        noises = torch.randn((plan.copies, *start.shape[1:]), generator=g).to(start)
        f = lambda x, i, own=own: guided(model, x, sampler.timesteps[i], own, GUIDANCE)  # noqa: E731
        chain = Chain(f, sampler, start, plan.select([b]), noises, **options)
        finals = torch.cat(DEFINITIONS[name](chain))
        total = total + reward(finals, b) / len(finals)
    return gradients(total, model)


def by_sweep(model, sampler, plan, **rollout):
    latents = Rollout(model, sampler, GUIDANCE, **rollout)(
        generators(range(BATCH), "x"), model.encode_prompts(PROMPTS), plan
    )
    finals = latents.unflatten(0, (BATCH, 1 + plan.copies))
    return gradients(sum(reward(x, b) / len(x) for b, x in enumerate(finals)), model)


def draw(name, sampler, seed=0):
    return build_estimator(name, **SET)(sampler, BATCH, generator("plan", seed))


# Each estimator with one kind of model: which of the two is nothing to its definition.
@pytest.mark.parametrize(("name", "kind"), zip(ESTIMATORS, itertools.cycle(["v_prediction", "flow"])))
def test_the_sweep_is_the_definition(pipelines, name, kind):
    model, sampler = chain_of(kind, pipelines, torch.float64)
    plan = draw(name, sampler)
    expected = by_definition(name, model, sampler, plan, **options_of(name))
    assert expected.norm() > 0
    assert difference(by_sweep(model, sampler, plan), expected) <= 1e-11


@pytest.mark.parametrize("name", ["full", "draft_lv", "bridge", "lagrange"])
def test_the_sweep_is_the_definition_in_float32(pipelines, name):
    model, sampler = chain_of("flow", pipelines, torch.float32)
    plan = draw(name, sampler)
    expected = by_definition(name, model, sampler, plan, **options_of(name))
    assert difference(by_sweep(model, sampler, plan), expected) <= 1e-5


@pytest.mark.parametrize("name", ["sparse", "bridge", "lagrange", "leapalign", "drtune", "refl", "draft_lv"])
def test_the_gradient_is_none_of_full(pipelines, name):
    """The definitions differ: a plan that was silently exact would pass its own proof by accident."""
    model, sampler = chain_of("flow", pipelines, torch.float64)
    exact = by_sweep(model, sampler, estimators.full(sampler, BATCH))
    assert difference(by_sweep(model, sampler, draw(name, sampler)), exact) > 0.01


@pytest.mark.parametrize("name", ["drtune", "sparse"])
def test_no_gradient_passes_a_detached_input(pipelines, name):
    """Without couplings the gradient is a sum over steps: none of another step's Jacobian is in it."""
    model, sampler = chain_of("v_prediction", pipelines, torch.float64)
    plan = draw(name, sampler)
    assert not plan.coupling.any()
    assert not Rollout(model, sampler, GUIDANCE).network_calls(plan)[1].any()


def test_steps_past_the_exit_are_not_called(pipelines):
    model, sampler = chain_of("v_prediction", pipelines, torch.float64)
    plan, calls, predict = draw("refl", sampler), [], model.predict
    model.predict = lambda x, t, c: calls.append((int(t), len(x) // 2)) or predict(x, t, c)
    with torch.no_grad():
        Rollout(model, sampler, GUIDANCE)(generators(range(BATCH), "x"), model.encode_prompts(PROMPTS), None)
    assert sum(rows for _, rows in calls) == STEPS * BATCH  # without a plan nobody leaves
    calls.clear()
    by_sweep(model, sampler, plan)
    # Each sample is called once for every step up to its exit, and once more there, with gradient.
    assert sum(rows for _, rows in calls) == int((plan.exit_step + 2).sum())


@pytest.mark.parametrize("name", ["refl", "drtune"])
def test_later_noise_does_not_reach_a_sample_that_has_left(pipelines, name):
    model, _ = chain_of("epsilon", pipelines, torch.float64)
    sampler = build_sampler(model.scheduler, STEPS, eta=1.0)
    plan = draw(name, sampler)
    first = plan.exit_step.argmin()
    generators_of = generators(range(BATCH), "x")
    rollout = Rollout(model, sampler, GUIDANCE)
    together = rollout(generators_of, model.encode_prompts(PROMPTS), plan)[first]
    alone = rollout(generators([first], "x"), model.encode_prompts([PROMPTS[first]]), plan.select([int(first)]))[0]
    assert difference(together, alone) <= 1e-12


@pytest.mark.parametrize(("name", "sweep_chunk", "keep_steps"), [
    ("draft_lv", 2, 0), ("refl", 2, 99), ("bridge", 0, 3), ("lagrange", 2, 99),
])  # fmt: skip
def test_memory_policies_change_nothing(pipelines, name, sweep_chunk, keep_steps):
    from alignprop.settings.memory_policies import MemoryPolicy

    model, sampler = chain_of("v_prediction", pipelines, torch.float64)
    plan = draw(name, sampler)
    memory = MemoryPolicy(sweep_chunk=sweep_chunk, keep_steps=keep_steps)
    expected = by_sweep(model, sampler, plan)
    assert difference(by_sweep(model, sampler, plan, memory=memory), expected) <= 1e-12
