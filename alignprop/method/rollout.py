"""The rollout and its adjoint sweep: a sampling chain that is one differentiable operation.

The forward pass runs the chain without gradient and keeps its latents, which are small:

    x[i+1] = a[i]·x[i] + Σ_{m≤i} b[i,m]·f[m] + Σ_{k≤i} s[i,k]·z[k],     f[i] = f(scale[i]·x[i], t[i], c)

The backward pass gets λ = ∂R/∂x[N] from the decoder and the reward, and sweeps it down the chain (sweep.py). At the
steps that a plan makes active, it calls the network once more, with gradient, at the stored latents. If memory allows,
the last active calls of the rollout keep their graphs for the sweep, and these steps need no second call.

A sample that leaves the chain at step i ends with x̂0 = p[i]·x[i] + q[i]·f[i] instead of x[N], so p and q take the place
of a and b at that step.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch

from alignprop.engine.sharding import is_sharded, on_any_process, release
from alignprop.method.adjoint import AdjointNorms
from alignprop.method.chain import Past, Sampler
from alignprop.method.guidance import Graph, GuidedDenoiser
from alignprop.method.plans import GradientPlan
from alignprop.method.prefix_cache import FULL_CALLS, PrefixCache
from alignprop.method.sweep import Trajectory, sweep, track
from alignprop.models.base import Conditioning, Model, select
from alignprop.settings.memory_policies import MemoryPolicy, chunks


class Rollout(torch.nn.Module):
    """The sampling chain as a module: it maps noise and conditioning to final latents.

    The final latents are differentiable with respect to the denoiser's trainable parameters and to the tensors of the
    conditioning that require a gradient. If FSDP2 has spread the denoiser's weights, all processes make the same
    network calls.

    Args:
        model: the model whose denoiser is called.
        sampler: the chain's coefficients and timesteps.
        guidance_scale: the strength of classifier-free guidance. 1 means no guidance.
        autocast: returns the context manager in which the network is called.
        adjoint_clip: the largest allowed ratio of a sample's ‖λ‖ to its ‖λ‖ at its final latents; a larger λ is scaled
            down. 0 turns the limit off. It is a ratio so that loss scaling, batch size and reward units do not matter.
        guidance_grad: the branches of guidance that carry gradient, "both" or "cond" (method/guidance.py).
        memory: the memory policy. `sweep_chunk`, `guidance_batching` and `keep_steps` have an effect here.
        lora_scale_at: returns the scale of the denoiser's LoRA at a timestep (method/guidance.py).
        guidance_interval: the part of the chain with guidance, (from, to) in shares of its steps. Step i is in it if
            from <= (i + 0.5)/N < to.
        prefix_cache: makes the network calls before the first call with gradient cheaper, if there is a plan. This is
            the first one of the whole batch, so that the result does not depend on how the batch is divided.
    """

    def __init__(
        self, model: Model, sampler: Sampler, guidance_scale: float, autocast=nullcontext, adjoint_clip: float = 0.0,
        guidance_grad: str = "both", memory: MemoryPolicy | None = None, lora_scale_at=None,
        guidance_interval: tuple[float, float] = (0.0, 1.0), prefix_cache: PrefixCache | None = None,
    ):  # fmt: skip
        super().__init__()
        self.denoiser = model.denoiser
        self.model = model
        self.sampler = sampler
        self.adjoint_clip = adjoint_clip
        self.memory = memory or MemoryPolicy()
        self.f = GuidedDenoiser(
            model, guidance_scale, autocast, self.memory.guidance_batching, guidance_grad, lora_scale_at,
            sampler.within(guidance_interval) if guidance_scale != 1 else None, prefix_cache,
        )  # fmt: skip
        self.prefix_cache = prefix_cache
        self.adjoint_norms = AdjointNorms(sampler.num_steps)

    def forward(self, generators: list[torch.Generator], cond: Conditioning, plan: GradientPlan | None) -> torch.Tensor:
        """Returns the final latents, float32 [B, ...]: x[N], or x̂0 for samples that leave the chain early.

        Args:
            generators: one for each sample. Each draws the initial noise, then a stochastic sampler's noise step by
                step, then the noise of the copies.
            cond: the conditioning of the B samples.
            plan: which steps carry gradient; its B columns are these samples. None means no gradient. If the plan has
                copies, the result is [B·(1 + copies), ...], and each sample is followed by its copies.
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
        """Runs the chain; returns the final latents and the trajectory that the sweep needs.

        Args:
            generators: as in `forward`.
            cond: as in `forward`.
            plan: as in `forward`.
            calls: `network_calls(plan)`, if there is a plan.
            on_step: called with (i, x[i], f, x[i+1]) after each step, if given.
        """
        active = [] if plan is None else calls[0].nonzero().squeeze(1).tolist()
        to_keep = active[max(len(active) - self.memory.keep_steps, 0) :] if plan and not plan.copies else []
        tracked = [name for name, tensor in cond.items() if tensor.requires_grad]
        trajectory = Trajectory(active[0] if active else self.sampler.num_steps, tracked)
        latents, past = self.start(generators), Past(self.sampler, generators)
        prefix_end = 0 if plan is None else plan.steps_before_gradient
        with ExitStack() as prefix:
            if self.prefix_cache and prefix_end > FULL_CALLS:
                prefix.enter_context(self.prefix_cache.on())
            for i in range(self.sampler.num_steps):
                if i == prefix_end:
                    prefix.close()
                rows = None if plan is None or not plan.leaves_early else self._still_in(i, plan)
                if rows is not None and not len(rows):
                    break
                if i >= trajectory.first:
                    trajectory.stored[i] = latents
                if i in to_keep:
                    kept = self._keep(i, latents, cond, plan.active[i], bool(calls[1, i]), tracked)
                    model_output, trajectory.kept[i] = kept
                else:
                    model_output = self._output(i, latents, cond, rows)
                next_latents = self.next_latents(i, latents, model_output, past, plan)
                if on_step:
                    on_step(i, latents, model_output, next_latents)
                latents = next_latents
        if is_sharded(self.denoiser):
            release(self.denoiser)
        return latents, trajectory

    def _output(self, i: int, latents: torch.Tensor, cond: Conditioning, rows: torch.Tensor | None) -> torch.Tensor:
        """Returns f[i] of the samples `rows`, int [b], and zeros for the others; None means all samples."""
        if rows is None:
            return self.f(*self.inputs(i, latents), cond)
        model_output, rows = torch.zeros_like(latents), rows.to(latents.device)
        model_output[rows] = self.f(*self.inputs(i, latents[rows]), select(cond, rows))
        return model_output

    def _still_in(self, i: int, plan: GradientPlan) -> torch.Tensor:
        """Returns the samples that need step i, int [b].

        These are all samples if FSDP2 has spread the weights, because another process may need the call.
        """
        rows = (plan.exit_step >= i).nonzero().squeeze(1)
        return torch.arange(len(plan.exit_step)) if is_sharded(self.denoiser) else rows

    def start(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Draws x[0]."""
        return self.sampler.start * self.model.init_latents(generators)

    def inputs(self, i: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the latents as the network sees them in step i, and its time input."""
        return float(self.sampler.scale[i]) * latents, self.sampler.timesteps[i].to(latents.device)

    def next_latents(self, i: int, latents, model_output, past: Past, plan=None) -> torch.Tensor:
        """Returns x[i+1] from x[i] and f[i]; adds f[i] and the noise of this step to `past`."""
        past.add(i, model_output)
        a, outputs, noises = self.sampler.coefficients(i, plan and plan.early_exits, latents)
        terms = [b * past.outputs[m] for m, b in outputs.items()] + [s * past.noises[k] for k, s in noises.items()]
        past.forget(i)
        return sum(terms, a * latents)

    def with_copies(self, latents, trajectory, generators, cond, plan) -> tuple[torch.Tensor, Trajectory]:
        """Returns x̂0 of each sample followed by x̂0 of its copies, and the trajectory of samples and copies.

        A copy is x = α·x̂0 + σ·z at the noise level of the exit step. Its x̂0 is what this step predicts from that x.

        Args:
            latents: x̂0 of the samples at the exit step, [B, ...].
            trajectory: the trajectory of the samples, which ends at the exit step.
            generators: as in `forward`.
            cond: as in `forward`.
            plan: as in `forward`.
        """
        i, sampler = int(plan.exit_step[0]), self.sampler
        noise = torch.stack([torch.randn((plan.copies, *latents.shape[1:]), generator=g) for g in generators])
        renoised = float(sampler.alpha[i]) * latents[:, None] + float(sampler.sigma[i]) * noise.to(latents)
        with_copies = torch.cat([trajectory.stored[i][:, None], renoised], dim=1).flatten(0, 1)
        samples = torch.arange(len(latents)).repeat_interleave(plan.copies)
        copies = renoised.flatten(0, 1)
        model_output = self.f(*self.inputs(i, copies), select(cond, samples.to(latents.device)))
        predicted = float(sampler.p[i]) * copies + float(sampler.q[i]) * model_output
        finals = torch.cat([latents[:, None], predicted.view_as(renoised)], dim=1).flatten(0, 1)
        return finals, replace(trajectory, stored={i: with_copies})

    def _keep(self, i, latents, cond, active, needs_input, tracked) -> tuple[torch.Tensor, Graph]:
        """Returns f of all samples, and the graph of f for the active samples."""
        model_output = torch.empty_like(latents)
        rows, others = (flags.nonzero().squeeze(1).to(latents.device) for flags in (active, ~active))
        active_cond = track(select(cond, rows), tracked)
        model_output[rows], graph = self.f.with_graph(*self.inputs(i, latents[rows]), active_cond, needs_input)
        if len(others):
            model_output[others] = self.f(*self.inputs(i, latents[others]), select(cond, others))
        return model_output, graph

    def network_calls(self, plan: GradientPlan) -> torch.Tensor:
        """Returns bool [2, N]: at which steps the sweep calls the network, and at which of them it needs ∂f/∂x.

        If FSDP2 has spread the weights, a step counts if any process needs it.
        """
        steps = range(self.sampler.num_steps)
        # A sample needs no λ below its lowest active step, so its network call there needs no ∂f/∂x.
        needs_input = [bool((plan.active[:i] & plan.active[i] & (plan.coupling[i] != 0)).any()) for i in steps]
        calls = torch.stack([plan.active.any(dim=1), torch.tensor(needs_input)])
        return on_any_process(calls, self.denoiser.device) if is_sharded(self.denoiser) else calls


class _SampleWithSweep(torch.autograd.Function):
    """The final latents as a function of the tracked conditioning tensors and the trainable parameters.

    The backward pass is the sweep. The chain's latents are saved with `save_for_backward`. So a second backward pass
    needs `retain_graph=True` in the first one, as for any autograd function.
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
                "the first backward pass through this rollout has freed its latents; pass retain_graph=True to the "
                "first backward pass, or sample again"
            ) from error
        trajectory = replace(ctx.trajectory, stored=stored)
        into_cond, gradients = sweep(ctx.rollout, adjoint, trajectory, ctx.cond, ctx.plan, ctx.calls, ctx.parameters)
        return None, None, None, None, *map(ctx.drawn_plan.total, into_cond), *gradients
