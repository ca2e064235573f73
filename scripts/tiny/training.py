"""Parts that every training stage shares: a bounded, resumable loop, a moving average, batches of pictures."""

import copy
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

SAVE_MINUTES = 4.0


class TrainingLoop:
    """Iterates over the steps of a stage. It ends at ``max_steps`` or ``max_minutes``, whichever comes first.

    The learning rate warms up, then follows a cosine to almost zero along whichever bound is nearer, so that a slower
    machine still anneals fully. Every ``SAVE_MINUTES``, the modules, the optimizer, the random state and the time spent
    are saved to ``path``. A new loop on the same path continues from there.
    """

    def __init__(self, name, path, optimizer, modules, max_steps, max_minutes=math.inf, warmup=100):
        self.name, self.path, self.optimizer, self.modules = name, Path(path), optimizer, modules
        self.max_steps, self.max_seconds, self.warmup = max_steps, 60 * max_minutes, warmup
        self.save_seconds = 60 * SAVE_MINUTES
        self.learning_rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.seconds = 0, 0.0
        if self.path.exists():
            self._load()

    def __iter__(self):
        started = saved = time.monotonic()
        before = self.seconds
        interval = 0.5 if sys.stderr.isatty() else 20.0  # seconds: a log file needs fewer lines than a screen
        self.bar = tqdm(total=self.max_steps, initial=self.step, desc=self.name, mininterval=interval)
        while self.progress < 1:
            cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress))
            scale = cosine * min(1, (self.step + 1) / self.warmup)
            for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = learning_rate * scale
            yield self.step
            self.step += 1
            self.bar.update()
            self.seconds = before + time.monotonic() - started
            if time.monotonic() - saved > self.save_seconds:
                self._save()
                saved = time.monotonic()
        self.bar.close()

    @property
    def progress(self):
        """The share of the nearer bound that is used up. The loop ends at 1."""
        return max(self.step / self.max_steps, self.seconds / self.max_seconds)

    def show(self, **figures):
        """Shows figures (scalar tensors or floats) next to the progress bar."""
        figures = {k: v.item() if torch.is_tensor(v) else v for k, v in figures.items()}
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)

    def _save(self):
        state = {"step": self.step, "seconds": self.seconds, "rng": torch.get_rng_state()}
        state["optimizer"] = self.optimizer.state_dict()
        state["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
        torch.save(state, f"{self.path}.part")
        os.replace(f"{self.path}.part", self.path)  # a kill while writing must not destroy the older state

    def _load(self):
        state = torch.load(self.path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        torch.set_rng_state(state["rng"])


class MovingAverage:
    """An exponential moving average of a module's weights. ``.module`` is a frozen module that holds it."""

    def __init__(self, module, decay):
        self.decay, self.source = decay, list(module.parameters())
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # short memory at first, while weights move fast
        torch._foreach_lerp_(list(self.module.parameters()), self.source, 1 - decay)


def optimizer_step(loss, optimizer, max_norm=1.0):
    """Makes one optimizer step with clipped gradients, then clears the gradients."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm)
    optimizer.step()
    optimizer.zero_grad()


def bfloat16():
    """Returns an autocast for the networks' inner products; twice as fast if the CPU has bfloat16 instructions."""
    return torch.autocast("cpu", torch.bfloat16)


def save_weights(module, path, dtype=None):
    """Writes a module's weights as safetensors, in ``dtype`` if given."""
    save_file({k: v.detach().to(dtype or v.dtype).contiguous() for k, v in module.state_dict().items()}, path)


def augment(images):
    """Adds noise, blur, flips and small shifts to [B, 3, H, W], so that a network tolerates generated pictures."""
    chance = torch.rand(3)
    if chance[0] < 0.5:
        images = images + torch.randn_like(images) * (0.05 * torch.rand(1))
    if chance[1] < 0.3:
        small = torch.nn.functional.avg_pool2d(images, 2)
        images = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    if chance[2] < 0.5:
        images = images.flip(3)
    return torch.roll(images, torch.randint(-2, 3, (2,)).tolist(), (2, 3))
