"""The CLIP-based rewards against transformers' own processor and model, on random weights in the real formats."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from rewards import build_reward
from rewards.aesthetic import AestheticReward
from rewards.clip import ClipReward
from rewards.heads import AestheticHead
from rewards.preprocess import CLIP_MEAN, ClipPreprocess, PadPreprocess, resize_like_pil
from tests.helpers.pictures import differing
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import laion_head, make_clip

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "two dogs"]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="session")
def wide_clip_folder(tmp_path_factory):
    """Embeddings of 768 numbers, as ViT-L/14's, for the real head's shape."""
    return str(make_clip(tmp_path_factory.mktemp("clip768"), projection_dim=768))


@pytest.fixture(scope="session")
def head_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(laion_head(), path)
    return str(path)


def random_image(height, width, seed=0, smooth=True):
    """A uint8 picture, by default with edges and flat parts at several scales, as [H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    if not smooth:
        return (torch.rand(height, width, 3, generator=generator) * 256).to(torch.uint8)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")[0]
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0)


def as_images(array):
    return (array.float() / 255).permute(2, 0, 1).unsqueeze(0)


def pil_pixels(array, size):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(Image.fromarray(array.numpy()), return_tensors="pt").pixel_values


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (90, 64)])
def test_preprocess_is_exact_where_nothing_is_resized(shape):
    array = random_image(*shape, smooth=False)
    preprocess, images = ClipPreprocess(64), as_images(array)
    top, left = (shape[0] - 64) // 2, (shape[1] - 64) // 2
    assert torch.equal(preprocess.fit(images), images[..., top : top + 64, left : left + 64])
    assert (preprocess(images) - pil_pixels(array, 64)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(512, 512), (300, 200), (201, 333), (40, 40), (50, 33)])
def test_a_resized_picture_has_the_pixels_of_the_processor(shape):
    array, preprocess = random_image(*shape), ClipPreprocess(64)
    ours, theirs = preprocess(as_images(array)), pil_pixels(array, 64)
    assert ours.shape == (1, 3, 64, 64)
    assert differing(ours, theirs, preprocess.std) < 1e-2


def test_the_gradient_passes_the_rounding():
    """It is that of two resizes, and 0 where bicubic overshoot is cut off."""
    array = random_image(90, 70)
    images = as_images(array).requires_grad_()
    weights = torch.randn(1, 3, 40, 50, generator=torch.Generator().manual_seed(3))
    resized = resize_like_pil(images, 40, 50)
    (gradient,) = torch.autograd.grad((weights * resized).sum(), images)
    sizes = dict(mode="bicubic", antialias=True)
    wide = torch.nn.functional.interpolate(images, (90, 50), **sizes)
    kept = (wide >= 0) & (wide <= 1)
    tall = torch.nn.functional.interpolate(wide.clamp(0, 1), (40, 50), **sizes)
    inside = (resized > 0) & (resized < 1)
    assert 0 < (~kept).sum() < kept.sum() and 0 < (~inside).sum() < inside.sum()
    (expected,) = torch.autograd.grad((weights * tall.clamp(0, 1)).sum(), images)
    assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("without_rounding")
def test_preprocess_is_differentiable():
    # Away from the clamp the map is affine, so an exact directional derivative is a plain difference.
    preprocess = ClipPreprocess(16).double()
    generator = torch.Generator().manual_seed(3)
    images = (0.3 + 0.4 * torch.rand(1, 3, 40, 50, generator=generator)).requires_grad_()
    direction = 0.1 * torch.rand(images.shape, generator=generator)
    weights = torch.rand(1, 3, 16, 16, generator=generator)
    (gradient,) = torch.autograd.grad((weights * preprocess(images)).sum(), images)
    change = (weights * (preprocess(images + direction) - preprocess(images))).sum()
    torch.testing.assert_close((gradient * direction).sum().double(), change.detach().double(), rtol=1e-4, atol=0)


def test_pad_preprocess_keeps_the_whole_picture():
    images = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    pixels = PadPreprocess(40)(images) * PadPreprocess(40).std + PadPreprocess(40).mean
    torch.testing.assert_close(pixels[..., 10:30, :], images, atol=1e-6, rtol=0)
    assert pixels[..., :10, :].abs().max() < 1e-6 and pixels[..., 30:, :].abs().max() < 1e-6


@pytest.mark.parametrize("filename", ["preprocessor_config.json", "processor_config.json"])
def test_preprocess_reads_the_models_own_file(filename, clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    values = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    values |= {"size": 80, "resample": 2}  # a plain number is how older files write it
    text = values if filename == "preprocessor_config.json" else {"image_processor": values}
    (folder / filename).write_text(json.dumps(text))
    preprocess = build_reward("clip", {"clip": {"model": str(folder)}}).terms["clip"].tower.preprocess
    assert (preprocess.size, preprocess.resize_to, preprocess.mode) == (64, 80, "bilinear")
    torch.testing.assert_close(preprocess.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(preprocess.std.flatten(), torch.tensor([0.2, 0.3, 0.25]))


def test_preprocess_without_a_file_is_openais(tmp_path):
    folder = make_clip(tmp_path / "clip", preprocessor=False)
    preprocess = build_reward("clip", {"clip": {"model": str(folder)}}).terms["clip"].tower.preprocess
    assert preprocess.size == 64
    torch.testing.assert_close(preprocess.mean.flatten(), torch.tensor(CLIP_MEAN))


@pytest.mark.parametrize(("change", "part"), [
    ({"resample": 0}, "resample=0"), ({"size": 32}, "32 pixels"),
    ({"do_normalize": False}, "do_normalize=False"), ({"do_rescale": False}, "do_rescale=False"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"), ({"do_center_crop": False}, "do_center_crop=False"),
    ({"do_resize": False}, "do_resize=False"), ({"size": {"height": 64, "width": 96}}, "is no square"),
])  # fmt: skip
def test_unusable_preprocessor_file_is_one_line(change, part, clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert part in refusal("clip", model=str(folder))


# ---------------------------------------------------------------- clip


def reference_similarity(folder, array, prompts):
    """transformers' own way: its processor on PIL images, its tokenizer, its CLIPModel.forward."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([Image.fromarray(array.numpy())] * len(prompts), return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    return (output.image_embeds * output.text_embeds).sum(-1)


def test_clip_score_is_the_cosine_of_transformers(clip_folder):
    prompts = ["a", "a red cat on a mat, much longer than the text tower reads"]
    array = random_image(64, 64)
    scores = build_reward("clip", {"clip": {"model": clip_folder}})(as_images(array).repeat(2, 1, 1, 1), prompts)
    assert scores.dtype == torch.float32 and scores.shape == (2,)
    assert (scores[0] - scores[1]).abs() > 1e-3  # else the text would not matter
    torch.testing.assert_close(scores, reference_similarity(clip_folder, array, prompts), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("without_rounding")
def test_clip_score_depends_on_the_image_and_has_its_gradient(clip_folder):
    reward = build_reward("clip", {"clip": {"model": clip_folder}})
    images = torch.cat([as_images(random_image(96, 96, seed)) for seed in (0, 1)]).requires_grad_()
    scores = reward(images, ["a cat"] * 2)
    assert (scores[0] - scores[1]).abs() > 1e-3
    check_gradient(lambda x: reward(x, ["a cat"] * 2).sum(), images)


def check_gradient(function, images, step=2e-3, rtol=2e-2):
    """The gradient is finite and, along itself, equals the central difference."""
    (gradient,) = torch.autograd.grad(function(images), images)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    direction = gradient / gradient.abs().max()
    with torch.no_grad():
        change = (function(images + step * direction) - function(images - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=rtol, atol=0)


def test_towers_are_frozen(clip_folder, wide_clip_folder, head_file):
    for reward in (ClipReward(clip_folder), AestheticReward(clip=wide_clip_folder, head_file=head_file)):
        assert len(list(reward.parameters())) > 20
        assert not any(parameter.requires_grad for parameter in reward.parameters())
        reward.train()
        assert not any(module.training for module in reward.modules())


@pytest.mark.parametrize("name", ["clip", "aesthetic"])
def test_score_and_gradient_are_float32_under_autocast(name, clip_folder, wide_clip_folder, head_file):
    options = {"clip": {"model": clip_folder}, "aesthetic": {"clip": wide_clip_folder, "head_file": head_file}}
    reward = build_reward(name, options)
    images = torch.cat([as_images(random_image(96, 96, seed)) for seed in (0, 1)]).requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    (gradient_under,) = torch.autograd.grad(under.sum(), images)
    assert under.dtype == torch.float32
    assert torch.equal(scores, under) and torch.equal(gradient, gradient_under)


def test_old_config_without_the_end_token_gives_the_same_score(clip_folder, tmp_path):
    """Among them OpenAI's own: they say eos_token_id=2 and mean the highest id, where transformers then reads."""
    folder = tmp_path / "old"
    shutil.copytree(clip_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] != 2
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    images = as_images(random_image(64, 64)).repeat(2, 1, 1, 1)
    scores = [build_reward("clip", {"clip": {"model": str(path)}})(images, PROMPTS) for path in (clip_folder, folder)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_lowers_the_towers_alone(dtype, clip_folder):
    images = as_images(random_image(96, 96)).repeat(2, 1, 1, 1)
    exact = build_reward("clip", {"clip": {"model": clip_folder}})(images, PROMPTS)
    reward = build_reward("clip", {"clip": {"model": clip_folder, "dtype": dtype}})
    scores = reward(images, PROMPTS)
    assert {parameter.dtype for parameter in reward.parameters()} == {getattr(torch, dtype)}
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < 3e-2


def test_half_weights_on_disk_are_computed_in_float32(clip_folder, tmp_path):
    from transformers import CLIPModel

    folder = tmp_path / "half"
    shutil.copytree(clip_folder, folder)
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(folder)
    reward = build_reward("clip", {"clip": {"model": str(folder)}})
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}


def test_projection_width_is_the_models_own(clip_folder):
    """`vision_config.projection_dim` is 512 unless written; only the model's own projection_dim counts."""
    config = json.loads(Path(clip_folder, "config.json").read_text())
    assert config["projection_dim"] == 24 and config["vision_config"].get("projection_dim", 512) == 512
    tower = build_reward("clip", {"clip": {"model": clip_folder}}).terms["clip"].tower
    assert tower.embed_images(torch.rand(1, 3, 64, 64)).shape == (1, 24)


# ---------------------------------------------------------------- aesthetic


def test_head_has_the_laion_architecture(head_file):
    head = AestheticHead.from_weights(torch.load(head_file), "")
    assert [tuple(layer.weight.shape) for layer in head.layers if isinstance(layer, torch.nn.Linear)] == [
        (1024, 768),
        (128, 1024),
        (64, 128),
        (16, 64),
        (1, 16),
    ]
    assert [layer.p for layer in head.layers if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.2, 0.1]
    assert head.state_dict().keys() == AestheticHead(768).state_dict().keys() == laion_head().keys()


def test_aesthetic_score_is_the_head_on_the_unit_embedding(wide_clip_folder, head_file):
    from transformers import CLIPModel

    array = random_image(64, 64)
    reward = build_reward("aesthetic", {"aesthetic": {"clip": wide_clip_folder, "head_file": head_file}})
    scores = reward(as_images(array), ["whatever"])
    # The head is linear, so it is one matrix product after another.
    model, head = CLIPModel.from_pretrained(wide_clip_folder), torch.load(head_file)
    from transformers import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(wide_clip_folder)(
        Image.fromarray(array.numpy()), return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        x = model.get_image_features(pixel_values=pixels).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    torch.testing.assert_close(scores, x.squeeze(-1), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("without_rounding")
def test_aesthetic_gradient(wide_clip_folder, head_file):
    # The random head's output hardly moves with its input; scaled up, the difference quotient is above rounding.
    reward = build_reward("aesthetic", {"aesthetic": {"clip": wide_clip_folder, "head_file": head_file}})
    for layer in reward.terms["aesthetic"].head.layers[::2]:
        layer.weight.mul_(4)
    images = torch.cat([as_images(random_image(96, 80, seed)) for seed in (0, 1)]).requires_grad_()
    check_gradient(lambda x: reward(x, PROMPTS).sum(), images)


def test_aesthetic_keeps_the_image_tower_alone(wide_clip_folder, head_file):
    reward = build_reward("aesthetic", {"aesthetic": {"clip": wide_clip_folder, "head_file": head_file}})
    names = [name for name, _ in reward.named_parameters()]
    assert any("vision_model" in name for name in names) and not any("text" in name for name in names)


def test_head_comes_from_a_repository_folder_or_safetensors(wide_clip_folder, head_file, tmp_path):
    from safetensors.torch import save_file

    save_file(laion_head(), tmp_path / "head.safetensors")
    torch.save(laion_head(), tmp_path / "in-repo.pth")
    image = as_images(random_image(64, 64))
    places = [
        {"head_file": head_file},
        {"head_file": str(tmp_path / "head.safetensors")},
        {"head_repo": str(tmp_path), "head_file": "in-repo.pth"},
    ]
    scores = [
        build_reward("aesthetic", {"aesthetic": {"clip": wide_clip_folder, **place}})(image, ["a"]) for place in places
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_small_head_on_a_small_clip_is_the_same_class(clip_folder, tmp_path):
    torch.manual_seed(0)
    torch.save(AestheticHead(24, (32, 16, 8, 4, 1)).state_dict(), tmp_path / "small.pth")
    reward = build_reward("aesthetic", {"aesthetic": {"clip": clip_folder, "head_file": str(tmp_path / "small.pth")}})
    assert reward(torch.rand(2, 3, 64, 64), PROMPTS).shape == (2,)


# ---------------------------------------------------------------- what a person can get wrong


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def write_broken_head(path, kind):
    state = laion_head()
    if kind == "missing key":
        del state["layers.4.bias"]
    elif kind == "unknown key":
        state["layers.8.weight"] = torch.zeros(1)
    elif kind == "layers that do not fit":
        state["layers.2.weight"] = torch.zeros(128, 1000)
    elif kind == "two scores":
        state["layers.7.weight"], state["layers.7.bias"] = torch.zeros(2, 16), torch.zeros(2)
    elif kind == "not a dict":
        state = [torch.zeros(1)]
    elif kind == "code":
        state["layers.0.weight"] = Harmful()
    if kind == "damaged":
        path.write_bytes(b"PK\x03\x04 nonsense")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("missing key", "layers.4.bias"),
        ("unknown key", "layers.8.weight"),
        ("layers that do not fit", "do not fit"),
        ("two scores", "one score"),
        ("not a dict", "list"),
        ("code", "plain weights"),
        ("pickle", "plain weights"),
        ("damaged", "cannot be read"),
    ],
)
def test_broken_head_is_one_line(kind, part, tmp_path, capsys):
    path = tmp_path / "head.pth"
    write_broken_head(path, kind)
    message = refusal("aesthetic", head_file=str(path))
    assert "aesthetic.head_file" in message and str(path) in message and part in message
    assert "never run" not in capsys.readouterr().out


def test_damaged_safetensors_is_one_line(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"nonsense")
    assert "cannot be read" in refusal("aesthetic", head_file=str(tmp_path / "head.safetensors"))


def test_head_of_another_width_is_refused(clip_folder, head_file):
    message = refusal("aesthetic", clip=clip_folder, head_file=head_file)
    assert "768" in message and "24" in message


def test_missing_model_says_what_was_tried(head_file, tmp_path):
    for message in (
        refusal("clip", model="nobody/absent-model"),
        refusal("clip", model=str(tmp_path / "absent")),
        refusal("aesthetic", clip="nobody/absent-model", head_file=head_file),
        refusal("aesthetic", head_repo="nobody/absent-head"),
    ):
        assert "absent" in message and "HF_HOME" in message and "local folder" in message
    assert "does not exist" in refusal("aesthetic", head_file=str(tmp_path / "absent.pth"))


def test_folder_that_is_no_clip_is_one_line(clip_folder, tmp_path):
    assert "config.json" in refusal("clip", model=str(tmp_path))
    folder = tmp_path / "other"
    shutil.copytree(clip_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    assert "clip_vision_model" in refusal("clip", model=str(folder))


def test_incomplete_weights_are_refused(clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "visual_projection.weight" in refusal("clip", model=str(folder))
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded as a CLIP model" in refusal("clip", model=str(folder))


def test_tokenizer_of_another_model_is_refused(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / "tokenizer.json").unlink()  # transformers would go on with an almost empty vocabulary
    assert "does not fit the text tower" in refusal("clip", model=str(folder))


def test_unknown_dtype_names_the_nearest(clip_folder):
    message = refusal("clip", model=clip_folder, dtype="bfloat")
    assert "'bfloat'" in message and "did you mean 'bfloat16'" in message
