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


class Rollout(torch.nn.Module):
    """Noise and conditioning in, final latents out, differentiable in the denoiser's trainable parameters.

    Its only submodule is the denoiser, so accelerate and DistributedDataParallel prepare it like any other module.

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

    def sweep(self, adjoint, trajectory, cond, plan: GradientPlan, parameters) -> list[torch.Tensor]:
        """Sweeps λ from x[N] down to the lowest active step.

        Args:
            adjoint: λ = ∂R/∂x[N], [B, ...].
            trajectory: the stored latents x[first_active] … x[N-1].
            cond, plan: as in `forward`.
            parameters: the trainable tensors.

        Returns:
            ∂R/∂θ for each of `parameters`, summed over the samples; zeros where no step is active.
        """
        gradients = [torch.zeros_like(p) for p in parameters]
        limit = self.adjoint_clip * _norms(adjoint)
        first = plan.first_active
        for i in reversed(range(first, self.sampler.num_steps)):
            self.adjoint_norms.add(i + 1, adjoint, plan.active[: i + 1].any(dim=0))
            a, b = float(self.sampler.a[i]), float(self.sampler.b[i])
            rows = plan.active[i].nonzero().squeeze(1).to(adjoint.device)
            carried = a * adjoint
            if len(rows):
                weight, coupling = (_per_sample(t[i], rows, adjoint) for t in (plan.weight, plan.coupling))
                # Below its lowest active step no sample needs λ, so the last call skips ∂f/∂x.
                needs_input = bool((plan.active[:i] & plan.active[i] & (plan.coupling[i] != 0)).any())
                latents = trajectory[i - first][rows].requires_grad_(needs_input)
                with torch.enable_grad():
                    model_output = self._denoise(i, latents, select(cond, rows))
                inputs = [*parameters, latents] if needs_input else list(parameters)
                products = torch.autograd.grad(model_output, inputs, weight * b * adjoint[rows], allow_unused=True)
                for gradient, product in zip(gradients, products, strict=False):
                    if product is not None:
                        gradient += product
                if needs_input:
                    carried[rows] += coupling / weight * products[-1]
            adjoint = _limit_norms(carried, limit) if self.adjoint_clip else carried
        return gradients


class _SampleWithSweep(torch.autograd.Function):
    """x[N] as a function of the trainable parameters, with the sweep as its backward."""

    @staticmethod
    def forward(ctx, rollout, generators, cond, plan, *parameters):
        *ctx.trajectory, latents = rollout.sample(generators, cond, keep_from=plan.first_active)
        ctx.rollout, ctx.cond, ctx.plan, ctx.parameters = rollout, cond, plan, parameters
        return latents

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, adjoint):
        gradients = ctx.rollout.sweep(adjoint, ctx.trajectory, ctx.cond, ctx.plan, ctx.parameters)
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
