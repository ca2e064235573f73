"""The sweep against plain autograd through the same chain of a UNet, and the absence of gradient."""

import pytest
import torch
from diffusers import DDIMScheduler

from alignprop.engine.seeding import generator, generators
from alignprop.lora.factors import trainable_parameters
from alignprop.method import estimators
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.models.sd import StableDiffusion
from alignprop.settings.memory_policies import MemoryPolicy
from tests.helpers.schedulers import difference, gradients_of, guided, make_model, reward

STEPS, BATCH = 6, 3
CHAIN = build_sampler(DDIMScheduler(), STEPS)
PLANS = {
    "full": estimators.full(CHAIN, BATCH),
    "truncated K=1": estimators.truncated(CHAIN, BATCH, first=STEPS - 1),
    "truncated K=5": estimators.truncated(CHAIN, BATCH, first=STEPS - 5),
    "randomized": estimators.randomized(CHAIN, BATCH, generator("r"), minmax=(0, STEPS)),
    "per_step": estimators.per_step(CHAIN, BATCH, generator("p"), minmax=(0, STEPS)),
}


def autograd_gradients(model, plan, guidance_scale, eta, dtype):
    """The definition: `scheduler.step` in a loop, a detached network output at every inactive step and sample."""
    ddim = DDIMScheduler.from_config(model.scheduler.config)
    ddim.set_timesteps(STEPS)
    gens = generators(range(BATCH), "x")
    cond = model.encode_prompts(["a cat", "two dogs", "a red circle"])
    latents = model.init_latents(gens).to(dtype)
    for i, t in enumerate(ddim.timesteps):
        output = guided(model, latents, t, cond, guidance_scale)
        active = plan.active[i].view(-1, 1, 1, 1)
        output = torch.where(active, output, output.detach())
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in gens]).to(dtype) if eta else None
        latents = ddim.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
    return latents, gradients_of(reward(latents), model)


def sweep_gradients(model, plan, guidance_scale, eta, dtype, **options):
    model_init = model.init_latents
    model.init_latents = lambda gens: model_init(gens).to(dtype)
    rollout = Rollout(model, build_sampler(model.scheduler, STEPS, eta), guidance_scale, **options)
    cond = model.encode_prompts(["a cat", "two dogs", "a red circle"])
    latents = rollout(generators(range(BATCH), "x"), cond, plan)
    model.init_latents = model_init
    return latents, gradients_of(reward(latents), model)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("prediction_type", "eta", "guidance_scale"), [
    ("epsilon", 0.0, 5.0), ("v_prediction", 0.0, 5.0), ("epsilon", 1.0, 5.0), ("v_prediction", 1.0, 1.0),
    ("epsilon", 0.0, 1.0),
])  # fmt: skip
def test_sweep_is_exact_in_float64(pipelines, plan, prediction_type, eta, guidance_scale):
    model = make_model(pipelines[prediction_type], torch.float64)
    arguments = (model, PLANS[plan], guidance_scale, eta, torch.float64)
    expected_latents, expected = autograd_gradients(*arguments)
    latents, ours = sweep_gradients(*arguments)
    assert difference(latents, expected_latents) <= 1e-12
    assert expected.norm() > 0
    assert difference(ours, expected) <= 1e-10


@pytest.mark.parametrize("plan", PLANS)
def test_sweep_in_float32(pipelines, plan):
    model = make_model(pipelines["epsilon"], torch.float32)
    arguments = (model, PLANS[plan], 5.0, 0.0, torch.float32)
    assert difference(sweep_gradients(*arguments)[1], autograd_gradients(*arguments)[1]) <= 1e-5


def test_inactive_steps_give_exactly_no_gradient(pipelines):
    model = make_model(pipelines["epsilon"], torch.float32)
    plan = GradientPlan.exact(torch.zeros(STEPS, BATCH, dtype=torch.bool))
    latents, gradients = sweep_gradients(model, plan, 5.0, 0.0, torch.float32)
    assert latents.requires_grad and not gradients.any()


def test_an_inactive_step_is_not_called_again(pipelines):
    """A step without gradient costs nothing in the sweep: no network call, no samples of other rows."""
    model = make_model(pipelines["epsilon"], torch.float32)
    calls = []
    predict = model.predict
    model.predict = lambda x, t, c: calls.append((torch.is_grad_enabled(), len(x) // 2)) or predict(x, t, c)
    active = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    active[4, 1] = active[3] = True
    sweep_gradients(model, GradientPlan.exact(active), 5.0, 0.0, torch.float32)
    assert [rows for with_grad, rows in calls if with_grad] == [1, BATCH]
    assert len(calls) == STEPS + 2


def test_calls_that_only_other_processes_need_change_nothing(pipelines, monkeypatch):
    """Spread over processes, the network is called by all of them where one needs it, and so is ∂f/∂x."""
    model = make_model(pipelines["epsilon"], torch.float64)
    active = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    active[2, 0] = active[4, 1] = active[5, 1] = True
    plans = [GradientPlan.exact(active), GradientPlan.exact(active, weight=active.double())]
    expected = [sweep_gradients(model, plan, 5.0, 0.0, torch.float64)[1] for plan in plans]
    everywhere = torch.ones(2, STEPS, dtype=torch.bool)
    monkeypatch.setattr(Rollout, "network_calls", lambda self, plan: everywhere)
    calls, predict = [], model.predict
    model.predict = lambda x, t, c: calls.append(torch.is_grad_enabled()) or predict(x, t, c)
    ours = [sweep_gradients(model, plan, 5.0, 0.0, torch.float64)[1] for plan in plans]
    assert sum(calls) == 2 * STEPS and expected[0].norm() > 0
    assert max(map(difference, ours, expected)) <= 1e-13


def test_weight_and_coupling_follow_their_definition(pipelines):
    """w scales a step's gradient and γ its share of λ; γ·f(x) + (1-γ)·f(x detached) is their autograd."""
    model = make_model(pipelines["epsilon"], torch.float64)
    draw = lambda name: 0.5 + torch.rand(STEPS, BATCH, generator=generator(name), dtype=torch.float64)  # noqa: E731
    plan = GradientPlan.exact(PLANS["per_step"].active, coupling=draw("coupling"), weight=draw("weight"))
    sampler = build_sampler(model.scheduler, STEPS)
    cond = model.encode_prompts(["a cat", "two dogs", "a red circle"])
    latents = model.init_latents(generators(range(BATCH), "x")).double()
    parameters = trainable_parameters(model.denoiser)
    for i, t in enumerate(sampler.timesteps):
        active, w, gamma = (v[i].view(-1, 1, 1, 1) for v in (plan.active, plan.weight, plan.coupling))
        for p in parameters.values():
            p.requires_grad_(False)
        through_x = guided(model, latents, t, cond, 5.0)
        for p in parameters.values():
            p.requires_grad_(True)
        through_theta = guided(model, latents.detach(), t, cond, 5.0)
        value = through_x.detach()
        output = value + active * (gamma * (through_x - value) + w * (through_theta - value))
        latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * output
    expected = gradients_of(reward(latents), model)
    ours = sweep_gradients(model, plan, 5.0, 0.0, torch.float64)[1]
    assert difference(ours, expected) <= 1e-10


# Every pair of values of two of the settings.
@pytest.mark.parametrize(("sweep_chunk", "keep_steps", "plan"), [
    (chunk, keep, ("full", "truncated K=1", "randomized")[(row + column) % 3])
    for row, chunk in enumerate((1, 2, 0)) for column, keep in enumerate((0, 1, 3, 99))
])  # fmt: skip
def test_chunks_and_kept_graphs_change_nothing(pipelines, plan, keep_steps, sweep_chunk):
    model, arguments = make_model(pipelines["epsilon"], torch.float64), (PLANS[plan], 5.0, 1.0, torch.float64)
    expected_latents, expected = sweep_gradients(model, *arguments)
    memory = MemoryPolicy(sweep_chunk=sweep_chunk, keep_steps=keep_steps)
    latents, gradients = sweep_gradients(model, *arguments, memory=memory)
    assert difference(latents, expected_latents) <= 1e-13
    assert difference(gradients, expected) <= 1e-12


def test_a_kept_graph_is_not_called_again(pipelines):
    """With one sample in a chunk each network call is made once where its graph is kept, else twice."""
    model = make_model(pipelines["epsilon"], torch.float64)
    calls, predict = [], model.predict
    model.predict = lambda x, t, c: calls.append(torch.is_grad_enabled()) or predict(x, t, c)
    memory = MemoryPolicy(sweep_chunk=1, keep_steps=2)
    sweep_gradients(model, PLANS["truncated K=5"], 5.0, 0.0, torch.float64, memory=memory)
    assert len(calls) == BATCH * (STEPS + 3) and sum(calls) == BATCH * 5


def test_gradient_checkpointing_changes_nothing(pipelines):
    model = make_model(pipelines["epsilon"], torch.float64)
    expected = sweep_gradients(model, PLANS["full"], 5.0, 0.0, torch.float64)[1]
    model.denoiser.enable_gradient_checkpointing()
    assert difference(sweep_gradients(model, PLANS["full"], 5.0, 0.0, torch.float64)[1], expected) <= 1e-13


def test_without_gradient_the_rollout_is_the_plain_pipeline(pipelines):
    from diffusers import StableDiffusionPipeline

    model = StableDiffusion.load(str(pipelines["epsilon"]))
    rollout = Rollout(model, build_sampler(model.scheduler, STEPS), guidance_scale=5.0)
    prompts = ["a cat", "two dogs"]
    with torch.no_grad():
        images = model.decode(rollout(generators(range(2), "x"), model.encode_prompts(prompts), None))
    plain = StableDiffusionPipeline.from_pretrained(pipelines["epsilon"], safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    latents = model.init_latents(generators(range(2), "x"))
    expected = plain(prompts, latents=latents, num_inference_steps=STEPS, guidance_scale=5.0, output_type="pt").images
    assert (images - expected).abs().max() <= 1e-5


def test_half_precision_calls_leave_the_chain_in_float32(pipelines):
    model = make_model(pipelines["epsilon"], torch.float32)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    options = {"autocast": autocast, "memory": MemoryPolicy(guidance_batching="split")}
    half, gradients = sweep_gradients(model, PLANS["full"], 5.0, 0.0, torch.float32, **options)
    exact, expected = sweep_gradients(model, PLANS["full"], 5.0, 0.0, torch.float32)
    sampler, cond = build_sampler(model.scheduler, STEPS), model.encode_prompts(["a cat", "two dogs", "a red circle"])
    latents = model.init_latents(generators(range(BATCH), "x"))
    with torch.no_grad(), autocast():
        for i, t in enumerate(sampler.timesteps):
            outputs = [model.predict(latents, t, branch) for branch in model.branches(cond, 5.0)]
            assert all(output.dtype == torch.bfloat16 for output in outputs)
            unconditional, conditional = (output.float() for output in outputs)
            model_output = unconditional + 5.0 * (conditional - unconditional)
            latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * model_output
    assert torch.equal(half, latents)
    assert half.dtype == gradients.dtype == torch.float32
    assert 0 < difference(half, exact) < 0.05
    assert torch.cosine_similarity(gradients, expected, dim=0) > 0.95


# ---- a second backward pass


def rolled_out(model, memory=None, estimator="full"):
    rollout = Rollout(model, build_sampler(model.scheduler, STEPS), 3.0, memory=memory)
    plan = PLANS["full"] if estimator == "full" else estimators.draft_lv(CHAIN, BATCH)
    cond = model.encode_prompts(["a cat", "two dogs", "a red circle"])
    return rollout(generators(range(BATCH), "x"), cond, plan)


def backward_gradients(model, backward):
    parameters = list(trainable_parameters(model.denoiser).values())
    for parameter in parameters:
        parameter.grad = None
    backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def test_a_second_backward_pass_raises_as_autograds_does(pipeline_folder):
    model = make_model(pipeline_folder, torch.float32)
    latents = rolled_out(model)
    reward(latents).backward()
    with pytest.raises(RuntimeError, match=r"has freed its latents; pass retain_graph=True"):
        reward(latents).backward()


@pytest.mark.parametrize(("estimator", "memory"), [
    ("full", MemoryPolicy()), ("full", MemoryPolicy(keep_steps=2)), ("full", MemoryPolicy(sweep_chunk=2)),
    ("draft_lv", MemoryPolicy()),
])  # fmt: skip
def test_with_a_retained_graph_the_second_is_the_first_once_more(pipeline_folder, estimator, memory):
    model = make_model(pipeline_folder, torch.float64)
    latents = rolled_out(model, memory, estimator)
    first = backward_gradients(model, lambda: reward(latents).backward(retain_graph=True))
    assert first.norm() > 0
    second = backward_gradients(model, lambda: reward(latents).backward())
    torch.testing.assert_close(second, first, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="has freed its latents"):
        reward(latents).backward()
