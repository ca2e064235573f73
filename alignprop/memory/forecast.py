"""What a training step will cost, before it is run: the run's own code on tensors without data.

A step is linear in its sampler steps, so two short ones say what any other costs. FLOPs per sample of N steps, K of
them active, are N rollout calls, the decode with its backward pass, and K calls of the sweep, the lowest of which
needs no ∂f/∂x. To these come what `kl_coeff` calls and, where text encoders are trained, what they do. Memory does not
depend on K but for the stored latents, or for the graphs that are kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from alignprop.engine.seeding import generator, generators
from alignprop.evaluation.judges import Judges
from alignprop.memory.accounting import Account
from alignprop.memory.checkpointing import apply_policy
from alignprop.memory.residency import Residency, phases_of
from alignprop.method.estimators import build_estimator
from alignprop.method.gradient import RewardGradient
from alignprop.method.plans import GradientPlan
from alignprop.method.rollout import Rollout
from alignprop.method.samplers import Sampler
from alignprop.models.base import Conditioning, Model
from alignprop.settings.memory_policies import MemoryPolicy
from alignprop.settings.resolve import estimator_options, gradient_options, rollout_options
from alignprop.weights import TrainedWeights

GIB = 2**30
# What the account does not see: workspaces of kernels, and what the allocator cannot hand out again.
MARGIN = 0.08
# A CUDA context with its libraries, which shares the GPU with the allocator.
CONTEXT = GIB // 2

Build = Callable[[], tuple[Model, Judges]]
"""Makes the model and its judges on the meta device, anew for each call: a policy changes its model."""


@dataclass(frozen=True)
class Forecast:
    """The cost of training with a policy.

    Attributes:
        policy: its name.
        capacity: samples in a micro-batch of one process.
        peaks: bytes on the device at most, by phase: "encode", "denoise" (the rollout), "decode" (the VAE and the
            reward, with their backward pass), "sweep", "compare" (with the base model, for `kl_coeff`), "update",
            "measure" (the rewards that only an evaluation measures).
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


class _Short(NamedTuple):
    """The cost of a micro-batch with few sampler steps.

    Attributes:
        peaks, flops: by phase.
        latents, picture, waiting: bytes of a sample's latents, of its picture, and of all that waits for its turn.
    """

    peaks: dict[str, int]
    flops: dict[str, int]
    latents: int
    picture: int
    waiting: int


def forecast(
    build: Build, config: ConfigDict, policy: str, memory: MemoryPolicy, capacity: int, done: dict | None = None
) -> Forecast:
    """The cost of the run that `config` describes.

    Args:
        config: resolved; its `memory` and `per_gpu_capacity` are not used.
        policy: the name to give it.
        done: short steps that were simulated for an earlier forecast of the same networks, and of a configuration
            that differs in its estimator only; this one adds its own.
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
    prompts = capacity if config.train_text_encoder else 1  # else they are remembered

    def simulate(keep_steps: int, *counts: int) -> list[_Short]:
        keys = [(replace(memory, keep_steps=keep_steps), samples, prompts, k, plan.copies) for k in counts]
        for key in keys:
            done[key] = done.get(key) or _simulate(build, config, *key)
        return [done[key] for key in keys]

    kept = simulate(3, 1, 2, 3) if memory.keep_steps else simulate(0, 1, 2)
    recomputed = simulate(0, 1, 2) if 0 < memory.keep_steps < most_active else kept
    flops = _flops(kept, recomputed, plan, memory.keep_steps) / samples
    if config.train_text_encoder:
        flops += kept[0].flops["encode"] / capacity
    peaks = _peaks(kept, memory, capacity, samples, most_active)
    if recomputed is not kept:
        peaks["sweep"] = max(peaks["sweep"], recomputed[-1].peaks["sweep"])
    return Forecast(policy, capacity, peaks, flops)


def _flops(kept: list[_Short], recomputed: list[_Short], plan: GradientPlan, keep: int) -> float:
    """Of the simulated samples, on average over what the plan draws; without the text encoders."""
    lowest, call = (short.flops["sweep"] for short in recomputed[:2])
    kept_lowest, kept_call = (short.flops["sweep"] for short in kept[:2])
    call, kept_call = call - lowest, kept_call - kept_lowest
    below = plan.active.int().cumsum(dim=0) - plan.active.int()  # active steps that still need λ
    into_latents = plan.active & (plan.coupling != 0) & (below > 0)
    sweeps = []
    for k, n in zip(plan.active.sum(dim=0).tolist(), into_latents.sum(dim=0).tolist(), strict=True):
        from_rollout = min(k, keep)
        kept_n = min(n, from_rollout)
        sweeps.append((from_rollout - kept_n) * kept_lowest + kept_n * kept_call)
        sweeps.append((k - from_rollout - (n - kept_n)) * lowest + (n - kept_n) * call)
    rollout_calls = (plan.exit_step.clamp(max=len(plan.active) - 1) + 1).double().mean().item() + plan.copies
    one_call = kept[0].flops["denoise"] / (1 + plan.copies)
    others = kept[0].flops["decode"] + kept[0].flops.get("compare", 0)
    return rollout_calls * one_call + others + sum(sweeps) / plan.active.shape[1]


def _peaks(shorts: list[_Short], memory: MemoryPolicy, capacity: int, samples: int, most_active: int) -> dict[str, int]:
    last = shorts[-1]
    peaks = {phase: peak for phase, peak in last.peaks.items() if phase}
    # Of the samples that are not in this chunk, and of the steps that were not simulated.
    waiting = last.waiting * (capacity - samples)
    waiting += last.latents * (capacity * most_active - samples * len(shorts))
    for phase in ("denoise", "decode", "sweep"):
        peaks[phase] += max(waiting, 0)
        if memory.keep_steps:
            slope = shorts[2].peaks[phase] - shorts[1].peaks[phase] - last.latents * samples
            peaks[phase] += slope * (min(memory.keep_steps, most_active) - len(shorts))
    if "compare" in peaks:
        peaks["compare"] += last.waiting * (capacity - samples)
    if "measure" in peaks:
        peaks["measure"] += last.picture * (capacity - samples)
    return peaks


def _simulate(
    build: Build, config: ConfigDict, memory: MemoryPolicy, samples: int, prompts: int, steps: int, copies: int
) -> _Short:
    """A micro-batch with so many sampler steps, an update, and the measures of an evaluation, counted."""
    model, judges = build()
    device = model.device = torch.device("meta")
    residency = Residency(device, phases_of(model, judges), memory.residency, copy=True)
    account = Account("meta")

    @contextmanager
    def phases(phase: str) -> Iterator[None]:
        with account.phase(phase), residency(phase):
            yield

    with account:
        account.track(*(m for phase in residency.phases.keys() - residency.leaving for m in residency.phases[phase]))
        with residency("denoise"):
            weights = TrainedWeights(model, config, _OneProcess())
            apply_policy(model, memory)
            for parameter in weights.parameters:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            _update(weights)  # from the second step on there are the optimizer's moments
        reader = _WithoutTokens(model, prompts, in_float32=not config.use_lora)
        rollout = Rollout(model, _chain(steps), memory=memory, **rollout_options(config))
        gradient = RewardGradient(
            reader, rollout, judges.reward, phases, torch.Tensor.backward, **gradient_options(config)
        )
        key, indices, plan = ("forecast",), torch.arange(samples), GradientPlan.short(steps, samples, copies)
        gradient(key, indices, [""] * samples, [{}] * samples, plan)
        with account.phase("update"):
            _update(weights)
        with torch.no_grad():
            latents = model.init_latents(generators(range(1), *key))
            with account.phase(""), residency("decode"):  # for its size alone
                picture = model.decode(latents)
            if any(judges.phases["measure"]):
                pictures = picture.expand(samples, -1, -1, -1)
                judges.judge([pictures], [""] * samples, [{}] * samples, phases, only="measure")
    latent_bytes, picture_bytes = (t[0].numel() * t.element_size() for t in (latents, picture))
    cond_bytes = sum(t[0].numel() * t.element_size() for t in model.blank_conditioning(1).values())
    return _Short(account.peaks, account.flops, latent_bytes, picture_bytes, cond_bytes + 3 * latent_bytes)


class _WithoutTokens:
    """A model that reads prompts of full length: what that costs does not depend on their words.

    Args:
        model: has all the rest.
        prompts: how many there are.
        in_float32: the conditioning is; autocast does not exist on the meta device, where float32 is an upper limit.
    """

    def __init__(self, model: Model, prompts: int, in_float32: bool):
        self._model, self._prompts, self._in_float32 = model, prompts, in_float32

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def knows(self, prompts) -> bool:
        return False

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        for _ in range(self._prompts + self._empty_prompts):  # one by one, as models do
            encode(self._model.text_encoders, 1)
        cond = self._model.blank_conditioning(len(prompts))
        return {name: tensor.float() for name, tensor in cond.items()} if self._in_float32 else cond

    def backward_prompts(self, prompts, gradients) -> None:
        for _ in range(self._prompts):
            encode(self._model.text_encoders, 1 + self._empty_prompts, backward=True)

    @property
    def _empty_prompts(self) -> int:
        """1 where there is an unconditional branch, which reads an empty prompt."""
        return len(self._model.branches(self._model.blank_conditioning(1), guidance_scale=2.0)) - 1


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
