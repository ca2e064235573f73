"""Training on a GPU: precisions, memory policies, running out of memory, compiled blocks."""

import pytest
import torch
from accelerate.state import AcceleratorState

from alignprop.engine.activations import KeptOnHost
from alignprop.engine.seeding import generator
from alignprop.memory.gpus import measure
from alignprop.memory.planner import Choice
from alignprop.models import packed
from alignprop.settings.memory_policies import POLICIES
from alignprop.trainer import AlignPropTrainer
from alignprop.trial import use_policy_that_fits
from tests.gpu.conftest import ON_CPU
from tests.helpers.training import rows, train

pytestmark = pytest.mark.usefixtures("device")


def gradient(trainer) -> torch.Tensor:
    """∂loss/∂θ of a micro-batch through all steps, with an adapter that changes the pictures; on the CPU."""
    for parameter in trainer.weights.parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator("w", parameter.numel())) * 0.3)
    (indices, *_) = trainer.micro_batches()
    plan = trainer.estimator(trainer.run.rollout.sampler, 4, generator("plan"))
    trainer.add_gradients((0, 0), indices, plan.select(indices))
    found = torch.cat([p.grad.flatten() for p in trainer.weights.parameters]).cpu()
    trainer.weights.zero_grad()
    return found


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def test_the_run_is_where_it_should_be(toy_config, device):
    trainer = AlignPropTrainer(toy_config(memory_policy="fast"))
    assert trainer.run.accelerator.device.type == device.type
    assert {p.device.type for p in trainer.weights.parameters} == {device.type}


def test_every_policy_has_the_same_gradient(toy_config):
    """Also where modules come and go over the bus, from pinned memory."""
    options = dict(estimator="full", eval_reward_fn="", eval_diversity=False, allow_tf32=False)
    expected = gradient(AlignPropTrainer(toy_config(run_name="fast", memory_policy="fast", **options)))
    assert expected.norm() > 0
    for policy in ("roomy", "lean", "balanced", "small", "smallest"):
        trainer = AlignPropTrainer(toy_config(run_name=policy, memory_policy=policy, **options))
        assert relative(gradient(trainer), expected) < 1e-4, policy


def test_modules_that_leave_come_back_as_they_were(toy_config, device):
    trainer = AlignPropTrainer(toy_config(memory_policy="small", allow_tf32=False))
    first = gradient(trainer)
    assert relative(gradient(trainer), first) < 1e-5  # kernels of a GPU may sum in another order
    trainer.run.residency.leave()
    frozen = [p for p in trainer.run.model.denoiser.parameters() if not p.requires_grad]
    assert {p.device.type for p in frozen} == {"cpu"} and (ON_CPU or all(p.is_pinned() for p in frozen))


@pytest.mark.parametrize("name", ["", "int8", "fp8", "int4", "nf4"])
def test_weights_that_stream_and_packed_weights(toy_config, monkeypatch, name):
    """Streaming changes no bit; a format's gradient is near that of float32."""
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(packed, "NARROWEST", 8)
    options = dict(estimator="full", eval_reward_fn="", eval_diversity=False, allow_tf32=False)
    expected = gradient(AlignPropTrainer(toy_config(run_name="plain", memory_policy="smallest", **options)))
    resident, streaming = (
        gradient(AlignPropTrainer(toy_config(run_name=p, memory_policy=p, pretrained__quantize=name, **options)))
        for p in ("smallest", "streaming")
    )
    assert relative(streaming, resident) < 1e-5  # kernels of a GPU may sum in another order
    assert relative(resident, expected) < {"": 1e-5, "int8": 0.02, "fp8": 0.15, "int4": 0.3, "nf4": 0.3}[name]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_products_in_8_bits(toy_config, monkeypatch, name):
    monkeypatch.setattr(packed, "NARROWEST", 8)
    options = dict(estimator="full", memory_policy="lean", allow_tf32=False, pretrained__quantize=name)
    plain, ours = (
        gradient(AlignPropTrainer(toy_config(run_name=str(on), pretrained__quantize_products=on, **options)))
        for on in (False, True)
    )
    assert 0 < relative(ours, plain) < 0.2


def test_activations_of_the_decode_wait_on_the_host(toy_config, monkeypatch):
    copied, to_host = [], KeptOnHost._to_host
    monkeypatch.setattr(KeptOnHost, "_to_host", staticmethod(lambda t: copied.append(t) or to_host(t)))
    device, host = (
        gradient(AlignPropTrainer(toy_config(run_name=w, memory_policy="balanced", memory__decode_activations=w)))
        for w in ("device", "host")
    )
    assert relative(host, device) < 1e-5  # kernels of a GPU may sum in another order
    assert ON_CPU or copied


def test_this_gpu_is_measured(device):
    found = measure(device, 1.0, torch.float32)
    assert found.flops > 1e9 and found.bus > 1e8


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(toy_config, precision):
    if ON_CPU and precision == "fp16":
        pytest.skip("mixed_precision = 'fp16' is refused on a CPU")
    expected = AlignPropTrainer(toy_config(run_name="exact", memory_policy="lean")).step()
    AcceleratorState._reset_state()  # it keeps one precision for a whole process
    trainer = AlignPropTrainer(toy_config(mixed_precision=precision, memory_policy="lean"))
    ours = trainer.step()
    assert ours["skipped_steps"] == 0 and ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    # Loss scaling must not show in what is logged.
    assert ours["adjoint_norm"][-1] == pytest.approx(expected["adjoint_norm"][-1], rel=0.05)
    assert (trainer.run.accelerator.scaler is not None) == (precision == "fp16")


def test_a_gradient_that_overflows_is_skipped_and_lowers_the_loss_scale(toy_config):
    if ON_CPU:
        pytest.skip("loss scaling is of fp16, which is refused on a CPU")
    trainer = AlignPropTrainer(toy_config(mixed_precision="fp16", memory_policy="lean", train__loss_coeff=1e6))
    before = trainer.run.accelerator.scaler.get_scale()
    trainer.step()
    assert trainer.weights.skipped == 1 and trainer.run.accelerator.scaler.get_scale() < before


def test_the_optimizer_is_fused(toy_config):
    trainer = AlignPropTrainer(toy_config(memory_policy="fast"))
    fused = trainer.weights.optimizer.param_groups[0]["fused"]
    assert fused is (None if ON_CPU else True)
    trainer.step()


def test_compiled_blocks_have_the_same_gradient(toy_config):
    options = dict(estimator="full", eval_reward_fn="", eval_diversity=False, memory_policy="lean", allow_tf32=False)
    expected = gradient(AlignPropTrainer(toy_config(run_name="plain", **options)))
    compiled = AlignPropTrainer(toy_config(run_name="compiled", compile=True, **options))
    assert relative(gradient(compiled), expected) < 1e-3


@pytest.mark.parametrize("policy", ["fast", "lean"])
def test_channels_last_has_the_same_gradient(toy_config, policy):
    options = dict(estimator="full", eval_reward_fn="", eval_diversity=False, memory_policy=policy, allow_tf32=False)
    plain, last = (
        gradient(AlignPropTrainer(toy_config(run_name=f"c{flag}", channels_last=flag, **options)))
        for flag in (False, True)
    )
    assert relative(last, plain) < 1e-4


def test_out_of_memory_takes_the_next_policy(toy_config, capsys):
    """A real error of the allocator, in the trial step."""
    if ON_CPU:
        pytest.skip("a CPU has no limit to run into")
    trainer = AlignPropTrainer(toy_config(memory_policy="auto", per_gpu_capacity=4))
    trainer.run.use(Choice("fast", POLICIES["fast"], 4))
    (reward,) = trainer.run.reward.terms.values()
    own, total = reward.function, torch.cuda.mem_get_info()[1]

    def hungry(images, prompts, metadata):
        """Needs a GiB for each picture that is scored at once."""
        needed = torch.zeros(len(images), 2**28, device=images.device)
        return own(images, prompts, metadata) + needed[:, 0]

    reward.function = hungry
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.5 * 2**30) / total)
    use_policy_that_fits(trainer.run, trainer.weights, trainer.try_memory)
    assert trainer.run.choice.policy == "balanced" and trainer.run.choice.memory.decode_chunk == 1
    assert "'fast' with 4 samples does not fit" in capsys.readouterr().out
    assert trainer.step()["skipped_steps"] == 0


def test_a_run_continues_as_if_nothing_had_been(toy_config):
    options = dict(memory_policy="lean", num_epochs=2, allow_tf32=False)
    whole = train(toy_config(run_name="whole", **options))
    train(toy_config(run_name="parts", **options | {"num_epochs": 1}))
    parts = train(toy_config(run_name="parts", resume_from="latest", **options))
    losses = [[row["loss"] for row in rows(trainer, "train")] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
