"""The rollout and its adjoint sweep: a sampling chain that is one differentiable operation.

Forward, the chain runs without gradient and keeps its latents, which are small:

    x[i+1] = a[i]·x[i] + b[i]·f(x[i], t[i], c) + s[i]·z[i]

Backward, λ = ∂R/∂x[N] arrives from the decoder and the reward, and is swept down the chain. At an active step the
network is called once more, with gradient, at the stored latents:

    ∂R/∂θ += w[i] · (b[i]·λ)ᵀ ∂f/∂θ
    λ     ←  a[i]·λ + γ[i] · (b[i]·λ)ᵀ ∂f/∂x[i]

and at any other step λ ← a[i]·λ. With w = γ = 1 this is exact back-propagation, and it never holds the activations
of more than one network call, however many steps are active.
"""

from contextlib import nullcontext

import torch

from alignprop.estimators import GradientPlan
from alignprop.models.base import Conditioning, Model, select
from alignprop.samplers import Sampler
from alignprop.sharding import DTensor, is_sharded, on_any_process, release


class Rollout(torch.nn.Module):
    """Noise and conditioning in, final latents out, differentiable in the denoiser's trainable parameters.

    Where FSDP2 has spread the denoiser's weights, all processes make the same network calls.

    Args:
        model: the model whose denoiser is called.
        sampler: the chain's coefficients and timesteps.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        autocast: returns the context manager in which the network is called.
        adjoint_clip: 0 is off; else no sample's ‖λ‖ may grow past this multiple of what it is at x[N]. A ratio, so
            that loss scaling, batch size and reward units do not matter.
    """

    def __init__(self, model: Model, sampler: Sampler, guidance_scale: float, autocast=nullcontext, adjoint_clip=0.0):
        super().__init__()
        self.denoiser = model.denoiser
        self.model = model
        self.sampler = sampler
        self.guidance_scale = guidance_scale
        self.autocast = autocast
        self.adjoint_clip = adjoint_clip
        self.adjoint_norms = AdjointNorms(sampler.num_steps)

    def forward(self, generators: list[torch.Generator], cond: Conditioning, plan: GradientPlan | None) -> torch.Tensor:
        """Final latents x[N], float32 [B, ...].

        Args:
            generators: one per sample; initial noise first, then a stochastic sampler's noise step by step.
            cond: conditioning of the B samples.
            plan: which steps carry gradient; its B columns are these samples. None: no gradient.
        """
        parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        if plan is None or not parameters or not torch.is_grad_enabled():
            return self.sample(generators, cond)[-1]
        return _SampleWithSweep.apply(self, generators, cond, plan, *parameters)

    @torch.no_grad()
    def sample(self, generators, cond, keep_from: int | None = None) -> list[torch.Tensor]:
        """The latents x[keep_from] … x[N]; only x[N] when `keep_from` is None."""
        num_steps = self.sampler.num_steps
        keep_from = num_steps if keep_from is None else keep_from
        latents = self.model.init_latents(generators)
        kept = [latents] if keep_from == 0 else []
        for i in range(num_steps):
            latents = self._step(i, latents, cond, generators)
            if i + 1 >= keep_from:
                kept.append(latents)
        if is_sharded(self.denoiser):
            release(self.denoiser)
        return kept

    def _step(self, i, latents, cond, generators):
        a, b, s = (float(c[i]) for c in (self.sampler.a, self.sampler.b, self.sampler.s))
        next_latents = a * latents + b * self._denoise(i, latents, cond)
        if self.sampler.is_stochastic:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
            next_latents = next_latents + s * noise.to(latents)
        return next_latents

    def _denoise(self, i, latents, cond):
        timestep = self.sampler.timesteps[i].to(latents.device)
        with self.autocast():
            model_output = self.model.predict(latents, timestep, cond, self.guidance_scale)
        # The chain itself runs in the latents' precision: half precision would lose small steps of a long chain.
        return model_output.to(latents.dtype)

    def network_calls(self, plan: GradientPlan) -> torch.Tensor:
        """bool [2, N]: at which steps the sweep calls the network, and at which of them it also needs ∂f/∂x."""
        steps = range(self.sampler.num_steps)
        # Below its lowest active step no sample needs λ, so the last call skips ∂f/∂x.
        needs_input = [bool((plan.active[:i] & plan.active[i] & (plan.coupling[i] != 0)).any()) for i in steps]
        calls = torch.stack([plan.active.any(dim=1), torch.tensor(needs_input)])
        return on_any_process(calls, self.denoiser.device) if is_sharded(self.denoiser) else calls

    def sweep(self, adjoint, trajectory, cond, plan: GradientPlan, calls, parameters) -> list[torch.Tensor | None]:
        """Sweeps λ from x[N] down to the lowest step with a network call.

        Args:
            adjoint: λ = ∂R/∂x[N], [B, ...].
            trajectory: the stored latents from that step on, … x[N-1].
            cond, plan: as in `forward`.
            calls: `network_calls(plan)`.
            parameters: the trainable tensors.

        Returns:
            ∂R/∂θ for each of `parameters`, summed over the samples; zeros where no step is active. None for those
            that FSDP2 has spread: it adds their gradients, averaged over the processes, to `.grad` by itself.
        """
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        gradients = [torch.zeros_like(p) for p in whole]
        limit = self.adjoint_clip * _norms(adjoint)
        first = self.sampler.num_steps - len(trajectory)
        for i in reversed(range(first, self.sampler.num_steps)):
            self.adjoint_norms.add(i + 1, adjoint, plan.active[: i + 1].any(dim=0))
            a, b = float(self.sampler.a[i]), float(self.sampler.b[i])
            active = plan.active[i].nonzero().squeeze(1).to(adjoint.device)
            carried = a * adjoint
            if calls[0, i]:
                # Where only other processes need this call, a sample takes part in it with nothing to add.
                rows = active if len(active) else active.new_zeros(1)
                weight, coupling = (_per_sample(t[i], rows, adjoint) for t in (plan.weight, plan.coupling))
                vector = weight * b * adjoint[rows] * bool(len(active))
                latents = trajectory[i - first][rows].requires_grad_(bool(calls[1, i]))
                *products, into_latents = self._products(i, latents, select(cond, rows), vector, whole)
                for gradient, product in zip(gradients, products, strict=True):
                    if product is not None:
                        gradient += product
                if len(active) and latents.requires_grad:
                    carried[rows] += coupling / weight * into_latents
            adjoint = _limit_norms(carried, limit) if self.adjoint_clip else carried
        return gradients or [None] * len(parameters)

    def _products(self, i, latents, cond, vector, parameters) -> list[torch.Tensor | None]:
        """vectorᵀ ∂f/∂θ for each of `parameters`, and at last vectorᵀ ∂f/∂x if `latents` require it, else None."""
        with torch.enable_grad():
            model_output = self._denoise(i, latents, cond)
        if not parameters:
            # `torch.autograd.grad` would bypass the hooks with which FSDP2 averages and spreads gradients.
            model_output.backward(vector)
            return [latents.grad]
        inputs = [*parameters, latents] if latents.requires_grad else parameters
        products = torch.autograd.grad(model_output, inputs, vector, allow_unused=True)
        return [*products, *[None] * (len(parameters) + 1 - len(products))]


class _SampleWithSweep(torch.autograd.Function):
    """x[N] as a function of the trainable parameters, with the sweep as its backward."""

    @staticmethod
    def forward(ctx, rollout, generators, cond, plan, *parameters):
        ctx.calls = rollout.network_calls(plan)
        steps = ctx.calls[0].nonzero()
        *ctx.trajectory, latents = rollout.sample(generators, cond, int(steps[0]) if len(steps) else len(plan.active))
        ctx.rollout, ctx.cond, ctx.plan, ctx.parameters = rollout, cond, plan, parameters
        return latents

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, adjoint):
        gradients = ctx.rollout.sweep(adjoint, ctx.trajectory, ctx.cond, ctx.plan, ctx.calls, ctx.parameters)
        return None, None, None, None, *gradients


class AdjointNorms:
    """Running mean of ‖λ‖ at each of x[0] … x[N], over the samples whose gradient still needs it there."""

    def __init__(self, num_steps: int):
        self.totals = torch.zeros(2, num_steps + 1, dtype=torch.float64)  # sums, counts

    def add(self, i: int, adjoint: torch.Tensor, samples: torch.Tensor) -> None:
        self.totals[0, i] += _norms(adjoint)[samples.to(adjoint.device)].sum().item()
        self.totals[1, i] += samples.sum().item()

    def take(self) -> torch.Tensor:
        """Sums and counts, float64 [2, N+1], since the last call."""
        totals, self.totals = self.totals, torch.zeros_like(self.totals)
        return totals


def _norms(adjoint: torch.Tensor) -> torch.Tensor:
    return adjoint.flatten(1).float().norm(dim=1)


def _per_sample(values: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values[rows], shaped to multiply latents [b, ...]."""
    return values.to(like)[rows].view(-1, *[1] * (like.dim() - 1))


def _limit_norms(adjoint: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    scale = (limit / _norms(adjoint).clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)
    return adjoint * scale.to(adjoint).view(-1, *[1] * (adjoint.dim() - 1))
