"""Rewards that a user might write, for the tests: `tests.helpers.toy_rewards:redness`."""

import os
import signal

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
