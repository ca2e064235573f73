"""The rollout and its adjoint sweep: a sampling chain that is one differentiable operation.

Forward, the chain runs without gradient and keeps its latents, which are small:

    x[i+1] = a[i]·x[i] + b[i]·f(x[i], t[i], c) + s[i]·z[i]

Backward, λ = ∂R/∂x[N] arrives from the decoder and the reward, and is swept down the chain (sweep.py): at the steps
that a plan makes active, the network is called once more, with gradient, at the stored latents. A sample that leaves
the chain at step i has x̂0 = p[i]·x[i] + q[i]·f(x[i]) instead of x[N], so p and q take the place of a and b there.
Where there is memory to spare, calls of the rollout may keep their graph for the sweep instead.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from alignprop.engine.sharding import is_sharded, on_any_process, release
from alignprop.method.adjoint import AdjointNorms
from alignprop.method.guidance import Graph, GuidedDenoiser
from alignprop.method.plans import GradientPlan
from alignprop.method.samplers import Sampler
from alignprop.method.sweep import Trajectory, per_sample, sweep, track
from alignprop.models.base import Conditioning, Model, select
from alignprop.settings.memory_policies import MemoryPolicy, chunks


class Rollout(torch.nn.Module):
    """Noise and conditioning in, final latents out, differentiable in the denoiser's trainable parameters, and in
    those tensors of the conditioning that require a gradient.

    Where FSDP2 has spread the denoiser's weights, all processes make the same network calls.

    Args:
        model: the model whose denoiser is called.
        sampler: the chain's coefficients and timesteps.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        autocast: returns the context manager in which the network is called.
        adjoint_clip: 0 is off; else no sample's ‖λ‖ may grow past this multiple of what it is at x[N]. A ratio, so
            that loss scaling, batch size and reward units do not matter.
        guidance_grad: which branches of guidance carry gradient, "both" or "cond" (method/guidance.py).
        memory: its `sweep_chunk`, `guidance_batching` and `keep_steps` count here.
        lora_scale_at: how much the denoiser's LoRA counts at each timestep (guidance.py).
    """

    def __init__(
        self, model: Model, sampler: Sampler, guidance_scale: float, autocast=nullcontext, adjoint_clip: float = 0.0,
        guidance_grad: str = "both", memory: MemoryPolicy | None = None, lora_scale_at=None,
    ):  # fmt: skip
        super().__init__()
        self.denoiser = model.denoiser
        self.model = model
        self.sampler = sampler
        self.adjoint_clip = adjoint_clip
        self.memory = memory or MemoryPolicy()
        self.f = GuidedDenoiser(
            model, guidance_scale, autocast, self.memory.guidance_batching, guidance_grad, lora_scale_at
        )
        self.adjoint_norms = AdjointNorms(sampler.num_steps)

    def forward(self, generators: list[torch.Generator], cond: Conditioning, plan: GradientPlan | None) -> torch.Tensor:
        """Final latents, float32 [B, ...]: x[N], or x̂0 of samples that leave the chain early.

        Args:
            generators: one per sample; initial noise first, then a stochastic sampler's noise step by step, then that
                of copies.
            cond: conditioning of the B samples.
            plan: which steps carry gradient; its B columns are these samples. None: no gradient. With copies, each
                sample's are next to it: [B·(1 + copies), ...].
        """
        parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        trained = [*parameters, *(tensor for tensor in cond.values() if tensor.requires_grad)]
        with_sweep = plan is not None and trained and torch.is_grad_enabled()
        latents = []
        for rows in chunks(len(generators), self.memory.sweep_chunk):
            chunk = generators[rows], select(cond, rows)
            if with_sweep:
                tracked = [tensor for tensor in chunk[1].values() if tensor.requires_grad]
                latents.append(_SampleWithSweep.apply(self, *chunk, plan.select(rows), *tracked, *parameters))
            else:
                latents.append(self.sample(*chunk)[0])
        return torch.cat(latents)

    @torch.no_grad()
    def sample(self, generators, cond, plan=None, calls=None, on_step=None) -> tuple[torch.Tensor, Trajectory]:
        """The final latents, and what the sweep of `plan`, with its `network_calls`, needs of the way there.

        `on_step`, if any, is called with (i, x[i], f, x[i+1]) after each step.
        """
        active = [] if plan is None else calls[0].nonzero().squeeze(1).tolist()
        to_keep = active[max(len(active) - self.memory.keep_steps, 0) :] if plan and not plan.copies else []
        tracked = [name for name, tensor in cond.items() if tensor.requires_grad]
        trajectory = Trajectory(active[0] if active else self.sampler.num_steps, tracked)
        latents = self.model.init_latents(generators)
        for i in range(self.sampler.num_steps):
            if i >= trajectory.first:
                trajectory.stored[i] = latents
            rows = None if plan is None or not plan.leaves_early else self._still_in(i, plan)
            if rows is not None and not len(rows):
                break
            if i in to_keep:
                kept = self._keep(i, latents, cond, plan.active[i], bool(calls[1, i]), tracked)
                model_output, trajectory.kept[i] = kept
            elif rows is None:
                model_output = self.f(latents, self.timestep(i, latents), cond)
            else:
                model_output = torch.zeros_like(latents)
                rows = rows.to(latents.device)
                model_output[rows] = self.f(latents[rows], self.timestep(i, latents), select(cond, rows))
            next_latents = self.next_latents(i, latents, model_output, generators, plan)
            if on_step:
                on_step(i, latents, model_output, next_latents)
            latents = next_latents
        if is_sharded(self.denoiser):
            release(self.denoiser)
        return latents, trajectory

    def _still_in(self, i: int, plan: GradientPlan) -> torch.Tensor:
        """The samples that need step i, int [b]; where FSDP2 has spread the weights, all: others may need the call."""
        rows = (plan.exit_step >= i).nonzero().squeeze(1)
        return torch.arange(len(plan.exit_step)) if is_sharded(self.denoiser) else rows

    def next_latents(self, i: int, latents, model_output, generators, plan=None) -> torch.Tensor:
        """x[i+1] of x[i] and f; a stochastic sampler draws from the generators."""
        a, b, s = self.coefficients(i, plan, latents)
        next_latents = a * latents + b * model_output
        if self.sampler.is_stochastic:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
            next_latents = next_latents + s * noise.to(latents)
        return next_latents

    def coefficients(self, i: int, plan: GradientPlan | None, like: torch.Tensor):
        """a, b and s of step i; p, q and 0 of samples that leave the chain there; 1, 0 and 0 of those that have."""
        chain = [float(c[i]) for c in (self.sampler.a, self.sampler.b, self.sampler.s)]
        if plan is None or not plan.leaves_early:
            return chain
        leaving = (float(self.sampler.p[i]), float(self.sampler.q[i]), 0.0)
        exits, all_samples = plan.exit_step, torch.arange(len(plan.exit_step))
        table = torch.tensor([(1.0, 0.0, 0.0), leaving, chain], dtype=torch.float64)
        return [per_sample(column, all_samples, like) for column in table[1 + (exits - i).sign()].T]

    def with_copies(self, latents, trajectory, generators, cond, plan) -> tuple[torch.Tensor, Trajectory]:
        """x̂0 of the samples, each followed by those of its copies, and the trajectory of them all.

        A copy is x = α·x̂0 + σ·z at the level of the exit step.
        """
        i, sampler = int(plan.exit_step[0]), self.sampler
        noise = torch.stack([torch.randn((plan.copies, *latents.shape[1:]), generator=g) for g in generators])
        renoised = float(sampler.alpha[i]) * latents[:, None] + float(sampler.sigma[i]) * noise.to(latents)
        with_copies = torch.cat([trajectory.stored[i][:, None], renoised], dim=1).flatten(0, 1)
        samples = torch.arange(len(latents)).repeat_interleave(plan.copies)
        copies = renoised.flatten(0, 1)
        model_output = self.f(copies, self.timestep(i, copies), select(cond, samples.to(latents.device)))
        predicted = float(sampler.p[i]) * copies + float(sampler.q[i]) * model_output
        finals = torch.cat([latents[:, None], predicted.view_as(renoised)], dim=1).flatten(0, 1)
        return finals, replace(trajectory, stored={i: with_copies})

    def timestep(self, i, latents):
        return self.sampler.timesteps[i].to(latents.device)

    def _keep(self, i, latents, cond, active, needs_input, tracked) -> tuple[torch.Tensor, Graph]:
        """f of all samples, and its graph for those that are active."""
        t, model_output = self.timestep(i, latents), torch.empty_like(latents)
        rows, others = (flags.nonzero().squeeze(1).to(latents.device) for flags in (active, ~active))
        active_cond = track(select(cond, rows), tracked)
        model_output[rows], graph = self.f.with_graph(latents[rows], t, active_cond, needs_input)
        if len(others):
            model_output[others] = self.f(latents[others], t, select(cond, others))
        return model_output, graph

    def network_calls(self, plan: GradientPlan) -> torch.Tensor:
        """bool [2, N]: at which steps the sweep calls the network, and at which of them it also needs ∂f/∂x."""
        steps = range(self.sampler.num_steps)
        # Below its lowest active step no sample needs λ, so the last call skips ∂f/∂x.
        needs_input = [bool((plan.active[:i] & plan.active[i] & (plan.coupling[i] != 0)).any()) for i in steps]
        calls = torch.stack([plan.active.any(dim=1), torch.tensor(needs_input)])
        return on_any_process(calls, self.denoiser.device) if is_sharded(self.denoiser) else calls


class _SampleWithSweep(torch.autograd.Function):
    """x[N] as a function of what is tracked of the conditioning and of the trainable parameters.

    Its backward is the sweep. The latents of the way are saved as autograd saves tensors, so that a second backward
    pass needs `retain_graph=True` in the first, as everywhere.
    """

    @staticmethod
    def forward(ctx, rollout, generators, cond, plan, *tensors):
        ctx.rollout, ctx.cond, ctx.plan, ctx.drawn_plan = rollout, cond, plan, plan
        ctx.calls = rollout.network_calls(plan)
        latents, trajectory = rollout.sample(generators, cond, plan, ctx.calls)
        ctx.parameters = tensors[len(trajectory.tracked) :]
        if plan.copies:
            latents, trajectory = rollout.with_copies(latents, trajectory, generators, cond, plan)
            ctx.cond, ctx.plan = select(cond, plan.repeated.to(latents.device)), plan.with_copies()
        ctx.steps = list(trajectory.stored)
        ctx.save_for_backward(*trajectory.stored.values())
        ctx.trajectory = replace(trajectory, stored={})
        return latents

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, adjoint):
        try:
            stored = dict(zip(ctx.steps, ctx.saved_tensors, strict=True))
        except RuntimeError as error:
            raise RuntimeError(
                "a second backward pass through one rollout, whose latents the first one has freed; give "
                "retain_graph=True to the first, or sample again"
            ) from error
        trajectory = replace(ctx.trajectory, stored=stored)
        into_cond, gradients = sweep(ctx.rollout, adjoint, trajectory, ctx.cond, ctx.plan, ctx.calls, ctx.parameters)
        return None, None, None, None, *map(ctx.drawn_plan.total, into_cond), *gradients
