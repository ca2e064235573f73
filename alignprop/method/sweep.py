"""The adjoint sweep: the gradient of a sampling chain, with the activations of one network call at a time.

The sweep gets λ[N] = ∂R/∂x[N] from the decoder and the reward, and takes λ down the chain. At an active step it calls
the network with gradient, at the stored latents:

    v      = Σ_{n≥i} b[n,i]·λ[n+1]                            because x[n+1] contains b[n,i]·f[i]
    ∂R/∂θ += w[i] · vᵀ ∂f/∂θ
    λ[i]   = a[i]·λ[i+1] + γ[i]·scale[i] · vᵀ ∂f/∂(scale[i]·x[i])

At any other step, λ[i] = a[i]·λ[i+1]. In a one-step method, v = b[i,i]·λ[i+1]. If text encoders are trained, ∂R/∂c is
summed like ∂R/∂θ. With w = γ = 1 this is exact back-propagation through the active network calls.
"""

from dataclasses import dataclass, field

import torch

from alignprop.engine.sharding import DTensor
from alignprop.method.adjoint import limit_norms, norms
from alignprop.method.chain import per_sample
from alignprop.method.guidance import Graph, Products
from alignprop.method.plans import GradientPlan
from alignprop.models.base import Conditioning, select


@dataclass
class Trajectory:
    """The part of a rollout that its sweep needs.

    Attributes:
        first: the lowest step of the sweep; N if the sweep has no step.
        tracked: the names of the conditioning tensors that need a gradient.
        stored: x[i] for the steps of the sweep, by i.
        kept: the graphs of network calls that the rollout kept, by i. They hold the active samples only.
    """

    first: int
    tracked: list[str] = field(default_factory=list)
    stored: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: dict[int, Graph] = field(default_factory=dict)


def sweep(rollout, adjoint, trajectory: Trajectory, cond, plan: GradientPlan, calls, parameters) -> tuple[list, list]:
    """Sweeps λ from x[N] down to the lowest step with a network call.

    Args:
        rollout: gives the network and the chain's coefficients.
        adjoint: λ = ∂R/∂(final latents), [B, ...].
        trajectory: the trajectory of the forward pass. The sweep uses up its kept graphs. A second sweep calls the
            network again for these steps.
        cond: the conditioning of the B samples.
        plan: which steps carry gradient. Copies count as samples here and in `cond`.
        calls: `rollout.network_calls` of the plan.
        parameters: the trainable parameters.

    Returns:
        ∂R/∂c for each tracked conditioning tensor, [B, ...], and ∂R/∂θ for each of `parameters`, summed over the
        samples. Both are zeros if no step is active. ∂R/∂θ is None for parameters that FSDP2 has spread, because FSDP2
        itself adds their gradients, averaged over the processes, to `.grad`.
    """
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    gradients = [torch.zeros_like(p, dtype=p.grad_dtype) for p in whole]
    tracked = [cond[name] for name in trajectory.tracked]
    into_cond = [torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32)) for c in tracked]
    limit = rollout.adjoint_clip * norms(adjoint)
    into_outputs: dict[int, torch.Tensor] = {}  # the sums v of steps below, as far as λ is known
    for i in sorted(trajectory.stored, reverse=True):
        in_chain = plan.exit_step >= i
        rollout.adjoint_norms.add(i + 1, adjoint, plan.active[: i + 1].any(dim=0) & in_chain)
        a, weights, _ = rollout.sampler.coefficients(i, plan.early_exits, adjoint)
        for m, b in weights.items():
            if calls[0, m]:
                into_outputs[m] = into_outputs[m] + b * adjoint if m in into_outputs else b * adjoint
        active = plan.active[i].nonzero().squeeze(1).to(adjoint.device)
        carried = a * adjoint
        if calls[0, i]:
            # If only other processes need this call, one sample takes part in it with a vector of zeros.
            rows = active if len(active) else active.new_zeros(1)
            weight, coupling = (per_sample(t[i].to(adjoint)[rows], adjoint) for t in (plan.weight, plan.coupling))
            into_output = into_outputs.pop(i) if i in into_outputs else torch.zeros_like(adjoint)
            vector = weight * into_output[rows] * bool(len(active))
            products = _call(rollout, trajectory, i, rows, cond, vector, whole, needs_input=bool(calls[1, i]))
            _add(into_cond, products.tensors[: len(tracked)], rows)
            _add(gradients, products.tensors[len(tracked) :])
            if len(active) and calls[1, i]:
                carried[rows] += float(rollout.sampler.scale[i]) * coupling / weight * products.latents
        adjoint = limit_norms(carried, limit) if rollout.adjoint_clip else carried
    return into_cond, gradients or [None] * len(parameters)


def _call(rollout, trajectory: Trajectory, i: int, rows, cond, vector, parameters, needs_input: bool) -> Products:
    """Returns the products of `vector` with the derivatives of f in step i.

    They come from the graph that the rollout kept, or else from a new network call.
    """
    if i in trajectory.kept:
        graph = trajectory.kept.pop(i)
        return rollout.f.products_of(graph, vector, [*(graph.cond[name] for name in trajectory.tracked), *parameters])
    latents, t = rollout.inputs(i, trajectory.stored[i][rows])
    latents = latents.requires_grad_(needs_input)
    tracked_cond = track(select(cond, rows), trajectory.tracked)
    tensors = [*(tracked_cond[name] for name in trajectory.tracked), *parameters]
    return rollout.f.products_at(latents, t, tracked_cond, vector, tensors)


def _add(totals: list[torch.Tensor], products: list[torch.Tensor | None], rows: torch.Tensor | None = None) -> None:
    """Adds each product that is not None to its total, or to `rows` of its total if they are given."""
    for total, product in zip(totals, products, strict=True):
        if product is not None and rows is None:
            total += product
        elif product is not None:
            total[rows] += product


def track(cond: Conditioning, names) -> Conditioning:
    """Returns the conditioning detached from its graph. The tensors in `names` require a gradient."""
    return {name: tensor.detach().requires_grad_(name in names) for name, tensor in cond.items()}
