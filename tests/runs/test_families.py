"""What holds of every model family: its pictures are its pipeline's, its gradient autograd's, its LoRA loads there."""

import json

import diffusers
import pytest
import torch

from alignprop.evaluation.pictures import read_grid
from alignprop.lora.files import read_lora
from alignprop.models import FAMILIES
from alignprop.models.configs import find_config, folder_config
from alignprop.models.loading import load_model
from alignprop.models.skeleton import skeleton
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve
from config import models
from scripts.bench.families import (
    GUIDED,
    PROMPTS,
    config_for,
    gradients,
    largest_difference,
    load,
    lora_there,
    our_pictures,
    pipeline_pictures,
    plain_pipeline,
    soup_ends,
    train,
)
from tests.helpers.tiny_families import SIDE
from tests.helpers.tiny_pipelines import make_family

ENCODERS = {  # that its LoRA files have a place for
    "sdxl": {"text_encoder", "text_encoder_2"}, "sd3": {"text_encoder", "text_encoder_2"}, "flux": {"text_encoder"}
}  # fmt: skip
UNUSED = {  # of the first encoder, the last but one hidden states are the end
    "sdxl": {f"text_encoder.text_model.encoder.layers.1.self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
}
NAMES = [name for name in FAMILIES if name != "sd"]  # which has its own tests of all that


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in made:
            made[family] = make_family(root / family, family)
        return made[family]

    return folder


@pytest.mark.parametrize("family", NAMES)
def test_pictures_are_the_pipelines(folders, family):
    """Same seed, same prompts, same steps, without guidance and with."""
    model, pipeline = load(family, folders(family)), plain_pipeline(family, folders(family))
    pictures = [our_pictures(model, scale) for scale in (1.0, GUIDED)]
    for images, scale in zip(pictures, (1.0, GUIDED), strict=True):
        expected = pipeline_pictures(family, pipeline, scale)
        assert images.std() > 0.05 and (images[0] - images[1]).abs().mean() > 0.02
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_true_guidance_of_flux_is_the_pipelines(folders):
    folder = folders("flux")
    model = load_model(str(folder), true_cfg_scale=GUIDED)
    plain = plain_pipeline("flux", folder)
    expected = pipeline_pictures("flux", plain, 3.5, negative_prompt=["", ""], true_cfg_scale=GUIDED)
    torch.testing.assert_close(our_pictures(model, 3.5), expected, rtol=0, atol=2e-6)
    assert (our_pictures(load_model(str(folder)), 3.5) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", [name for name in NAMES if name != "flux"])
def test_only_one_family_has_guidance_besides_its_guidance_scale(folders, family):
    with pytest.raises(ConfigError, match=r"^true_cfg_scale = 2\.0 must be 1 for a \w+Pipeline"):
        load(family, folders(family), true_cfg_scale=2.0)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("guidance_scale", [1.0, GUIDED])
def test_the_gradient_is_autograds(folders, family, guidance_scale):
    ours, expected = gradients(family, folders(family), guidance_scale)
    assert expected.norm() > 0 and (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", NAMES)
def test_a_run_stops_continues_and_its_lora_is_the_pipelines(folders, family, tmp_path):
    """Two epochs at once are one, a stop and another; the checkpoint loads in the plain pipeline, and makes a soup.

    Text encoders are trained where they can be, but for the other half of the soup.
    """
    folder, with_text = folders(family), {"train_text_encoder": family in ENCODERS}
    run = lambda name, **fields: train(config_for(family, folder, tmp_path, run_name=name, **fields))  # noqa: E731
    whole, other = run("whole", **with_text), run("other", seed=1, num_epochs=1)
    run("parts", num_epochs=1, **with_text)
    assert largest_difference(whole, run("parts", resume_from="latest", **with_text)) == 0
    lora = read_lora(whole)
    assert {n.partition(".")[0] for n in lora.modules if n.startswith("text_encoder")} == ENCODERS.get(family, set())
    assert {m for m in lora.modules if not lora.tensors[f"{m}.lora_B.weight"].any()} == UNUSED.get(family, set())
    difference, change = lora_there(family, folder, whole)
    assert difference <= 2e-6 and change > 1e-3
    assert soup_ends(family, folder, tmp_path, [whole, other]) == 0


@pytest.mark.parametrize("family", NAMES)
def test_a_skeleton_has_the_conditioning_and_the_latents_of_the_loaded_model(folders, family):
    options = {"resolution": SIDE.get(family)}
    loaded = load_model(str(folders(family)), dtype=torch.bfloat16, **options)
    blank = skeleton(folder_config(folders(family)), torch.bfloat16, **options)
    real, planned = loaded.encode_prompts(PROMPTS), blank.blank_conditioning(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in planned.items()}
    assert blank.latent_shape == loaded.latent_shape
    for branch in blank.branches(planned, GUIDED):
        output = blank.predict(blank.init_latents([torch.Generator()] * 2), torch.zeros((), device="meta"), branch)
        assert output.shape == (2, *loaded.latent_shape)


@pytest.mark.parametrize("family", NAMES)
def test_prompts_are_encoded_once(folders, family):
    model = load(family, folders(family))
    first = model.encode_prompts(PROMPTS)
    model.encode = None
    again = model.encode_prompts(PROMPTS[::-1])
    assert model.knows(PROMPTS) and not model.knows(["a dog"])
    assert all(torch.equal(again[name], tensor.flip(0)) for name, tensor in first.items())


def test_stable_diffusion_3_can_do_without_t5(folders):
    folder = folders("sd3")
    model = load_model(str(folder), without=["t5"])
    assert len(model.text_encoders) == 2 and model.reader()[1] == 77
    plain = plain_pipeline("sd3", folder, text_encoder_3=None, tokenizer_3=None)
    expected = pipeline_pictures("sd3", plain, GUIDED)
    torch.testing.assert_close(our_pictures(model, GUIDED), expected, rtol=0, atol=2e-6)
    planned = skeleton(folder_config(folder), torch.float32, without=["t5"])
    assert (
        planned.blank_conditioning(1)["prompt_embeds"].shape == model.encode_prompts(["a cat"])["prompt_embeds"].shape
    )


@pytest.mark.parametrize("family", [name for name in NAMES if name != "sd3"])
def test_no_other_family_can(folders, family):
    with pytest.raises(ConfigError, match=r"^pretrained\.without = 't5' must be empty for a \w+Pipeline"):
        load_model(str(folders(family)), without=["t5"])


def test_the_vae_of_xl_is_kept_from_overflowing_in_half_precision(folders, tmp_path):
    model = load_model(str(folders("sdxl")), dtype=torch.float16)
    assert model.decoder.config.force_upcast and model.decoder.dtype == torch.float32
    assert model.denoiser.dtype == torch.float16
    vae = diffusers.AutoencoderKL.from_pretrained(folders("sdxl") / "vae", force_upcast=False)
    with torch.no_grad():
        vae.post_quant_conv.bias.add_(1)
    vae.save_pretrained(tmp_path / "vae")
    other = load_model(str(folders("sdxl")), dtype=torch.float16, vae=str(tmp_path / "vae"))
    assert other.decoder.dtype == torch.float16
    assert not torch.equal(other.decoder.post_quant_conv.bias.float(), model.decoder.post_quant_conv.bias.float())
    with pytest.raises(ConfigError, match=r"^pretrained\.vae = '.*nowhere' could not be loaded"):
        load_model(str(folders("sdxl")), vae=str(tmp_path / "nowhere"))


def test_xl_with_normalised_latents_and_an_empty_prompt_instead_of_zeros(tmp_path):
    folder = make_family(tmp_path / "p", "sdxl", force_zeros_for_empty_prompt=False)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "latents_mean": [-1.6, 1.3, 0.2, -0.4], "latents_std": [8.4, 5.6, 5.2, 9.0]
    }))  # fmt: skip
    expected = pipeline_pictures("sdxl", plain_pipeline("sdxl", folder), GUIDED)
    torch.testing.assert_close(our_pictures(load_model(str(folder)), GUIDED), expected, rtol=0, atol=2e-6)


def test_a_distilled_klein_knows_no_guidance(tmp_path):
    folder = make_family(tmp_path / "p", "flux2", is_distilled=True)
    model = load_model(str(folder), resolution=16)
    assert not model.takes_guidance and set(model.encode_prompts(PROMPTS)) == {"prompt_embeds"}
    expected = pipeline_pictures("flux2", plain_pipeline("flux2", folder), 1.0)
    for scale in (1.0, GUIDED):
        torch.testing.assert_close(our_pictures(model, scale), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "flux2", "z_image"])
def test_smaller_pictures(folders, family):
    model = load_model(str(folders(family)), resolution=8)
    assert our_pictures(model, 1.0).shape == (2, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"^resolution = 9 must be a multiple of 4"):
        load_model(str(folders(family)), resolution=9)


@pytest.mark.parametrize("family", NAMES)
def test_a_negative_prompt_is_the_pipelines(folders, family):
    """One for all, but for the first prompt, which has one of its own."""
    true = {"true_cfg_scale": GUIDED} if family == "flux" else {}
    scale, words = 3.5 if family == "flux" else GUIDED, ["a blue square", "a red fish"]
    model = load(family, folders(family), negative_prompt=words[1], **true)
    model.negatives = {PROMPTS[0]: words[0]}
    pipeline = plain_pipeline(family, folders(family))
    given = {"negative_prompt": words}
    if family == "flux2":  # the one pipeline that takes only its embeddings
        given = {"negative_prompt_embeds": model.encode(words)["prompt_embeds"]}
    expected = pipeline_pictures(family, pipeline, scale, **given, **true)
    images = our_pictures(model, scale)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
    model.negatives = {}
    others = our_pictures(model, scale)
    assert (images[0] - others[0]).abs().max() > 1e-4 > (images[1] - others[1]).abs().max()
    assert (images - our_pictures(load(family, folders(family), **true), scale)).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize(("size", "height", "width"), [("24x16", 16, 24), ("8X24", 24, 8)])
@pytest.mark.parametrize("family", NAMES)
def test_pictures_that_are_not_square_are_the_pipelines(folders, family, size, height, width):
    model, pipeline = load(family, folders(family), resolution=size), plain_pipeline(family, folders(family))
    images = our_pictures(model, GUIDED)
    assert images.shape[-2:] == (height, width)
    expected = pipeline_pictures(family, pipeline, GUIDED, height=height, width=width)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match=r"^resolution = 24x18 must be a multiple of 4 in width and height"):
        load(family, folders(family), resolution="24x18")


def test_a_run_with_pictures_that_are_not_square(toy_config):
    """Stable Diffusion: training, evaluation and the pictures of the run folder."""
    checkpoint = train(toy_config(resolution="32x16", num_epochs=1))
    images, _ = torch.load(checkpoint.parents[1] / "samples" / "before.pt", weights_only=True)
    assert images.shape[-2:] == (16, 32) and read_lora(checkpoint).tensors
    (_, picture), *_ = read_grid(checkpoint.parents[1] / "samples" / "step_000000.png")
    assert picture.width == 2 * picture.height


@pytest.mark.parametrize("preset", models.PRESETS)
def test_a_preset_is_of_its_family_and_of_a_model_whose_size_is_known(preset):
    config = resolve(models.get_config(preset), num_processes=4)
    assert find_config(config.pretrained.model)["family"] == preset.removesuffix("_turbo")
    with pytest.raises(ConfigError, match=r"^preset = 'sdx' is not one of 'sdxl', "):
        models.get_config("sdx")


def test_a_pipeline_of_no_known_family(folders, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ConfigError, match=r"is a 'WanPipeline', not one of StableDiffusionPipeline, "):
        load_model(str(folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^pretrained\.model = '.*p' could not be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize("family", NAMES)
def test_long_prompts_are_told_of(folders, family, capsys):
    model = load(family, folders(family))
    _, limit = model.reader()
    told = "warning: prompts are truncated to "
    model.encode_prompts(["a " * (limit // 3)])
    assert told not in capsys.readouterr().err
    model.encode_prompts(["a " * (limit + 5)])
    assert told in capsys.readouterr().err
