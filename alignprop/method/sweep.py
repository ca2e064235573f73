"""The adjoint sweep: the gradient of a sampling chain, with the activations of one network call at a time.

λ = ∂R/∂x[N] arrives from the decoder and the reward, and is swept down the chain. At an active step the network is
called with gradient, at the stored latents:

    ∂R/∂θ += w[i] · (b[i]·λ)ᵀ ∂f/∂θ
    λ     ←  a[i]·λ + γ[i] · (b[i]·λ)ᵀ ∂f/∂x[i]

and at any other step λ ← a[i]·λ. Where text encoders are trained, ∂R/∂c is summed like ∂R/∂θ. With w = γ = 1 this is
exact back-propagation.
"""

from dataclasses import dataclass, field

import torch

from alignprop.engine.sharding import DTensor
from alignprop.method.adjoint import limit_norms, norms
from alignprop.method.guidance import Graph, Products
from alignprop.method.plans import GradientPlan
from alignprop.models.base import Conditioning, select


@dataclass
class Trajectory:
    """What a rollout leaves for its sweep.

    Attributes:
        first: the lowest step that the sweep goes down to.
        tracked: the names of the tensors of the conditioning whose gradient is asked for.
        stored: x[i] from there on, by i.
        kept: graphs of the active samples' network calls, by i.
    """

    first: int
    tracked: list[str] = field(default_factory=list)
    stored: dict[int, torch.Tensor] = field(default_factory=dict)
    kept: dict[int, Graph] = field(default_factory=dict)


def sweep(rollout, adjoint, trajectory: Trajectory, cond, plan: GradientPlan, calls, parameters) -> tuple[list, list]:
    """Sweeps λ from x[N] down to the lowest step with a network call.

    Args:
        rollout: whose network is called, at the chain's coefficients.
        adjoint: λ = ∂R/∂(final latents), [B, ...].
        trajectory: of the forward pass; its kept graphs are used up, and their calls are made anew another time.
        cond, plan: as in `Rollout.forward`.
        calls: `rollout.network_calls(plan)`.
        parameters: the trainable tensors.

    Returns:
        ∂R/∂c of what the trajectory tracks, [B, ...], and ∂R/∂θ for each of `parameters`, summed over the
        samples; zeros where no step is active. None for parameters that FSDP2 has spread: it adds their gradients,
        averaged over the processes, to `.grad` by itself.
    """
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    gradients = [torch.zeros_like(p, dtype=p.grad_dtype) for p in whole]
    tracked = [cond[name] for name in trajectory.tracked]
    into_cond = [torch.zeros_like(c, dtype=torch.promote_types(c.dtype, torch.float32)) for c in tracked]
    limit = rollout.adjoint_clip * norms(adjoint)
    for i in sorted(trajectory.stored, reverse=True):
        rollout.adjoint_norms.add(i + 1, adjoint, plan.active[: i + 1].any(dim=0))
        a, b, _ = rollout.coefficients(i, plan, adjoint)
        active = plan.active[i].nonzero().squeeze(1).to(adjoint.device)
        carried = a * adjoint
        if calls[0, i]:
            # Where only other processes need this call, a sample takes part in it with nothing to add.
            rows = active if len(active) else active.new_zeros(1)
            weight, coupling = (per_sample(t[i], rows, adjoint) for t in (plan.weight, plan.coupling))
            vector = weight * (b * adjoint)[rows] * bool(len(active))
            products = _call(rollout, trajectory, i, rows, cond, vector, whole, needs_input=bool(calls[1, i]))
            _add(into_cond, products.tensors[: len(tracked)], rows)
            _add(gradients, products.tensors[len(tracked) :])
            if len(active) and calls[1, i]:
                carried[rows] += coupling / weight * products.latents
        adjoint = limit_norms(carried, limit) if rollout.adjoint_clip else carried
    return into_cond, gradients or [None] * len(parameters)


def _call(rollout, trajectory: Trajectory, i: int, rows, cond, vector, parameters, needs_input: bool) -> Products:
    """The products of `vector` with the derivatives of step i's network call, kept from the rollout or made anew."""
    if i in trajectory.kept:
        graph = trajectory.kept.pop(i)
        return rollout.f.products_of(graph, vector, [*(graph.cond[name] for name in trajectory.tracked), *parameters])
    latents = trajectory.stored[i][rows].requires_grad_(needs_input)
    tracked_cond = track(select(cond, rows), trajectory.tracked)
    tensors = [*(tracked_cond[name] for name in trajectory.tracked), *parameters]
    return rollout.f.products_at(latents, rollout.timestep(i, latents), tracked_cond, vector, tensors)


def _add(totals: list[torch.Tensor], products: list[torch.Tensor | None], rows: torch.Tensor | None = None) -> None:
    """Adds to all rows of each total, or to some."""
    for total, product in zip(totals, products, strict=True):
        if product is not None and rows is None:
            total += product
        elif product is not None:
            total[rows] += product


def track(cond: Conditioning, names) -> Conditioning:
    """The same values, of which those of `names` are where a gradient is asked for."""
    return {name: tensor.detach().requires_grad_(name in names) for name, tensor in cond.items()}


def per_sample(values: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values[rows], shaped to multiply latents [b, ...]."""
    return values.to(like)[rows].view(-1, *[1] * (like.dim() - 1))
