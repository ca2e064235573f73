import random

import numpy as np
import torch

from alignprop.engine.seeding import generator, generators, seed_global


def draw(g):
    return torch.randn(4, generator=g)


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before():
    first = draw(generator(0, 3, "noise"))
    torch.manual_seed(123)
    draw(generator(9))
    assert torch.equal(draw(generator(0, 3, "noise")), first)


def test_every_part_of_the_key_counts():
    keys = [(0, 3, "noise"), (1, 3, "noise"), (0, 4, "noise"), (0, 3, "plan"), (0, "3", "noise"), (0, 3)]
    draws = {tuple(draw(generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_a_sample_has_the_same_generator_in_any_batch():
    alone = draw(generators([5], 0, "noise")[0])
    batch = [draw(g) for g in generators([4, 5, 6], 0, "noise")]
    assert torch.equal(batch[1], alone) and not torch.equal(batch[0], alone)


def test_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    draw(generator(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_global_generators_follow_the_key():
    draw_global = lambda: (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: E731
    draws = []
    for key in ((0, 1), (0, 2), (0, 1)):
        seed_global(*key)
        draws.append(draw_global())
    assert draws[0] == draws[2] and not any(a == b for a, b in zip(draws[0], draws[1], strict=True))
