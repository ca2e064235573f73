"""What a training step will cost, before it is run: the project's own code on tensors without data.

A step is linear in its sampler steps, so two short ones say what any other costs. FLOPs per sample of N steps, K of
them active, are N rollout calls, the decode with its backward pass, and K calls of the sweep, the lowest of which
needs no ∂f/∂x; memory does not depend on K but for the stored latents, or for the graphs that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from alignprop.engine.seeding import generator, generators
from alignprop.memory.accounting import Account
from alignprop.memory.residency import Residency, apply_policy
from alignprop.method import estimators
from alignprop.method.estimators import build_estimator
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import Sampler
from alignprop.models.base import Model
from alignprop.settings.memory_policies import MemoryPolicy, chunks
from alignprop.settings.resolve import estimator_options
from alignprop.weights import TrainedWeights
from rewards import WeightedReward

GIB = 2**30
# What the account does not see: workspaces of kernels, and what the allocator cannot hand out again.
MARGIN = 0.08
# A CUDA context with its libraries, which shares the GPU with the allocator.
CONTEXT = GIB // 2

Parts = Callable[[], tuple[Model, WeightedReward]]


@dataclass(frozen=True)
class Forecast:
    """The cost of training with a policy.

    Attributes:
        policy: its name.
        capacity: samples in a micro-batch of one process.
        peaks: bytes on the device at most, by phase: "encode", "denoise" (the rollout), "decode" (the VAE and the
            reward, with their backward pass), "sweep", "update".
        flops: floating point operations per sample, on average over what the estimator draws.
    """

    policy: str
    capacity: int
    peaks: dict[str, int]
    flops: float

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """Where the peak is."""
        return max(self.peaks, key=self.peaks.get)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether it does in a GPU of that size, with room for what is not counted."""
        return self.peak * (1 + MARGIN) + CONTEXT <= gpu_bytes


def forecast(
    parts: Parts, config: ConfigDict, policy: str, memory: MemoryPolicy, capacity: int, done: dict | None = None
) -> Forecast:
    """The cost of the run that `config` describes.

    Args:
        parts: makes the model and the reward on the meta device, anew for each call: a policy changes its model.
        config: resolved; its `memory` and `per_gpu_capacity` are not used.
        policy: the name to give it.
        done: short steps that were simulated for an earlier forecast of the same parts, and of a configuration that
            differs in its estimator only; this one adds its own.
    """
    train, done = config.train, {} if done is None else done
    estimator = build_estimator(config.estimator, **estimator_options(config))
    plan = estimator(_chain(train.num_inference_steps), train.total_batch_size, generator(config.seed, 0, "plan"))
    if plan.copies:  # their last step is called again with them
        memory = replace(memory, keep_steps=0)
    most_active = int(plan.active.any(dim=1).sum())
    # Chunks follow each other and cost the same, so one is enough, unless their graphs are kept.
    largest = max(memory.sweep_chunk or capacity, memory.decode_chunk or capacity)
    samples = capacity if memory.keep_steps else min(largest, capacity)

    def simulate(keep_steps: int, *counts: int) -> list[SimpleNamespace]:
        keys = [(replace(memory, keep_steps=keep_steps), samples, k, plan.copies) for k in counts]
        for key in keys:
            done[key] = done.get(key) or _simulate(parts, config, *key)
        return [done[key] for key in keys]

    kept = simulate(3, 1, 2, 3) if memory.keep_steps else simulate(0, 1, 2)
    recomputed = simulate(0, 1, 2) if 0 < memory.keep_steps < most_active else kept
    flops = _flops(kept, recomputed, plan, memory.keep_steps)
    peaks = _peaks(kept, memory, capacity, samples, most_active)
    if recomputed is not kept:
        peaks["sweep"] = max(peaks["sweep"], recomputed[-1].peaks["sweep"])
    return Forecast(policy, capacity, peaks, flops / samples)


def _flops(kept, recomputed, plan: GradientPlan, keep: int) -> float:
    """Of the simulated samples, on average over what the plan draws."""
    lowest, call = (r.flops["sweep"] for r in recomputed[:2])
    kept_lowest, kept_call = (r.flops["sweep"] for r in kept[:2])
    call, kept_call = call - lowest, kept_call - kept_lowest
    below = plan.active.int().cumsum(dim=0) - plan.active.int()  # active steps that still need λ
    into_latents = plan.active & (plan.coupling != 0) & (below > 0)
    found = []
    for k, n in zip(plan.active.sum(dim=0).tolist(), into_latents.sum(dim=0).tolist(), strict=True):
        from_rollout = min(k, keep)
        kept_n = min(n, from_rollout)
        found.append((from_rollout - kept_n) * kept_lowest + kept_n * kept_call)
        found.append((k - from_rollout - (n - kept_n)) * lowest + (n - kept_n) * call)
    rollout_calls = (plan.exit_step.clamp(max=len(plan.active) - 1) + 1).double().mean().item() + plan.copies
    one_call = kept[0].flops["denoise"] / (1 + plan.copies)
    return rollout_calls * one_call + kept[0].flops["decode"] + sum(found) / plan.active.shape[1]


def _peaks(steps, memory: MemoryPolicy, capacity: int, samples: int, most_active: int) -> dict[str, int]:
    peaks = dict(steps[-1].peaks)
    peaks.pop("", None)
    # Of the samples that are not in this chunk, and of the steps that were not simulated.
    waiting = steps[-1].per_sample * (capacity - samples)
    waiting += steps[-1].latents * (capacity * most_active - samples * len(steps))
    for phase in ("denoise", "decode", "sweep"):
        peaks[phase] += max(waiting, 0)
        if memory.keep_steps:
            slope = steps[2].peaks[phase] - steps[1].peaks[phase] - steps[2].latents * samples
            peaks[phase] += slope * (min(memory.keep_steps, most_active) - len(steps))
    return peaks


def _simulate(
    parts: Parts, config: ConfigDict, memory: MemoryPolicy, samples: int, steps: int, copies: int
) -> SimpleNamespace:
    """`AlignPropTrainer.step` for one micro-batch with so many sampler steps: all active, or the last with copies."""
    model, reward = parts()
    device = model.device = torch.device("meta")
    phases = {"encode": model.text_encoders, "denoise": [model.denoiser], "decode": [model.decoder, reward]}
    residency, account = Residency(device, phases, memory.residency, copy=True), Account("meta")
    with account:
        account.track(*(m for phase in phases.keys() - residency.leaving for m in phases[phase]))
        residency.enter("denoise")
        weights = TrainedWeights(model, config, _OneProcess())
        apply_policy(model, memory)
        for parameter in weights.parameters:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        _update(weights)  # from the second step on there are the optimizer's moments
        sampler = _chain(steps)
        rollout = Rollout(model, sampler, config.guidance_scale, guidance_grad=config.guidance_grad, memory=memory)
        with account.phase("encode"):
            residency.enter("encode")
            encode(model.text_encoders, samples)
            cond = model.blank_conditioning(samples)
            if not config.use_lora:  # autocast does not exist on meta; in float32 it is an upper limit
                cond = {name: tensor.float() for name, tensor in cond.items()}
            if config.train_text_encoder:
                cond = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in cond.items()}
        with account.phase("denoise"):
            residency.enter("denoise")
            plan = estimators.full(sampler, samples)
            if copies:
                plan = estimators.draft_lv(sampler, samples, copies=copies)
            latents = rollout(generators(range(samples), "forecast"), cond, plan)
        with account.phase("decode"):
            residency.enter("decode")
            adjoint = torch.empty_like(latents)
            for rows in chunks(len(latents), memory.decode_chunk):
                chunk = latents.detach()[rows].requires_grad_()
                scores = reward.score_terms(model.decode(chunk), [""] * len(chunk), [{}] * len(chunk))
                reward.combine(scores).sum().backward()
                adjoint[rows] = chunk.grad
                del scores, chunk
        with account.phase("sweep"):
            residency.enter("denoise")
            latents.backward(adjoint)
        if config.train_text_encoder:
            with account.phase("encode"):
                residency.enter("encode")
                encode(model.text_encoders, 2, backward=True)  # a prompt, and the empty one beside it
        with account.phase("update"):
            _update(weights)
    latent_bytes = latents[0].numel() * latents.element_size()
    cond_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in cond.values())
    return SimpleNamespace(
        peaks=account.peaks, flops=account.flops, latents=latent_bytes, per_sample=cond_bytes + 3 * latent_bytes
    )


def _chain(steps: int) -> Sampler:
    """Of no model in particular: what a step costs does not depend on its coefficients."""
    zeros, ones, falling = torch.zeros(steps), torch.ones(steps), torch.linspace(1, 0, steps + 1)
    return Sampler(torch.arange(steps), ones, ones, zeros, p=ones, q=ones, alpha=1 - falling, sigma=falling)


def _update(weights: TrainedWeights) -> None:
    weights.sum_over_processes()
    weights.optimizer.step()
    weights.zero_grad()


def encode(text_encoders: list[torch.nn.Module], samples: int, backward: bool = False) -> None:
    """Calls text encoders, where they are, as prompts of full length would; and back, through those with an adapter."""
    for encoder in text_encoders:
        length = getattr(encoder.config, "max_position_embeddings", 512)
        with torch.set_grad_enabled(backward):
            output = encoder(torch.zeros(samples, length, dtype=torch.long, device=encoder.device))[0]
        if output.requires_grad:
            output.sum().backward()


class _OneProcess:
    """As much of an `Accelerator` as the trained weights need."""

    distributed_type, num_processes, scaler = DistributedType.NO, 1, None

    def prepare(self, optimizer):
        return optimizer

    def reduce(self, tensor, reduction):
        return tensor
