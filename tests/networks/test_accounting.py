"""Counted bytes and FLOPs against closed forms, and on the meta device against the same code on real tensors."""

import gc

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alignprop.lora.factors import add_lora
from alignprop.memory.accounting import BLOCK, Account, on_meta
from alignprop.models.sd import StableDiffusion

KiB = 1024


def floats(kib, device="cpu", **options):
    return torch.zeros(kib * KiB // 4, device=device, **options)


# ---- bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peaks_of_a_sequence_by_phase(device):
    with Account(device) as account:
        a = floats(4, device)
        with account.phase("up"):
            b = a + 1
            c = torch.cat([a, b])
            assert account.bytes == 16 * KiB
            del b, c
            with account.phase("inner"):
                d = a * 2
        del a
        with account.phase("idle"):
            pass
        with account.phase("down"):
            e = d[: KiB // 4].clone()
    assert account.peaks == {"": 4 * KiB, "up": 16 * KiB, "inner": 8 * KiB, "idle": 4 * KiB, "down": 5 * KiB}
    assert account.peak == 16 * KiB
    del d, e
    assert account.bytes == 0


def test_a_phase_that_comes_again_keeps_its_highest_peak():
    with Account("cpu") as account:
        for kib in (2, 6, 1):
            with account.phase("again"):
                floats(kib)
    assert account.peaks["again"] == 6 * KiB


def test_a_failing_phase_ends():
    account = Account("cpu")
    with pytest.raises(ZeroDivisionError), account, account.phase("failing"):
        floats(1)
        raise ZeroDivisionError
    assert account.peaks == {"failing": 1 * KiB} and account._phase == ""


@pytest.mark.parametrize(("bytes_", "counted"), [(1, 512), (512, 512), (513, 1024), (0, 0)])
def test_sizes_are_rounded_up_to_the_allocators_blocks(bytes_, counted):
    with Account("cpu") as account:
        tensor = torch.zeros(bytes_, dtype=torch.uint8)
        assert BLOCK == 512 and account.bytes == counted and len(tensor) == bytes_


def test_views_and_changes_in_place_are_no_allocations():
    with Account("cpu") as account:
        a = floats(4)
        views = [a[1:], a.view(2, -1), a.detach(), a.view(2, -1).t(), a.add_(1), a.expand(3, -1)]
        assert account.bytes == 4 * KiB
        del a
        assert account.bytes == 4 * KiB
        del views
    assert account.peak == 4 * KiB and account.bytes == 0


def test_what_existed_before_is_outside_until_it_is_tracked():
    layer = torch.nn.Linear(16, 16, bias=False)  # 1 KiB
    kept, tied = floats(2), floats(3)
    with Account("cpu") as account:
        views = [layer.weight.detach(), layer.weight.t(), kept[1:], kept.add_(1)]
        assert account.bytes == 0
        account.track(layer, [tied, {"again": tied[5:]}])
        assert account.bytes == 4 * KiB
        views.append(layer.weight.t())
        layer.weight.data = layer.weight.double()
        assert account.bytes == 6 * KiB, "views keep the old weights alive"
        views.clear()
        assert account.bytes == 5 * KiB
        account.untrack(tied)
        assert account.bytes == 2 * KiB
        del tied
        assert account.bytes == 2 * KiB
    assert account.peak == 6 * KiB


def test_a_modules_gradients_and_buffers_are_tracked_and_other_things_refused():
    module = torch.nn.BatchNorm1d(128)  # weight, bias, mean and variance of 512 bytes, and a counter
    module.weight.grad = torch.zeros(128)
    account = Account("cpu")
    account.track(module)
    assert account.bytes == 6 * BLOCK
    with pytest.raises(TypeError, match="neither a module nor a tensor: generator"):
        account.track(module.parameters())


def test_a_resized_storage_counts_at_its_new_size():
    with Account("cpu") as account:
        a = torch.empty(0)
        torch.cat([floats(1), floats(1)], out=a)
        assert account.bytes == 2 * KiB
        a.resize_(KiB)
        assert account.bytes == 4 * KiB
    del a
    assert account.bytes == 0


def test_only_one_kind_of_device_counts():
    with Account("meta") as account:
        real = torch.ones(8, 8) @ torch.ones(8, 8)
        account.track(real)
        assert account.bytes == 0 and not account.flops
        copied = real.to("meta")
        assert account.bytes == BLOCK and copied.is_meta


def test_nothing_is_counted_outside_and_counting_goes_on():
    account = Account("cpu")
    with account:
        a = floats(1)
    b = floats(1)
    with account:
        c = floats(1)
    assert account.bytes == 2 * KiB
    del a, b, c
    assert account.bytes == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpointed_graph_keeps_its_borders_and_frees_what_it_recomputes(device):
    """Two segments of three tanh, each of which keeps its output: 6 KiB kept whole, 2 checkpointed."""
    segment = lambda x: x.tanh().tanh().tanh()  # noqa: E731
    x = floats(1, device, requires_grad=True)
    with Account(device) as account:
        y = checkpoint(segment, checkpoint(segment, x, use_reentrant=False), use_reentrant=False)
        assert account.bytes == 2 * KiB
        with account.phase("backward"):
            y.backward(y)
        # Upper segment: y, the border, three outputs again, a gradient. Lower: y, three outputs, two gradients.
        assert account.peaks["backward"] == 6 * KiB
        del y
        assert account.bytes == 1 * KiB, "the gradient of x"
        z = segment(segment(x))
        assert account.bytes == 7 * KiB
        del z
    gc.collect()
    assert account.bytes == 1 * KiB


# ---- FLOPs


def flops(function, *tensors, device="meta"):
    with Account(device) as account:
        function(*tensors)
    return account.flops.get("", 0)


def test_flops_of_matrix_products():
    a, b = torch.zeros(3, 5, device="meta"), torch.zeros(5, 7, device="meta")
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert flops(lambda: F.linear(a, b.t(), torch.zeros(7, device="meta"))) == 2 * 3 * 5 * 7
    assert flops(lambda: a.expand(4, 3, 5) @ b.expand(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert flops(lambda: a + a) == 0


def test_flops_of_a_convolution_whose_weight_is_frozen():
    x = torch.zeros(2, 3, 8, 8, device="meta", requires_grad=True)
    weight = torch.zeros(4, 3, 3, 3, device="meta")
    once = 2 * 2 * 4 * 3 * 3 * 3 * 8 * 8
    with Account("meta") as account:
        with account.phase("forward"):
            y = F.conv2d(x, weight, padding=1)
        with account.phase("backward"):
            y.sum().backward()
    assert account.flops == {"forward": once, "backward": once}
    weight.requires_grad_(True)
    assert flops(lambda: F.conv2d(x, weight, padding=1).sum().backward()) == 3 * once


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_and_bytes_of_attention(device):
    """Two matrix products forward; five backward, the attention matrix being computed once more; it is never kept."""
    batch, heads, length, width = 2, 3, 64, 4
    shape = (batch, heads, length, width)
    q, k, v = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    with Account(device) as account:
        with account.phase("forward"):
            out = F.scaled_dot_product_attention(q, k, v)
        with account.phase("backward"):
            gradients = torch.autograd.grad(out, [q, k, v], out)
    assert account.flops == {"forward": 2 * product, "backward": 5 * product}
    values, normalisers = out.nbytes, 4 * batch * heads * length
    assert account.peaks["forward"] == values + normalisers
    assert account.peaks["backward"] == values + normalisers + sum(g.nbytes for g in gradients)
    assert account.peak < 4 * batch * heads * length * length


def test_flops_are_those_of_torchs_own_counter():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    x = torch.zeros(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        layers(x).sum().backward()
    assert flops(lambda: layers(x).sum().backward(), device="cpu") == counter.get_total_flops() > 0


def test_inference_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"use torch\.no_grad"), Account("cpu"), torch.inference_mode():
        F.linear(torch.ones(2, 2), torch.ones(2, 2))


# ---- the meta device against real tensors


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        )  # fmt: skip
    add_lora(unet.requires_grad_(False), 2, 2.0, ["to_q", "to_v", "to_out.0"], seed=0)
    return unet


def train_twice(unet, device):
    account = Account(device)
    account.track(unet)
    x = torch.zeros(2, 4, 8, 8, device=device)
    words = torch.zeros(2, 7, 16, device=device)
    t = torch.zeros((), dtype=torch.long, device=device)
    with account:
        for number in ("first", "second"):
            with account.phase(f"{number} forward"):
                loss = unet(x, t, words).sample.square().mean()
            with account.phase(f"{number} backward"):
                loss.backward()
        with account.phase("without gradient"), torch.no_grad():
            unet(x, t, words)
    return {"bytes": account.bytes, "peaks": account.peaks, "flops": account.flops}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_costs_the_same_on_meta_as_in_reality(unet, checkpointing):
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    expected = train_twice(unet, "cpu")
    unet.zero_grad()
    assert train_twice(on_meta(unet), "meta") == expected
    peaks, flops = expected["peaks"], expected["flops"]
    assert peaks["second forward"] > peaks["first forward"], "the first call's gradients"
    if checkpointing:
        assert flops["first backward"] > 1.5 * flops["first forward"], "recomputed"
    assert peaks["without gradient"] < peaks["first forward"]


@pytest.mark.parametrize("shape", [(2, 3, 64, 8), (3, 64, 8)], ids=["fused", "three dimensions"])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean mask", "float mask", "scaled", "wide values"])
def test_attention_costs_the_same_on_meta_as_in_reality(kind, shape):
    def cost(device):
        q, k, v = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
        if kind == "wide values":  # for which there is no fused kernel
            v = torch.zeros(*shape[:-1], 32, device=device, requires_grad=True)
        mask = {"boolean mask": torch.ones(64, 64, dtype=torch.bool), "float mask": torch.zeros(64, 64)}.get(kind)
        mask = None if mask is None else mask.to(device)
        options = {"is_causal": kind == "causal", "scale": 3.0 if kind == "scaled" else None}
        with Account(device) as account:
            with account.phase("forward"):
                out = F.scaled_dot_product_attention(q, k, v, mask, **options)
            forward = account.bytes
            out.sum().backward()
        assert out.shape == v.shape
        return forward, account.peaks, account.flops

    assert cost("meta") == cost("cpu")


def test_keys_that_heads_share_are_not_repeated():
    q = torch.zeros(1, 4, 64, 8, device="meta")
    k, v = (torch.zeros(1, 2, 64, 8, device="meta", requires_grad=True) for _ in range(2))
    with Account("meta") as account:
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert account.bytes == out.nbytes + 4 * 4 * 64
        gradients = torch.autograd.grad(out, [k, v], out)
    assert out.shape == q.shape and [g.shape for g in gradients] == [k.shape, v.shape]
    assert account.flops[""] == (2 + 5) * 2 * 4 * 64 * 64 * 8


def test_a_result_that_is_remembered_is_laid_out_as_the_operators_own():
    """Calls that differ in no more than a type, a stride or a default come one after the other, and all of it twice."""

    def results():
        whole, real = (torch.ones(2, 4, 6, 6, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
        last = real.to(memory_format=torch.channels_last)
        weight, number = torch.ones(4, 4, 3, 3, device="meta"), torch.tensor(2.0, dtype=torch.float64)
        rows = torch.ones(12, 24, device="meta")
        found = [
            whole + 1, whole + 1.0, whole + True, real + 1, real * number, whole * number, whole / 2, real.half() + 1.0,
            last + 1, last.contiguous(), real.contiguous(), real.clone(), last.clone(), last[1:] * 2, real[:, ::2] * 2,
            F.conv2d(real, weight), F.conv2d(last, weight), F.conv2d(real, weight, padding=1), F.silu(last),
            rows @ rows.T, rows.T @ rows, F.group_norm(last, 2), F.layer_norm(real, (6,)), real.sum(dim=1),
            real.sum(dim=(1, 2), keepdim=True), torch.cat([real, last]), torch.cat([real, last], dim=1), real.half(),
            real.to(torch.float64), *torch.max(real, dim=1), real == whole, *real.unsafe_chunk(2, dim=1),
            torch.where(real > 1, real, 2 * real), rows.reshape(6, 48), rows.T.reshape(6, 48),
        ]  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found.append(whole / 2)
        finally:
            torch.set_default_dtype(before)
        return [(t.dtype, t.shape, t.stride()) for t in found]

    expected = results()
    for _ in range(2):
        with Account("meta") as account:
            assert results() == expected
        assert account.bytes == 0


def test_what_shares_a_storage_shares_it_each_time():
    for _ in range(2):
        with Account("meta") as account:
            whole = floats(8, "meta").view(32, 64)
            views = [whole.contiguous(), whole.T, torch.ops.aten._unsafe_view(whole, [64, 32]), whole.to("meta")]
            assert account.bytes == 8 * KiB
            assert {v.untyped_storage()._cdata for v in views} == {whole.untyped_storage()._cdata}
            new = whole + 1
            assert account.bytes == 16 * KiB and new.grad_fn is None
            new.add_(1)
            assert account.bytes == 16 * KiB


def test_attention_on_meta_is_torchs_own_again_afterwards():
    q = torch.zeros(1, 1, 64, 4, device="meta", requires_grad=True)

    def kept():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            F.scaled_dot_product_attention(q, q, q)
        return max(saved)

    with Account("meta"):
        assert kept() < 64 * 64
    assert kept() == 64 * 64


# ---- on_meta


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


def test_a_copy_on_meta_has_the_modules_structure_and_none_of_its_data():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    module[1].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    module[0].weight.data = torch.ones(4, 4).t()
    module.note = {"tensor": torch.ones(3, 5).t(), "words": ["kept"]}
    copied = on_meta(module)
    assert [t.device.type for t in tensors_of(copied)] == ["meta"] * 8
    assert [t.device.type for t in tensors_of(module)] == ["cpu"] * 8
    assert copied[1].weight is copied[0].weight
    shapes = lambda m: [(n, p.shape, p.dtype, p.stride(), p.requires_grad) for n, p in m.named_parameters()]  # noqa: E731
    assert shapes(copied) == shapes(module)
    note = copied.note["tensor"]
    assert note.is_meta and note.stride() == (1, 5) and copied.note["words"] == ["kept"]
    assert copied.note["words"] is not module.note["words"]


def test_a_whole_model_is_copied_with_what_it_shares(pipeline_folder):
    model = StableDiffusion.load(str(pipeline_folder))
    add_lora(model.denoiser, 2, 2.0, ["to_q"], seed=0)
    with Account("cpu") as account:
        copied = on_meta(model)
    assert account.peak == 0
    assert {t.device.type for t in tensors_of(copied.denoiser)} == {"meta"}
    assert copied.pipeline.unet is copied.denoiser is not model.denoiser
    assert copied.denoiser.config.sample_size == model.denoiser.config.sample_size
    trained = [p for p in copied.denoiser.parameters() if p.requires_grad]
    assert len(trained) == len([p for p in model.denoiser.parameters() if p.requires_grad]) > 0
