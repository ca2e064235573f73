"""What is on the device in which phase, and layers that compute their activations again."""

import torch
from torch import nn

from alignprop.engine.seeding import generators
from alignprop.memory.checkpointing import checkpoint_layers
from alignprop.memory.residency import Residency
from alignprop.models.sd import StableDiffusion

PHASES = ("encode", "denoise", "decode", "measure")


class Stage:
    """A linear layer for each phase. With `copy`, the host's own memory takes the part of the device."""

    def __init__(self, residency):
        self.modules = {phase: nn.Linear(2, 2).requires_grad_(False) for phase in PHASES}
        self.on_host = {phase: module.weight.data_ptr() for phase, module in self.modules.items()}
        phases = {phase: [module] for phase, module in self.modules.items()}
        self.residency = Residency(torch.device("cpu"), phases, residency, copy=True)

    def on_device(self):
        return [p for p, module in self.modules.items() if module.weight.data_ptr() != self.on_host[p]]


def test_those_that_are_seldom_used_come_and_go():
    stage = Stage("all")
    for phase, there in (("encode", ["encode"]), ("denoise", []), ("measure", ["measure"]), ("decode", [])):
        with stage.residency(phase):
            pass
        assert stage.on_device() == there


def test_by_phase_only_the_modules_in_use_are_there():
    stage = Stage("phase")
    for phase in ("decode", "denoise", "encode", "denoise", "measure"):
        with stage.residency(phase):
            pass
        assert stage.on_device() == [phase]
    stage.residency.leave()
    assert stage.on_device() == []


def test_what_comes_back_are_the_values_that_the_host_kept():
    stage = Stage("phase")
    before = {phase: module.weight.clone() for phase, module in stage.modules.items()}
    for phase in ("denoise", "decode"):
        with stage.residency(phase):
            pass
        assert torch.equal(stage.modules[phase].weight, before[phase])
    stage.residency.leave()
    assert all(torch.equal(module.weight, before[phase]) for phase, module in stage.modules.items())
    stage.modules["denoise"].load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with stage.residency("denoise"):
        pass
    assert stage.on_device() == ["denoise"] and stage.modules["denoise"].weight.eq(1).all()


def test_trained_tensors_stay():
    stage = Stage("phase")
    denoiser = stage.modules["denoise"].requires_grad_(True)
    with stage.residency("denoise"):
        pass
    assert stage.on_device() == []
    denoiser.weight.requires_grad_(False)
    with stage.residency("decode"):
        pass
    with stage.residency("denoise"):
        pass
    assert stage.on_device() == ["denoise"]


def test_entering_a_phase_again_moves_nothing():
    stage = Stage("phase")
    with stage.residency("denoise"):
        pass
    there = stage.modules["denoise"].weight.data_ptr()
    with stage.residency("denoise"):
        pass
    assert stage.modules["denoise"].weight.data_ptr() == there and stage.on_device() == ["denoise"]


def test_after_a_phase_within_another_the_outer_one_is_back():
    stage = Stage("phase")
    with stage.residency("denoise"):
        with stage.residency("decode"):
            assert stage.on_device() == ["decode"]
        assert stage.on_device() == ["denoise"]


def test_phases_with_the_same_modules_follow_each_other_without_a_move():
    module = nn.Linear(2, 2).requires_grad_(False)
    residency = Residency(torch.device("cpu"), {"denoise": [module], "sweep": [module]}, "phase", copy=True)
    with residency("denoise"):
        there = module.weight.data_ptr()
    with residency("sweep"):
        assert module.weight.data_ptr() == there and residency.phase == "sweep"


def test_a_module_of_two_phases_is_in_both():
    one, two = (nn.Linear(2, 2).requires_grad_(False) for _ in range(2))
    on_host = one.weight.data_ptr()
    residency = Residency(torch.device("cpu"), {"denoise": [one], "decode": [two, one]}, "phase", copy=True)
    for phase in ("denoise", "decode"):
        with residency(phase):
            pass
        assert one.weight.data_ptr() != on_host
    residency.leave()
    assert one.weight.data_ptr() == on_host


def test_on_the_host_itself_nothing_is_copied():
    module = nn.Linear(2, 2).requires_grad_(False)
    on_host = module.weight.data_ptr()
    with Residency(torch.device("cpu"), {"denoise": [module]}, "phase")("denoise"):
        assert module.weight.data_ptr() == on_host


def test_a_checkpointed_decoder_saves_less_and_gives_the_same_gradient(pipeline_folder):
    model = StableDiffusion.load(str(pipeline_folder), dtype=torch.float64)
    latents = model.init_latents(generators([0], "x")).double()

    def decode():
        x, saved = latents.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            images = model.decode(x)
        images.sum().backward()
        return images, x.grad, sum(saved)

    images, grad, saved = decode()
    checkpoint_layers(model.decoder)
    checkpoint_layers(model.decoder)  # once is enough, and twice does not nest
    again, again_grad, again_saved = decode()
    assert torch.equal(images, again)
    torch.testing.assert_close(again_grad, grad, rtol=1e-12, atol=0)
    assert 0 < again_saved < saved / 2
