"""Forecasts the cost of a training step before it runs, by running the same code on tensors without data.

The cost of a training step is linear in the number of sampler steps, so two simulations with few sampler steps, or
three if graphs are kept, give the cost for any number. With N sampler steps, K of them active, the FLOPs per sample
are those of N rollout calls, the decode with its backward pass, and K calls of the sweep. The call at the lowest active
step needs no ∂f/∂x. The calls for `kl_coeff` and the work of trained text encoders are added. Memory depends on K only
by the stored latents and by the graphs that are kept.
"""

from dataclasses import dataclass, replace

import torch
from ml_collections import ConfigDict

from alignprop.engine.seeding import generator
from alignprop.memory.simulation import Build, ShortStep, simulate
from alignprop.method.chain import Sampler
from alignprop.method.estimators import build_estimator
from alignprop.method.plans import GradientPlan
from alignprop.method.prefix_cache import FULL_CALLS, is_full
from alignprop.method.samplers import chain_of
from alignprop.settings.memory_policies import MemoryPolicy
from alignprop.settings.options import chain_options, estimator_options

GIB = 2**30
# A margin for memory that the account does not see: workspaces of kernels, and fragmentation in the allocator.
MARGIN = 0.08
# The memory of a CUDA context with its libraries, outside the allocator. It is 0.76 GiB on an H100 (docs/gpu.md).
CONTEXT = int(0.8 * GIB)


@dataclass(frozen=True)
class Forecast:
    """The cost of training with a memory policy.

    Attributes:
        policy: the name of the policy.
        capacity: the number of samples in a micro-batch of one process.
        peaks: the most bytes on the device in each phase: "encode", "denoise" (the rollout), "decode" (the VAE and the
            reward, with their backward pass), "sweep", "compare" (with the base model, for `kl_coeff`), "update", and
            "measure" (the rewards that only an evaluation measures).
        flops: floating point operations per sample, on average over the plan that the estimator draws.
        operators: the number of operators per sample.
        moved: the bytes of weights that come from the host when phases begin, per sample.
        streamed: the bytes of single weights that come from the host for each call, per sample.
    """

    policy: str
    capacity: int
    peaks: dict[str, int]
    flops: float
    operators: float = 0.0
    moved: float = 0.0
    streamed: float = 0.0

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.peaks, key=self.peaks.get)

    def fits(self, gpu_bytes: float) -> bool:
        """Says whether the peak fits in a GPU of that size, with a margin for memory that is not counted."""
        return self.peak * (1 + MARGIN) + CONTEXT <= gpu_bytes


def forecast(
    build: Build, config: ConfigDict, policy: str, memory: MemoryPolicy, capacity: int, done: dict | None = None
) -> Forecast:
    """Forecasts the cost of a training step of the run that `config` describes.

    Args:
        build: makes the networks.
        config: the resolved configuration. Its `memory` and `per_gpu_capacity` are not used.
        policy: the name of the policy, for the result.
        memory: the values of the policy.
        capacity: the number of samples in a micro-batch of one process.
        done: the short steps that earlier forecasts simulated; this forecast adds more. Their networks must be the
            same, and their configuration may differ only in its estimator.
    """
    train, done = config.train, {} if done is None else done
    estimator = build_estimator(config.estimator, **estimator_options(config))
    chain = _chain(build, config, done)
    plan = estimator(chain, train.total_batch_size, generator(config.seed, 0, "plan"))
    if plan.copies:  # the active step is called again with the copies, so no graph is kept
        memory = replace(memory, keep_steps=0)
    most_active = int(plan.active.any(dim=1).sum())
    # Chunks run one after the other at the same cost, so one chunk is simulated, unless graphs are kept.
    largest = max(memory.sweep_chunk or capacity, memory.decode_chunk or capacity)
    samples = capacity if memory.keep_steps else min(largest, capacity)
    prompts = capacity if config.train_text_encoder else 1  # without training, prompts are remembered

    def short_steps(keep_steps: int, *counts: int) -> list[ShortStep]:
        keys = [(replace(memory, keep_steps=keep_steps), samples, prompts, k, plan.copies) for k in counts]
        for key in keys:
            done[key] = done.get(key) or simulate(build, config, *key)
        return [done[key] for key in keys]

    kept = short_steps(3, 1, 2, 3) if memory.keep_steps else short_steps(0, 1, 2)
    recomputed = short_steps(0, 1, 2) if 0 < memory.keep_steps < most_active else kept
    guided = chain.within(config.guidance_interval)
    share = torch.tensor([guided is None or guided(t) for t in chain.timesteps]).double()
    share = share + (1 - share) / kept[0].branches  # of a call with all branches, the operations of each step's call
    calls = share[:, None].expand_as(plan.active)
    if train.prefix_cache > 1:
        chunk = min(samples, memory.sweep_chunk or samples)
        predicted = kept[0].flops["predicted"] / chunk / (kept[0].flops["denoise"] / samples) * (1 + plan.copies)
        calls = calls * _cached_share(share, plan.steps_before_gradient, train.prefix_cache, predicted)[:, None]
    flops = _flops(kept, recomputed, plan, memory.keep_steps, share, calls) / samples
    if config.train_text_encoder:
        flops += kept[0].flops["encode"] / capacity
    peaks = _peaks(kept, memory, capacity, samples, most_active)
    for phase in ("denoise", "sweep"):  # the outputs that later steps use again
        peaks[phase] += chain.most_waiting * kept[0].latents * capacity
    if recomputed is not kept:
        peaks["sweep"] = max(peaks["sweep"], recomputed[-1].peaks["sweep"])
    rollout_calls, active_calls = _mean_calls(plan, calls), plan.active.double().sum(dim=0).mean().item()
    counts = {"denoise": rollout_calls, "sweep": active_calls}
    operators = _linear([short.operators for short in recomputed[:2]], counts)
    streamed = _linear([short.streamed for short in recomputed[:2]], counts)
    entered = sum(kept[0].moved.get(phase, 0) for phase in ("decode", "sweep"))
    return Forecast(policy, capacity, peaks, flops, operators / samples, entered / capacity, streamed / samples)


def _linear(shorts: list[dict[str, int]], counts: dict[str, float]) -> float:
    """Returns the sum over the phases of a step, of something that two short steps with 1 and 2 network calls have.

    Args:
        shorts: its amount by phase, in both short steps.
        counts: the number of network calls in phases that have several.
    """
    one, two = shorts
    amounts = (
        one.get(phase, 0) + (two.get(phase, 0) - one.get(phase, 0)) * (counts.get(phase, 1) - 1)
        for phase in ("denoise", "decode", "sweep", "compare")
    )
    return sum(amounts)


def _mean_calls(plan: GradientPlan, calls: torch.Tensor) -> float:
    """Returns the network calls of the rollout, on average over the samples, as parts of one with all branches."""
    last = plan.exit_step.clamp(max=len(plan.active) - 1)
    return calls.cumsum(dim=0).gather(0, last[None]).mean().item() + plan.copies


def _chain(build: Build, config: ConfigDict, done: dict) -> Sampler:
    """Returns the chain of training. Its network calls can be more than the sampler steps that the user asked for."""
    options = chain_options(config, training=True)
    key = tuple(options.values())
    if key not in done:
        done[key] = chain_of(build()[0], **options)
    return done[key]


def _cached_share(share: torch.Tensor, prefix: int, interval: int, predicted: float) -> torch.Tensor:
    """Returns the operations of each step's rollout call with a prefix cache, as shares of those without, [N].

    Args:
        share: the operations without the cache, [N]. The cache starts anew where they change.
        prefix: the number of steps before the first one with gradient.
        interval: the number of calls from one full call to the next one.
        predicted: the share of a call that the cache predicts.
    """
    shares, since = torch.ones(len(share), dtype=torch.float64), 0
    for i in range(prefix if prefix > FULL_CALLS else 0):
        since = since + 1 if i and share[i] == share[i - 1] else 0
        shares[i] = 1.0 if is_full(since, interval) else predicted
    return shares


def _flops(
    kept: list[ShortStep], recomputed: list[ShortStep], plan: GradientPlan, keep: int, share: torch.Tensor,
    calls: torch.Tensor,
) -> float:  # fmt: skip
    """Returns the FLOPs of the simulated samples without the text encoders, averaged over the samples of the plan.

    Args:
        kept: short steps with kept graphs, if the policy keeps any.
        recomputed: short steps without.
        plan: the plan of training.
        keep: the number of kept graphs.
        share: the operations of each step's network call, as a share of the most expensive one's, [N].
        calls: the same of the calls of the rollout, [N, B].
    """
    lowest, call = (short.flops["sweep"] for short in recomputed[:2])
    kept_lowest, kept_call = (short.flops["sweep"] for short in kept[:2])
    call, kept_call = call - lowest, kept_call - kept_lowest
    below = plan.active.int().cumsum(dim=0) - plan.active.int()  # lower active steps, which still need λ
    into_latents = plan.active & (plan.coupling != 0) & (below > 0)
    active_share = (share[:, None] * plan.active).sum() / plan.active.sum().clamp(min=1)
    sweeps = []
    for k, n in zip(plan.active.sum(dim=0).tolist(), into_latents.sum(dim=0).tolist(), strict=True):
        from_rollout = min(k, keep)
        kept_n = min(n, from_rollout)
        sweeps.append((from_rollout - kept_n) * kept_lowest + kept_n * kept_call)
        sweeps.append((k - from_rollout - (n - kept_n)) * lowest + (n - kept_n) * call)
    rollout_calls = _mean_calls(plan, calls)
    one_call = kept[0].flops["denoise"] / (1 + plan.copies)
    others = kept[0].flops["decode"] + kept[0].flops.get("compare", 0)
    return rollout_calls * one_call + others + active_share.item() * sum(sweeps) / plan.active.shape[1]


def _peaks(
    shorts: list[ShortStep], memory: MemoryPolicy, capacity: int, samples: int, most_active: int
) -> dict[str, int]:
    last = shorts[-1]
    peaks = {phase: peak for phase, peak in last.peaks.items() if phase}
    # These bytes belong to samples outside the simulated chunk and to active steps that were not simulated.
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
