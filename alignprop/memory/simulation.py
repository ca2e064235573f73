"""Runs a training step with few sampler steps on tensors without data, and counts its bytes and operations.

It calls the code of a real run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from alignprop.engine.seeding import generators
from alignprop.evaluation.judges import Judges
from alignprop.memory.accounting import Account
from alignprop.memory.checkpointing import apply_policy, decode_in_tiles
from alignprop.memory.residency import Residency, phases_of
from alignprop.method.chain import Sampler
from alignprop.method.gradient import RewardGradient
from alignprop.method.plans import GradientPlan
from alignprop.method.prefix_cache import FULL_CALLS, build_prefix_cache
from alignprop.method.rollout import Rollout
from alignprop.models.base import Conditioning, Model
from alignprop.settings.memory_policies import MemoryPolicy
from alignprop.settings.options import gradient_options, prefix_cache_options, rollout_options
from alignprop.weights import TrainedWeights

LONGEST = 512  # the tokens to which every family's pipeline cuts a prompt, if its encoder could read more

Build = Callable[[], tuple[Model, Judges]]
"""Makes the model and its judges on the meta device. Each call makes new ones, because a policy changes its model."""


class ShortStep(NamedTuple):
    """The cost of a micro-batch with few sampler steps.

    Attributes:
        peaks: the most bytes on the device, by phase.
        flops: floating point operations, by phase. "predicted" is a network call that the prefix cache predicts.
        operators: the number of operators, by phase.
        moved: bytes of modules that come to the device when a phase begins, by phase.
        streamed: bytes of weights that come during a phase, by phase.
        latents: bytes of the latents of a sample.
        picture: bytes of the picture of a sample.
        waiting: bytes of all tensors that a sample holds while another chunk of samples is processed.
        branches: the number of branches of classifier-free guidance in a network call.
    """

    peaks: dict[str, int]
    flops: dict[str, int]
    operators: dict[str, int]
    moved: dict[str, int]
    streamed: dict[str, int]
    latents: int
    picture: int
    waiting: int
    branches: int


def simulate(
    build: Build, config: ConfigDict, memory: MemoryPolicy, samples: int, prompts: int, steps: int, copies: int
) -> ShortStep:
    """Counts a micro-batch, an update, and the rewards that only an evaluation measures.

    Args:
        build: makes the networks.
        config: the resolved configuration. Its estimator, its `memory` and its numbers of samples and of sampler steps
            are not used.
        memory: the policy, which says what layers keep and what is on the device.
        samples: the number of samples in the micro-batch.
        prompts: the number of distinct prompts that are encoded.
        steps: the number of sampler steps. All are active, but with copies only the last one is.
        copies: the number of copies of each sample (method/plans.py).
    """
    model, judges = build()
    decode_in_tiles(model.decoder, memory.decode_tiles)
    device = model.device = torch.device("meta")
    residency = Residency(device, phases_of(model, judges), memory.residency, copy=True)
    account, moved, streamed = Account("meta"), Counter(), Counter()

    @contextmanager
    def phases(phase: str) -> Iterator[None]:
        before = residency.moved, residency.streamed
        with account.phase(phase), residency(phase):
            yield
        moved[phase] += residency.moved - before[0]
        streamed[phase] += residency.streamed - before[1]

    with account:
        account.track(*(m for phase in residency.phases.keys() - residency.leaving for m in residency.phases[phase]))
        with residency("denoise"):
            weights = TrainedWeights(model, config, _OneProcess())
            apply_policy(model, memory)
            for parameter in weights.parameters:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            _update(weights)  # creates the optimizer's moments, which exist from the second step on
        reader = _WithoutTokens(model, prompts, in_float32=not config.use_lora)
        options = {**rollout_options(config), "guidance_interval": (0.0, 1.0)}  # the most that a call can cost
        cache = build_prefix_cache(model.denoiser, **prefix_cache_options(config))
        rollout = Rollout(model, any_chain(steps), memory=memory, prefix_cache=cache, **options)
        gradient = RewardGradient(
            reader, rollout, judges.reward, phases, torch.Tensor.backward, **gradient_options(config)
        )
        key, indices, plan = ("forecast",), torch.arange(samples), GradientPlan.short(steps, samples, copies)
        gradient(key, indices, [""] * samples, [{}] * samples, plan)
        with account.phase("update"):
            _update(weights)
        if cache:
            with phases("denoise"):
                chunk = min(samples, memory.sweep_chunk or samples)
                _predicted_call(rollout, reader.conditioning(chunk), generators(range(chunk), *key), account)
        with torch.no_grad():
            latents = model.init_latents(generators(range(1), *key))
            with account.phase(""), residency("decode"):  # only for the size of a picture
                picture = model.decode(latents)
            if any(judges.phases["measure"]):
                pictures = picture.expand(samples, -1, -1, -1)
                judges.judge([pictures], [""] * samples, [{}] * samples, phases, only="measure")
    latent_bytes, picture_bytes = (t[0].numel() * t.element_size() for t in (latents, picture))
    blank = model.blank_conditioning(1)
    cond_bytes = sum(t[0].numel() * t.element_size() for t in blank.values())
    branches = len(model.branches(blank, config.guidance_scale))
    peaks = dict(account.peaks)
    peaks["denoise"] = max(peaks.pop(phase, 0) for phase in ("denoise", "full", "predicted"))
    return ShortStep(
        peaks, account.flops, account.operators, moved, streamed, latent_bytes, picture_bytes,
        cond_bytes + 3 * latent_bytes, branches,
    )  # fmt: skip


class _WithoutTokens:
    """A model that encodes prompts of full length, because the cost does not depend on the words.

    Args:
        model: the model that does everything else.
        prompts: the number of distinct prompts.
        in_float32: whether the conditioning is float32. Autocast does not exist on the meta device, so float32 gives
            an upper limit there.
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
        return self.conditioning(len(prompts))

    def conditioning(self, count: int) -> Conditioning:
        cond = self._model.blank_conditioning(count)
        return {name: tensor.float() for name, tensor in cond.items()} if self._in_float32 else cond

    def backward_prompts(self, prompts, gradients) -> None:
        for _ in range(self._prompts):
            encode(self._model.text_encoders, 1 + self._empty_prompts, backward=True)

    @property
    def _empty_prompts(self) -> int:
        """1 if there is an unconditional branch, which needs an empty prompt; 0 otherwise."""
        return len(self._model.branches(self._model.blank_conditioning(1), guidance_scale=2.0)) - 1


def any_chain(steps: int) -> Sampler:
    """Returns a sampler with arbitrary coefficients, because the cost of a step does not depend on them."""
    zeros, ones, falling = torch.zeros(steps), torch.ones(steps), torch.linspace(1, 0, steps + 1)
    return Sampler(torch.arange(steps), ones, ones, zeros, p=ones, q=ones, alpha=1 - falling, sigma=falling)


@torch.no_grad()
def _predicted_call(rollout: Rollout, cond: Conditioning, noise: list[torch.Generator], account: Account) -> None:
    """Makes the full calls at the start of a chain, and the first call that the prefix cache predicts."""
    latents = rollout.start(noise)
    with rollout.prefix_cache.on():
        for phase in ["full"] * FULL_CALLS + ["predicted"]:
            with account.phase(phase):
                rollout.f(*rollout.inputs(0, latents), cond)


def _update(weights: TrainedWeights) -> None:
    weights.sum_over_processes()
    weights.optimizer.step()
    weights.zero_grad()


def encode(text_encoders: list[torch.nn.Module], samples: int, backward: bool = False) -> None:
    """Calls text encoders on their devices with prompts of full length.

    Args:
        text_encoders: the networks.
        samples: the number of prompts.
        backward: whether to back-propagate through the encoders that have an adapter.
    """
    for encoder in text_encoders:
        length = min(getattr(encoder.config, "max_position_embeddings", LONGEST), LONGEST)
        with torch.set_grad_enabled(backward):
            output = encoder(torch.zeros(samples, length, dtype=torch.long, device=encoder.device))[0]
        if output.requires_grad:
            output.sum().backward()


class _OneProcess:
    """The part of an `Accelerator` that the trained weights need."""

    distributed_type, num_processes, scaler = DistributedType.NO, 1, None

    def prepare(self, optimizer):
        return optimizer

    def reduce(self, tensor, reduction):
        return tensor
