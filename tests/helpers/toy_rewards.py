"""Rewards that a user might write, for the tests: `tests.helpers.toy_rewards:redness`."""

import os
import random
import signal
import sys
import time

import numpy as np
import torch


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def contrast(images, prompts, metadata):
    return images.flatten(1).std(dim=1)


def spread(images, prompts, metadata):
    return images.flatten(1).amax(dim=1) - images.flatten(1).amin(dim=1)


def wrong_shape(images, prompts, metadata):
    return redness(images, prompts, metadata)[:, None]


def not_a_number(images, prompts, metadata):
    return redness(images, prompts, metadata) * float("nan")


def at_a_corner(images, prompts, metadata):
    """0, whose square root has no finite gradient."""
    return (images - images).square().flatten(1).sum(dim=1).sqrt()


def in_levels(images, prompts, metadata):
    """Rounded to 255 levels, through which no gradient passes."""
    return redness((images * 255).round() / 255, prompts, metadata)


def in_place(images, prompts, metadata):
    with torch.no_grad():
        return images.mul_(255).mean(dim=(1, 2, 3))


in_place.differentiable = False


def detached(images, prompts, metadata):
    return redness(images.detach(), prompts, metadata)


def hidden_rating(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)).detach()


hidden_rating.differentiable = False


class Explodes:
    """Fine at first, then its scores are not finite: calls are counted from the training batches on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts, metadata):
        self.calls += torch.is_grad_enabled()
        return redness(images, prompts, metadata) * (float("inf") if self.calls > 1 else 1.0)


class KilledInTheSecondProcess:
    """Redness; but the process of rank 1 is gone, without a word, at its 11th batch with gradient, in step 5.

    By then the row of step 4 is there, and so is whatever was reported before it."""

    def __init__(self):
        self.batches = 0

    def __call__(self, images, prompts, metadata):
        self.batches += torch.is_grad_enabled()
        if self.batches == 11 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return redness(images, prompts, metadata)


class Obedient:
    """Redness; but first it does what the first prompt says."""

    def __call__(self, images, prompts, metadata):
        scores = getattr(self, prompts[0], lambda *_: 0.0)(prompts, metadata)
        return redness(images, prompts, metadata) + scores

    def prints(self, prompts, metadata):
        print('{"scores": [9, 9]}', flush=True)
        os.write(1, b"noise\n")
        return 0.0

    def reads(self, prompts, metadata):
        numbers = [float(sum(map(ord, prompt))) for prompt in prompts]
        return torch.tensor([n + row["größe"]["x"][0] for n, row in zip(numbers, metadata, strict=True)])

    def draws(self, prompts, metadata):
        return torch.rand(()) + np.random.rand() + random.random()

    def looks(self, prompts, metadata):
        return 100 * float(os.environ.get("RANK", -1)) + 10 * torch.get_num_threads() + torch.is_grad_enabled()

    def fails(self, prompts, metadata):
        return torch.nn.functional.interpolate(torch.ones(1), scale_factor=2)

    def sleeps(self, prompts, metadata):
        time.sleep(60)

    def exits(self, prompts, metadata):
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
