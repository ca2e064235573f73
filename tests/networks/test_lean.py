"""Lean layers against the same layers untouched, in float64: outputs, gradients, and the bytes that a call leaves."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop.lora.factors import add_lora, get_lora, set_lora, trainable_parameters
from alignprop.memory import lean
from alignprop.memory.accounting import BLOCK, Account, on_meta
from alignprop.memory.checkpointing import checkpoint_layers
from alignprop.memory.lean import make_lean
from alignprop.models.sd import StableDiffusion

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def lean_copy(module):
    module = copy.deepcopy(module)
    make_lean(module)
    return module


def run(module, x, call=lambda module, x: module(x), count=True):
    """(output, {name: gradient}, bytes alive between the two passes besides input, output and weights)."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with Account(x.device.type) if count else nullcontext() as account:
        y = call(module, x)
        kept = account.bytes - -(-y.untyped_storage().nbytes() // BLOCK) * BLOCK if count else None
        y.backward(normal(*y.shape, seed=1).to(y))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return y.detach(), {"input": x.grad, **gradients}, kept


def assert_close(ours, theirs, gradient=1e-12, output=0.0):
    torch.testing.assert_close(ours[0], theirs[0], rtol=output, atol=output)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert (ours[1][name] - expected).norm() <= gradient * expected.norm(), name


# ---- whole networks


def unet():
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return network, (2, 4, 8, 8), lambda unet, x: unet(x, 7, normal(2, 5, 12).to(x)).sample


def vae():
    network = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return network, (2, 4, 8, 8), lambda vae, x: vae.decode(x).sample


def sd3():
    network = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=8, pooled_projection_dim=6, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip

    def call(network, x):
        return network(x, normal(2, 5, 12).to(x), normal(2, 6).to(x), torch.full((2,), 3.0, device=x.device)).sample

    return network, (2, 4, 8, 8), call


def flux():
    network = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip

    def call(network, x):
        once = torch.full((2,), 0.5, device=x.device)
        ids = torch.arange(3.0 * x.shape[1], device=x.device).view(-1, 3), torch.zeros(5, 3, device=x.device)
        return network(x, normal(2, 5, 12).to(x), normal(2, 6).to(x), once, *ids, guidance=once).sample

    return network, (2, 9, 4), call


def frozen(make, dtype=torch.float64):
    """A random network of frozen weights; with an adapter, in float32 at the least, where it has attention to adapt."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, shape, call = make()
    network.requires_grad_(False).to(dtype)
    if make is not vae:
        joint = ["add_k_proj", "to_add_out"] if make in (sd3, flux) else []
        add_lora(network, 2, 4.0, ATTENTION + joint, seed=0)
    for i, parameter in enumerate(trainable_parameters(network).values()):
        parameter.data = normal(*parameter.shape, seed=i, dtype=torch.promote_types(dtype, torch.float32)) / 4
    return network, normal(*shape, seed=2, dtype=dtype), call


@pytest.mark.parametrize("make", [unet, vae, sd3, flux])
def test_a_network_has_the_same_gradients(make):
    network, x, call = frozen(make)
    changed = lean_copy(network)
    assert list(changed.state_dict()) == list(network.state_dict())
    assert_close(run(changed, x, call), run(network, x, call), output=1e-13)


@pytest.mark.parametrize(("make", "share"), [(unet, 0.6), (vae, 0.4), (sd3, 0.6), (flux, 0.65)])
def test_a_network_keeps_less(make, share):
    network, x, call = frozen(make, torch.bfloat16)
    size = (2, 144, 4) if make is flux else (2, 4, 32, 32)
    kept = [run(on_meta(n), x.new_empty(size, device="meta"), call)[2] for n in (lean_copy(network), network)]
    assert kept[0] < share * kept[1]


def test_a_planner_s_copy_of_a_lean_network_is_its_own():
    network, x, call = frozen(unet)
    changed = lean_copy(network)
    assert run(changed, x, call)[2] == run(on_meta(changed), x.to("meta"), call)[2]


@pytest.mark.parametrize("make", [unet, sd3, flux])
def test_a_network_under_block_checkpointing(make):
    network, x, call = frozen(make)
    expected = run(network, x, call)
    changed = lean_copy(network)
    changed.enable_gradient_checkpointing()
    changed.train()
    assert_close(run(changed, x, call), expected, output=1e-13)


def test_checkpointed_layers_are_not_recomputed_further_than_plain_ones():
    network, x, call = frozen(vae)
    changed = lean_copy(network)
    expected, flops = run(network, x, call), []
    for decoder in (changed, network):
        checkpoint_layers(decoder)
        with Account("cpu") as account:
            assert_close(run(decoder, x, call), expected, output=1e-13)
        flops.append(account.flops[""])
    assert flops[0] <= flops[1]


def test_channels_last():
    network, x, call = frozen(unet, torch.float32)
    network.to(memory_format=torch.channels_last)
    changed, x = lean_copy(network), x.to(memory_format=torch.channels_last)
    ours, theirs = run(changed, x, call), run(network, x, call)
    assert_close(ours, theirs, gradient=1e-6)
    assert ours[2] < 0.65 * theirs[2]


def test_under_autocast_everything_is_plain(monkeypatch):
    network, x, call = frozen(unet, torch.float32)
    changed = lean_copy(network)
    forbid(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(changed, x, call), run(network, x, call))


def forbid(monkeypatch):
    """From now on no operator of ours may be called."""

    def fail(*_):
        raise AssertionError("not plain")

    for name in ("FrozenConv2d", "_Silu", "_Times", "_Geglu", "_Recomputed"):
        monkeypatch.setattr(getattr(lean, name), "forward", fail)
    monkeypatch.setattr(lean, "_with_recipe", fail)


@pytest.mark.parametrize("make", [unet, vae, sd3, flux])
def test_without_gradient_everything_is_plain(make, monkeypatch):
    network, x, call = frozen(make)
    changed = lean_copy(network)
    forbid(monkeypatch)
    with torch.no_grad():
        assert torch.equal(call(changed, x), call(network, x))


def test_again_changes_nothing():
    changed = lean_copy(frozen(unet)[0])
    forwards = [vars(m).get("forward") for m in changed.modules()]
    make_lean(changed)
    assert all(vars(m).get("forward") is f for m, f in zip(changed.modules(), forwards, strict=True))
    assert sum(f is not None for f in forwards) > 30


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_with_a_forward_of_their_own_are_left_alone():
    doubled, replaced = Doubled(4, 4, 1), nn.SiLU()
    replaced.forward = torch.relu
    make_lean(nn.ModuleList([doubled, replaced]))
    assert "forward" not in vars(doubled) and replaced.forward is torch.relu


# ---- adapters


def test_adapters_that_come_and_go_later(pipeline_folder):
    plain, changed = (StableDiffusion.load(str(pipeline_folder)).denoiser for _ in range(2))
    size = plain.config.sample_size
    x, cond = normal(2, 4, size, size).float(), normal(2, 5, plain.config.cross_attention_dim).float()
    call = lambda unet, x: unet(x, 7, cond).sample  # noqa: E731
    adapters = []
    for rank, layers in ((4, ATTENTION), (2, ["to_q"])):
        other = StableDiffusion.load(str(pipeline_folder)).denoiser
        add_lora(other, rank, 3.0, layers, seed=rank)
        for i, parameter in enumerate(trainable_parameters(other).values()):
            parameter.data = normal(*parameter.shape, seed=i).float() / 4
        adapters.append(get_lora(other))
    add_lora(changed, 4, 4.0, ATTENTION, 0)
    make_lean(changed)
    for weights in (adapters[0], None, adapters[1], adapters[0]):
        for unet in (plain, changed):
            set_lora(unet, weights)
        assert_close(run(changed, x, call), run(plain, x, call), gradient=1e-5, output=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_adapter_may_come_before_or_after(order):
    network, x, call = frozen(unet)
    expected, adapter = run(network, x, call), get_lora(network)
    late, _, _ = frozen(unet)
    late.delete_adapters("default")
    if order == "before":
        make_lean(late)
    set_lora(late, adapter)
    late.double()
    for name, parameter in late.named_parameters():
        if "lora" in name:
            parameter.requires_grad_()
    make_lean(late)
    assert_close(run(late, x, call), expected, gradient=1e-6, output=1e-6)


def adapted(**options):
    """A LayerNorm, then a linear layer with an adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).requires_grad_(False)
        config = LoraConfig(target_modules=["1"], init_lora_weights=False, **{"r": 2, "lora_alpha": 3, **options})
        return inject_adapter_in_model(config, model).double()


def test_an_adapter_after_a_norm_keeps_the_norm_s_input_once():
    model, x = adapted(), normal(4, 32, 16)
    ours, theirs = run(lean_copy(model), x), run(model, x)
    assert_close(ours, theirs)
    statistics, low_rank = 2 * 1024, 4 * 32 * 2 * 8
    assert ours[2] == low_rank + statistics  # the norm's input is the network's
    assert theirs[2] == ours[2] + 4 * 32 * 16 * 8


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("change", ["dropout", "dora", "bias", "rslora", "two", "merged", "disabled"])
def test_adapters_of_other_kinds_are_left_to_peft(change):
    special = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
    model = adapted(**special.get(change, {"use_rslora": change == "rslora"}))
    if change == "two":
        model = inject_adapter_in_model(
            LoraConfig(r=3, target_modules=["1"], init_lora_weights=False), model, "second"
        ).double()
        model[1].set_adapter(["default", "second"])
    changed, x = lean_copy(model), normal(4, 16)
    for m in (model, changed):
        if change == "merged":
            m[1].merge()
        m[1].enable_adapters(change != "disabled")

    def call(model, x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model(x)

    ours, theirs = (partial(run, x=x, call=call)(m) for m in (changed, model))
    for gradients in (ours[1], theirs[1]):
        for name in [name for name, gradient in gradients.items() if gradient is None]:
            del gradients[name]
    assert_close(ours, theirs)


def test_an_adapter_follows_half_precision():
    model, x = adapted(r=4), normal(64, 512, 16)
    exact = run(model, x)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data.bfloat16()
    changed, half = lean_copy(model), x.bfloat16()
    ours, theirs = run(changed, half), run(model, half)
    assert ours[2] < 0.35 * theirs[2]
    for name, expected in exact[1].items():
        error, error_of_peft = ((g[1][name].double() - expected).norm() / expected.norm() for g in (ours, theirs))
        assert error < 2 * error_of_peft + 1e-3, name
        assert ours[1][name].dtype == theirs[1][name].dtype
    with torch.no_grad():
        assert torch.equal(changed(half), ours[0])  # a rollout and its sweep


def test_gradients_of_factors_are_summed_in_float32():
    x, factor, grad = normal(4096, 16).bfloat16(), normal(2, 16, seed=1).float(), normal(4096, 2, seed=2).bfloat16()
    factor.requires_grad_()
    lean._times(x, factor).backward(grad)
    expected = grad.double().T @ x.double()
    assert (factor.grad - expected).norm() < 1e-5 * expected.norm()


# ---- single layers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [
    {"padding": 1}, {"kernel_size": 1}, {"stride": 2, "padding": 1}, {"stride": 3, "padding": (2, 0), "dilation": 2},
    {"groups": 4, "bias": False},
])  # fmt: skip
def test_a_convolution_keeps_nothing(options, memory_format):
    conv = nn.Conv2d(8, 4, **{"kernel_size": 3, **options}).double().requires_grad_(False)
    conv, x = (t.to(memory_format=memory_format) for t in (conv, normal(2, 8, 15, 16)))
    call = lambda conv, x: conv(x + 1)  # noqa: E731  the caller keeps x
    ours, theirs = run(lean_copy(conv), x, call), run(conv, x, call)
    assert_close(ours, theirs)
    assert ours[1]["input"].stride() == theirs[1]["input"].stride()
    assert (ours[2], theirs[2]) == (0, x.numel() * 8)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_other_paddings_are_plain(options, monkeypatch):
    conv = nn.Conv2d(4, 4, 3, **options).double().requires_grad_(False)
    changed = lean_copy(conv)
    forbid(monkeypatch)
    assert_close(run(changed, normal(2, 4, 8, 8)), run(conv, normal(2, 4, 8, 8)))


def test_silu_after_a_group_norm_keeps_nothing_more():
    layers = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.SiLU()).double().requires_grad_(False)
    nn.init.normal_(layers[1].weight)
    ours, theirs = run(lean_copy(layers), normal(2, 4, 16, 16)), run(layers, normal(2, 4, 16, 16))
    assert_close(ours, theirs)
    statistics, activation = 2 * 512, 2 * 8 * 16 * 16 * 8
    assert ours[2] == activation + statistics
    assert theirs[2] == 2 * activation + statistics


@pytest.mark.parametrize("between", [lambda x: x.mul_(2), lambda x: x * 2, lambda x: x.transpose(1, 2)])
def test_silu_of_what_is_no_longer_the_norm_s_output(between):
    norm, act = nn.GroupNorm(2, 8).double().requires_grad_(False), nn.SiLU()
    call = lambda layers, x: layers[1](between(layers[0](x)))  # noqa: E731
    layers = nn.ModuleList([norm, act])
    assert_close(run(lean_copy(layers), normal(2, 8, 4, 4), call), run(layers, normal(2, 8, 4, 4), call))


def test_geglu_keeps_its_projection():
    geglu = GEGLU(8, 64).double().requires_grad_(False)
    ours, theirs = run(lean_copy(geglu), normal(4, 16, 8)), run(geglu, normal(4, 16, 8))
    assert_close(ours, theirs)
    assert ours[2] == 4 * 16 * 128 * 8
    assert theirs[2] == ours[2] * 3 // 2


@pytest.mark.parametrize("norm", [nn.RMSNorm(16, eps=1e-6), RMSNorm(16, eps=1e-6), RMSNorm(16, 1e-6, False)])
def test_rms_norm_keeps_its_input(norm):
    norm.double().requires_grad_(False)
    x = normal(4, 8, 16)
    ours, theirs = run(lean_copy(norm), x), run(norm, x)
    assert_close(ours, theirs)
    assert ours[2] == 0  # which is the caller's
    assert theirs[2] > 0


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), nn.LayerNorm(8), nn.RMSNorm(8), RMSNorm(8, 1e-6),
])  # fmt: skip
def test_a_layer_that_is_trained_is_plain(layer, monkeypatch):
    layer.double()
    frozen_first = lean_copy(layer.requires_grad_(False)).requires_grad_(True)
    layer.requires_grad_(True)
    forbid(monkeypatch)
    ours, theirs = run(frozen_first, normal(2, 4, 8, 8)), run(layer, normal(2, 4, 8, 8))
    assert_close(ours, theirs)
    assert len(ours[1]) > 1 and ours[2] == theirs[2]


def test_a_bias_that_is_trained_alone():
    conv = nn.Conv2d(4, 4, 3).double()
    conv.weight.requires_grad_(False)
    ours, theirs = run(lean_copy(conv), normal(2, 4, 8, 8)), run(conv, normal(2, 4, 8, 8))
    assert_close(ours, theirs)
    assert "bias" in ours[1]


@pytest.mark.parametrize("layer", [
    nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), GEGLU(8, 8), nn.RMSNorm(8),
])  # fmt: skip
def test_second_derivatives_are_refused(layer):
    x = normal(2, 8, 8, 8).requires_grad_()
    y = lean_copy(layer.double().requires_grad_(False))(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_checkpoint_holds_only_its_input():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    layers = nn.Sequential(conv, nn.GroupNorm(2, 4), nn.SiLU(), conv).double().requires_grad_(False)
    call = lambda layers, x: checkpoint(layers, x, use_reentrant=False)  # noqa: E731
    ours, theirs = run(lean_copy(layers), normal(2, 4, 16, 16), call), run(layers, normal(2, 4, 16, 16))
    assert_close(ours, theirs)
    assert ours[2] < 2 * 4 * 16 * 16 * 8


def test_a_norm_without_gradient_leaves_no_recipe_for_later():
    norm = lean_copy(nn.GroupNorm(2, 8).double().requires_grad_(False))
    with torch.no_grad():
        y = norm(normal(2, 8, 4, 4))
    assert not hasattr(y, "recipe")
    y.requires_grad_()
    act = lean_copy(nn.Sequential(nn.SiLU()))
    act(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.autograd.grad(F.silu(y).sum(), y)[0], rtol=0, atol=0)
