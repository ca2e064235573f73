"""Qwen-VL's sizes and patches, against transformers' own processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.qwen_vl import QwenPreprocess, patchify, places, smart_size
from tests.helpers.pictures import differing
from tests.helpers.refusals import error_of
from tests.helpers.reward_references import as_images

EQUAL = 256 * 28 * 28


def processor(fewest, most):
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": fewest, "longest_edge": most})


def picture(height, width):
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(height))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return (fine[0].permute(1, 2, 0) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (448, 448)), ((64, 64), (448, 448)), ((768, 768), (420, 420)), ((768, 1344), (336, 588)),
        ((1344, 768), (588, 336)), ((832, 1216), (364, 532)), ((1024, 768), (504, 364)), ((896, 1152), (392, 504)),
    ],
)  # fmt: skip
def test_sizes_with_equal_limits(size, expected):
    """As hpsv3's own code gives them: 768² ends up below the limit, because it is rounded down."""
    assert smart_size(*size, EQUAL, EQUAL) == expected


@pytest.mark.parametrize("limits", [(EQUAL, EQUAL), (3136, 12845056), (3136, 50176)])
def test_sizes_are_those_of_transformers(limits):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 1500, (200, 2)).tolist():
        assert smart_size(height, width, *limits) == smart_resize(height, width, 28, *limits)


@pytest.mark.parametrize(("size", "share"), [((112, 140), 0), ((200, 90), 2e-3), ((30, 50), 2e-3)])
def test_patches_are_those_of_transformers(size, share):
    """The first size fits."""
    array, limits = picture(*size), (20 * 784, 20 * 784)
    expected = processor(*limits)(Image.fromarray(array.numpy()), return_tensors="pt")
    preprocess = QwenPreprocess(*limits)
    pixels = preprocess(as_images(array))
    assert [1, *(side // 14 for side in pixels.shape[-2:])] == expected.image_grid_thw[0].tolist()
    std = preprocess.std.expand(3, 2 * 196, 1).reshape(-1)
    assert differing(patchify(pixels)[0], expected.pixel_values, std) <= share


def test_overshoot_of_the_resize_is_cut_off():
    edge = torch.zeros(1, 3, 40, 40)
    edge[..., 20:] = 1
    fitted = QwenPreprocess(EQUAL, EQUAL).fit(edge)
    assert fitted.min() == 0 and fitted.max() == 1


def test_places_are_in_the_order_of_the_patches():
    rows, columns = (torch.arange(n).repeat_interleave(14) for n in (4, 6))
    pixels = torch.stack([rows[:, None].expand(-1, 84), columns.expand(56, -1), torch.zeros(56, 84)])[None].float()
    first = patchify(pixels)[0].unflatten(1, (3, 2, 196))[:, :2, 0, 0]
    assert torch.equal(first.long(), places(56, 84))


def test_a_batch_is_each_alone():
    images = torch.rand(3, 3, 50, 90, generator=torch.Generator().manual_seed(0))
    preprocess = QwenPreprocess(3136, 3136)
    together = patchify(preprocess(images))
    assert torch.equal(together, torch.cat([patchify(preprocess(image[None])) for image in images]))


def test_narrow_pictures_are_refused():
    message = error_of(smart_size, 10, 2010, EQUAL, EQUAL)
    assert "2010x10" in message and "at most 200" in message
    assert smart_size(10, 2000, EQUAL, EQUAL)
