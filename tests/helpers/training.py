"""What the tests of training share: a run, what it logged, and the weights it reached."""

import json
import os
import signal

import numpy as np
import torch

from alignprop.engine.seeding import generator
from alignprop.lora.factors import add_lora, get_lora, trainable_parameters
from alignprop.lora.files import save_lora
from alignprop.models.sd import StableDiffusion
from alignprop.trainer import AlignPropTrainer
from tests.helpers.toy_rewards import redness


def train(config):
    trainer = AlignPropTrainer(config)
    trainer.train()
    return trainer


def rows(trainer, kind=None):
    found = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
    kept = [r for r in found if kind in (None, r["kind"])]
    return [{k: v for k, v in r.items() if k not in ("seconds", "cpu_seconds")} for r in kept]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.weights.parameters])


def save_random_lora(pipeline_folder, folder, seed):
    """A LoRA with random numbers, large enough to change pictures, in `folder`, whose name is returned."""
    model = StableDiffusion.load(str(pipeline_folder))
    add_lora(model.denoiser, 2, 2.0, ("to_q", "to_v"), seed)
    for name, parameter in trainable_parameters(model.denoiser).items():
        parameter.data.normal_(0, 0.5, generator=generator(name, seed))
    save_lora(model, get_lora(model.denoiser), folder)
    return str(folder)


def half_precision(monkeypatch, dtype, scale):
    """accelerate refuses float16 on a CPU, where torch itself can run it: the same parts, put together by hand."""
    from accelerate import Accelerator

    def build(**options):
        accelerator = Accelerator(**options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16" if scale else "bf16"
        accelerator.autocast = lambda: torch.autocast("cpu", dtype)
        return accelerator

    monkeypatch.setattr("alignprop.engine.processes.Accelerator", build)


def asks_to_stop(call, number=signal.SIGTERM):
    """A reward during whose n-th call, evaluation included, somebody asks the process to stop."""
    calls = iter(range(10**6))

    def reward(images, prompts, metadata):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return redness(images, prompts, metadata)

    reward.__name__ = "redness"
    return reward


def shaken(images, prompts, metadata):
    """A user's reward that draws from the global generators."""
    return redness(images, prompts, metadata) * (1 + torch.rand(len(images)) + np.random.rand())
