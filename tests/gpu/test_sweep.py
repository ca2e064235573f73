"""The sweep, lean layers and forecasts on a GPU, against plain autograd, plain layers and the allocator."""

import pytest
import torch

from alignprop.engine.seeding import generator, generators
from alignprop.evaluation.judges import build_judges
from alignprop.memory.accounting import on_meta
from alignprop.memory.forecast import forecast
from alignprop.memory.lean import make_lean
from alignprop.method import estimators
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import build_sampler
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import resolve
from alignprop.trainer import AlignPropTrainer
from tests.gpu.conftest import ON_CPU
from tests.helpers.schedulers import guided, make_model

STEPS, BATCH, GUIDANCE = 4, 2, 3.0


@pytest.fixture
def model(pipeline_folder, device):
    model = make_model(pipeline_folder, torch.float64)
    for module in (model.denoiser, model.decoder, *model.text_encoders):
        module.to(device)
    model.device = device
    return model


def test_the_sweep_is_plain_autograd(model):
    sampler, cond = build_sampler(model.scheduler, STEPS), model.encode_prompts(["a cat", "two dogs"])
    parameters = [p for p in model.denoiser.parameters() if p.requires_grad]
    latents = model.init_latents(generators(range(BATCH), "x")).double()
    for i, t in enumerate(sampler.timesteps):
        output = guided(model, latents, t.to(latents.device), cond, GUIDANCE)
        latents = float(sampler.a[i]) * latents + float(sampler.b[i, i]) * output
    expected = torch.autograd.grad(latents.sin().sum(), parameters)
    rollout = Rollout(model, sampler, GUIDANCE)
    model.init_latents = lambda streams, own=model.init_latents: own(streams).double()
    rollout(generators(range(BATCH), "x"), cond, estimators.full(sampler, BATCH)).sin().sum().backward()
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_convolutions_have_the_gradient_of_plain_ones(device, dtype):
    torch.backends.cudnn.allow_tf32 = False
    layers = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.Conv2d(16, 8, 3, stride=2, padding=1))
    layers.to(device, dtype).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, generator=generator("x")).to(device, dtype)
    gradients = []
    for lean in (False, True):
        if lean:
            make_lean(layers)
        leaf = x.clone().requires_grad_()
        layers(leaf).square().sum().backward()
        gradients.append(leaf.grad.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()


@pytest.mark.parametrize("policy", ["lean", "balanced"])
def test_a_forecast_is_what_the_allocator_gives(toy_config, device, policy):
    """The bundled model, whose largest tensors are a few MiB: within a fifth, apart from cuBLAS's workspaces."""
    from config.align_prop import TINY

    options = dict(
        pretrained__model=str(TINY / "pipeline"), reward_fn="aesthetic", eval_reward_fn="", eval_diversity=False,
        estimator="full", memory_policy=policy, num_inference_steps=3, per_gpu_capacity=8, train__total_batch_size=8,
    )  # fmt: skip
    config = toy_config(**options)
    trainer, c = AlignPropTrainer(config), resolve(config, 1)
    model, judges = trainer.run.model, build_judges(c, None)
    trainer.step()
    if not ON_CPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.step()
    fresh = type(model).load(str(TINY / "pipeline"))
    planned = forecast(lambda: (on_meta(fresh), on_meta(judges)), c, policy, POLICIES[policy], 8).peak
    assert planned > 2**20
    if not ON_CPU:
        # One for each thread that calls it, and a backward pass has a thread of its own. Hopper's are of 32 MiB.
        workspaces = 2 * (32 if torch.cuda.get_device_capability()[0] >= 9 else 8.125) * 2**20
        assert planned + workspaces == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
