"""Compares memory and operations of training at full size with AlignProp's and TRL's: some minutes on a CPU.

    python scripts/bench/cost.py                        SD 1.5 at 512² and SDXL at 1024², prints a table
    python scripts/bench/cost.py --quick                only the smaller micro-batch of the first model
    python scripts/bench/cost.py --json out.json        also writes every figure

No weights and no GPU are needed, because the code itself runs on tensors without data (alignprop/memory/accounting.py).
Our code runs in each memory policy, and theirs is `their_step` below. Both sides have the same model, with weights in
bfloat16 and a LoRA of rank 4 in float32. AdamW trains the LoRA towards a CLIP ViT-L aesthetic score in bfloat16, with
guidance and 50 sampler steps. The last K steps carry gradient.

The peak counts weights, activations, gradients and AdamW's moments. It leaves out what no operator allocates: the
CUDA context, workspaces of kernels, and memory that an allocator cannot hand out again. Both sides have only the VAE's
decoder. Their text encoder and CLIP's text half stay on the device, as in their code. Ours are not on the device.

TFLOP counts the matrix products, convolutions and attention of a whole micro-batch: encoding the prompts, 50 sampler
steps, decoding, the reward and the backward pass, with everything that is computed again. We encode a prompt only once
and remember it, but the count includes it. A larger batch of several micro-batches has the same peak, and costs as many
times more.

The cost of a step is linear in K and in the sampler steps, so a few short steps are run and the rest is computed
(tests/scripts/test_cost.py compares the result with chains of up to 20 steps).
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that the file runs as a script, from any folder
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

from alignprop.engine.seeding import generators  # noqa: E402
from alignprop.lora.factors import add_lora, trainable_parameters  # noqa: E402
from alignprop.memory.accounting import Account  # noqa: E402
from alignprop.memory.forecast import GIB, forecast  # noqa: E402
from alignprop.memory.planner import skeletons  # noqa: E402
from alignprop.memory.simulation import encode  # noqa: E402
from alignprop.models.base import Model  # noqa: E402
from alignprop.models.configs import find_tower_config  # noqa: E402
from alignprop.models.skeleton import build_module  # noqa: E402
from alignprop.settings.memory_policies import POLICIES  # noqa: E402
from alignprop.settings.resolve import resolve  # noqa: E402
from config.align_prop import get_config  # noqa: E402
from scripts.bench.tables import markdown  # noqa: E402

# The hub name of each model, and the numbers of samples in a micro-batch.
MODELS = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", (4, 1)),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", (1,)),
}
ACTIVE = (1, 10, 25, 50)
THEIRS = "theirs"


def configuration(name: str, batch: int, active: int) -> ConfigDict:
    """Returns the aesthetic preset in bfloat16, with one micro-batch per step and `active` last steps with gradient."""
    c = get_config("aesthetic")
    c.pretrained.model = name
    c.mixed_precision, c.aesthetic.dtype = "bf16", "bfloat16"
    c.estimator, c.trunc_backprop_timestep = "truncated", c.num_inference_steps - active
    c.per_gpu_capacity = c.train.total_batch_size = c.train.total_samples_per_epoch = batch
    c.eval_diversity = False  # only a training step is compared, no evaluation
    return c


# ---- theirs


def their_step(model: Model, reward, idle: list, config: ConfigDict, samples: int, steps: int, active: int) -> Account:
    """Makes an optimizer step like AlignProp's released code and TRL's AlignPropTrainer, and returns its cost.

    Every network call builds a graph and is recomputed whole in the backward pass. If a step carries no gradient, its
    output is detached after the call. The whole micro-batch goes through the network with both branches of guidance at
    once, and through the VAE.

    Args:
        model: The frozen model, on the device that is measured. It gets a LoRA.
        reward: The frozen reward, on the same device.
        idle: Modules that are on the device and do nothing.
        samples: The samples in the micro-batch.
        steps: The number of sampler steps.
        active: The number of sampler steps with gradient. They come last.
    """
    latents = model.init_latents(generators(range(samples), "cost")).to(model.text_encoders[0].dtype)
    account = Account(model.device.type)
    account.track(model.denoiser, model.decoder, *model.text_encoders, reward, *idle, latents)
    with account:
        targets = config.lora_target_modules or model.lora_targets
        add_lora(model.denoiser, config.lora_rank, config.lora_alpha, targets, config.seed)
        parameters = list(trainable_parameters(model.denoiser).values())
        optimizer = torch.optim.AdamW(parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # from the second step on, the optimizer has moments
        optimizer.zero_grad()
        with account.phase("encode"):
            encode(model.text_encoders, samples)
            branches = model.branches(model.blank_conditioning(samples), config.guidance_scale)
            both = {name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}
        with account.phase("denoise"):
            timestep, trajectory = torch.zeros((), dtype=torch.long, device=model.device), [latents]
            for i in range(steps):
                output = checkpoint(model.predict, torch.cat([latents, latents]), timestep, both, use_reentrant=False)
                if i < steps - active:
                    output = output.detach()
                unconditional, conditional = output.chunk(2)
                output = unconditional + config.guidance_scale * (conditional - unconditional)
                latents = 0.9 * latents + 0.1 * output
                trajectory.append(latents)
        with account.phase("decode"):
            loss = -reward(model.decode(latents), [""] * samples, [{}] * samples).mean()
        with account.phase("backward"):
            loss.backward()
        with account.phase("update"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return account


class Theirs:
    """Computes the cost of `their_step` for any number of steps.

    From three active steps on, each further active step costs the same. Two active steps differ from the others: the
    first in the backward pass finds no gradients to add to, and the lowest needs no gradient of its input.

    Args:
        simulate: (steps, active) -> the account of a step.
    """

    def __init__(self, simulate: Callable[[int, int], Account]):
        self.simulate = functools.cache(simulate)

    def peaks(self, steps: int, active: int) -> dict[str, int]:
        """Returns the peak in bytes of each phase."""
        phases = self.simulate(3, 3).peaks
        return {phase: self._extend(steps, active, lambda a, phase=phase: a.peaks[phase]) for phase in phases}

    def flops(self, steps: int, active: int) -> int:
        return self._extend(steps, active, lambda account: sum(account.flops.values()))

    def _extend(self, steps: int, active: int, figure: Callable[[Account], int]) -> int:
        few = min(active, 3)
        base, three, more_steps, more_active = (
            figure(self.simulate(*counts)) for counts in ((few + 1, few), (3, 3), (4, 3), (4, 4))
        )
        return base + (active - few) * (more_active - three) + (steps - active - 1) * (more_steps - three)


# ---- both


@dataclass(frozen=True)
class Row:
    """The cost of a micro-batch with `active` steps of gradient: `peak` bytes, reached in `phase`, and `flops`."""

    model: str
    batch: int
    way: str
    active: int
    peak: int
    phase: str
    flops: float


def rows(model: str, name: str, batch: int, done: dict, ways=(THEIRS, *POLICIES)) -> Iterator[Row]:
    """Yields the cost of their code, and of ours in each policy, for each K, one way after the other.

    Args:
        model: The name of the model in the table.
        name: Its hub name, or a folder.
        batch: The samples in a micro-batch.
        done: What `forecast.forecast` has already simulated of this model.
        ways: THEIRS, and our policies.
    """
    configs = {active: resolve(configuration(name, batch, active), 1) for active in ACTIVE}
    config = configs[ACTIVE[0]]
    build = skeletons(config)
    with Account("meta") as text:
        encode(build()[0].text_encoders, batch)

    def short_step_of_theirs(*steps):
        model, judges = build()
        return their_step(model, judges.reward, text_half(config), config, batch, *steps)

    for way in ways:
        if way == THEIRS:
            theirs = Theirs(short_step_of_theirs)
        for active, c in configs.items():
            if way == THEIRS:
                peaks, flops = (f(c.train.num_inference_steps, active) for f in (theirs.peaks, theirs.flops))
            else:
                ours = forecast(build, c, way, POLICIES[way], batch, done)
                peaks, flops = ours.peaks, ours.flops * batch + sum(text.flops.values())
            phase = max(peaks, key=peaks.get)
            yield Row(model, batch, way, active, peaks[phase], phase, flops)


def text_half(config: ConfigDict) -> list[torch.nn.Module]:
    """Returns the parts of the aesthetic score's CLIP that the score does not use."""
    facts = find_tower_config(config.aesthetic.clip, "aesthetic.clip")["model"]
    clip = build_module(facts, getattr(torch, config.aesthetic.dtype), "meta").requires_grad_(False)
    return [clip.text_model, clip.text_projection]


def table(found: list[Row]) -> str:
    """Returns a Markdown table. × is the ratio to theirs with the same model, batch and K."""
    theirs = {(row.model, row.batch, row.active): row for row in found if row.way == THEIRS}
    header = ["model", "batch", "way", "K", "peak GiB", "×", "where", "TFLOP", "×"]
    lines = []
    for row in found:
        other = theirs[row.model, row.batch, row.active]
        lines.append([
            row.model, str(row.batch), row.way, str(row.active), f"{row.peak / GIB:.2f}",
            f"{row.peak / other.peak:.3f}", row.phase, f"{row.flops / 1e12:.1f}", f"{row.flops / other.flops:.3f}",
        ])  # fmt: skip
    return markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--quick", action="store_true", help="only the smaller micro-batch of the first model")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args()
    unknown = [model for model in options.models.split(",") if model not in MODELS]
    if unknown:
        parser.error(f"--models = {unknown[0]} is not one of {', '.join(MODELS)}")
    cases = [(model, batch) for model in options.models.split(",") for batch in MODELS[model][1]]
    if options.quick:
        cases = [case for case in cases if case[0] == cases[0][0]][-1:]
    found, done = [], {model: {} for model, _ in cases}
    with tqdm(total=len(cases) * (1 + len(POLICIES)) * len(ACTIVE), disable=None) as bar:
        for model, batch in cases:
            bar.set_description(f"{model}, batch {batch}")
            for row in rows(model, MODELS[model][0], batch, done[model]):
                found.append(row)
                bar.update()
    print(__doc__.partition("\n\n")[2].partition("\n\n")[2])  # the paragraphs about what is counted
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
