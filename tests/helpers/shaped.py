"""Random networks with the shape of FLUX's and of SDXL's denoiser, whose layers are wide enough to be packed."""

import torch

from alignprop.lora.factors import trainable_parameters
from alignprop.models.skeleton import build_module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux_shaped(heads: int, layers: int) -> dict:
    return {
        "_class_name": "FluxTransformer2DModel", "in_channels": 4, "num_layers": layers, "num_single_layers": layers,
        "attention_head_dim": 32, "num_attention_heads": heads, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
    }  # fmt: skip


def sdxl_shaped(width: int, layers: int) -> dict:
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": (width, 2 * width),
        "layers_per_block": layers, "norm_num_groups": 4, "cross_attention_dim": 32, "attention_head_dim": 2,
        "transformer_layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip


def random_network(facts: dict, seed=0):
    """A frozen network of random weights, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_module(facts, torch.float32, "cpu").requires_grad_(False).eval()
    is_flux = facts["_class_name"].startswith("Flux")
    return network, normal(2, 9, 4, seed=1) if is_flux else normal(2, 4, 8, 8, seed=1)


def call(network, x):
    if x.dim() == 4:
        return network(x, 7, normal(2, 5, 32, seed=3)).sample
    once = torch.full((2,), 0.5)
    ids = torch.arange(3.0 * x.shape[1]).view(-1, 3), torch.zeros(5, 3)
    return network(x, normal(2, 5, 32, seed=3), normal(2, 32, seed=4), once, *ids, guidance=once).sample


def gradients(network, x):
    """The output, and the gradients of the input and of what is trained, by a random gradient of the output."""
    x = x.clone().requires_grad_()
    y = call(network, x)
    trained = trainable_parameters(network)
    found = torch.autograd.grad(y, [x, *trained.values()], normal(*y.shape, seed=2))
    return y.detach(), torch.cat([g.flatten() for g in found])
