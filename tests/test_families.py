"""What holds of every model family: its pictures are its pipeline's, its gradient autograd's, its LoRA loads there."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from alignprop import estimators
from alignprop.checkpoint import checkpoints_of
from alignprop.lora import add_lora, read_lora, set_lora, trainable_parameters
from alignprop.models import FAMILIES
from alignprop.models.configs import folder_config
from alignprop.models.loading import load_model
from alignprop.models.skeleton import skeleton
from alignprop.rollout import Rollout
from alignprop.samplers import build_sampler
from alignprop.seeding import generators
from alignprop.settings import ConfigError
from alignprop.tasks import evaluate, evaluate_soup
from alignprop.trainer import AlignPropTrainer
from tests.tiny_families import SIDE
from tests.tiny_pipelines import make_family

NAMES = [name for name in FAMILIES if name != "sd"]
PROMPTS = ["a red cat", "two blue circle on the square"]
STEPS = 3
GUIDED = 4.0
REWARD = "tests.toy_rewards:redness"

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in made:
            made[family] = make_family(root / family, family)
        return made[family]

    return folder


def plain_pipeline(family, folder):
    pipeline = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_pictures(pipeline, family, guidance_scale, noise, **options):
    """What a person gets who calls the family's own pipeline, [B, 3, H, W]."""
    if family in ("flux", "flux2", "z_image"):
        options |= {"height": 16, "width": 16}
    # Z-Image's pipeline counts guidance from 0, every other from 1.
    guidance_scale -= family == "z_image"
    return pipeline(
        prompt=list(PROMPTS), num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=noise, output_type="pt",
        **options,
    ).images  # fmt: skip


def rollout_of(model, guidance_scale):
    return Rollout(model, build_sampler(model.scheduler, STEPS, 0.0, **model.schedule(STEPS)), guidance_scale)


def our_pictures(model, guidance_scale):
    rollout = rollout_of(model, guidance_scale)
    with torch.no_grad():
        latents, _ = rollout.sample(generators(range(2), "x"), model.encode_prompts(PROMPTS))
        return model.decode(latents)


@pytest.mark.parametrize("family", NAMES)
def test_pictures_are_the_pipelines(folders, family):
    """Same seed, same prompts, same steps, without guidance and with."""
    model, pipeline = load_model(str(folders(family)), resolution=SIDE.get(family)), plain_pipeline(family, folders(family))
    pictures = [our_pictures(model, scale) for scale in (1.0, GUIDED)]
    for images, scale in zip(pictures, (1.0, GUIDED), strict=True):
        expected = pipeline_pictures(pipeline, family, scale, generators(range(2), "x"))
        assert images.std() > 0.05 and (images[0] - images[1]).abs().mean() > 0.02
        torch.testing.assert_close(images, expected, rtol=0, atol=5e-6)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_true_guidance_of_flux_is_the_pipelines(folders):
    folder = folders("flux")
    model = load_model(str(folder), true_cfg_scale=GUIDED)
    expected = pipeline_pictures(
        plain_pipeline("flux", folder), "flux", 3.5, generators(range(2), "x"), negative_prompt=["", ""],
        true_cfg_scale=GUIDED,
    )  # fmt: skip
    torch.testing.assert_close(our_pictures(model, 3.5), expected, rtol=0, atol=5e-6)
    assert (our_pictures(load_model(str(folder)), 3.5) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("family", [name for name in NAMES if name != "flux"])
def test_only_one_family_has_guidance_besides_its_guidance_scale(folders, family):
    with pytest.raises(ConfigError, match=r"^true_cfg_scale = 2\.0 must be 1 for a \w+Pipeline"):
        load_model(str(folders(family)), resolution=SIDE.get(family), true_cfg_scale=2.0)


def gradient_by_autograd(model, guidance_scale, weight):
    """∂(sum of weight · images)/∂LoRA through the scheduler's own steps."""
    scheduler, cond = model.scheduler, model.encode_prompts(PROMPTS)
    schedule = model.schedule(STEPS)
    scheduler.set_timesteps(STEPS if "sigmas" not in schedule else None, **schedule)
    latents, branches = model.init_latents(generators(range(2), "x")), model.branches(cond, guidance_scale)
    for t in scheduler.timesteps:
        outputs = [model.predict(latents, t, branch) for branch in branches]
        mixed = outputs[0] if len(outputs) == 1 else outputs[0] + guidance_scale * (outputs[1] - outputs[0])
        latents = scheduler.step(mixed, t, latents).prev_sample
    parameters = list(trainable_parameters(model.denoiser).values())
    return torch.autograd.grad((weight * model.decode(latents)).sum(), parameters)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("guidance_scale", [1.0, GUIDED])
def test_the_gradient_is_autograds(folders, family, guidance_scale):
    model = load_model(str(folders(family)), resolution=SIDE.get(family))
    add_lora(model.denoiser, 2, 2.0, model.lora_targets, seed=0)
    parameters = trainable_parameters(model.denoiser)
    noise = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=noise)
    weight = torch.randn(2, 3, 16, 16, generator=noise)
    expected = gradient_by_autograd(model, guidance_scale, weight)
    rollout = rollout_of(model, guidance_scale)
    latents = rollout(generators(range(2), "x"), model.encode_prompts(PROMPTS), estimators.full(rollout.sampler, 2))
    (weight * model.decode(latents)).sum().backward()
    ours = torch.cat([p.grad.flatten() for p in parameters.values()])
    expected = torch.cat([g.flatten() for g in expected])
    assert expected.norm() > 0 and (ours - expected).norm() <= 1e-5 * expected.norm()


def configured(toy_config, folder, family, preset="quickstart", **overrides):
    return toy_config(
        preset, pretrained__model=str(folder), resolution=SIDE.get(family), guidance_scale=GUIDED,
        train__learning_rate=0.05, **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_a_run_stops_continues_and_its_lora_is_the_pipelines(toy_config, folders, family, tmp_path):
    """Two epochs at once are one, a stop and another; the checkpoint loads in the plain pipeline, and makes a soup."""
    folder = folders(family)
    whole = AlignPropTrainer(configured(toy_config, folder, family, run_name="whole"))
    whole.train()
    half = AlignPropTrainer(configured(toy_config, folder, family, run_name="parts", num_epochs=1))
    half.train()
    AlignPropTrainer(configured(toy_config, folder, family, run_name="parts", resume_from="latest")).train()
    last = checkpoints_of(whole.run.folder)[-1]
    lora, parts = read_lora(last), read_lora(checkpoints_of(half.run.folder)[-1])
    differences = {n: (parts.tensors[n] - t).abs().max().item() for n, t in lora.tensors.items()}
    assert {n: d for n, d in differences.items() if d} == {}
    assert {m for m in lora.modules if not lora.tensors[f"{m}.lora_B.weight"].any()} == set()

    ours = load_model(str(folder), resolution=SIDE.get(family))
    set_lora(ours.denoiser, lora)
    pipeline, noise = plain_pipeline(family, folder), lambda: generators(range(2), "x")
    before = pipeline_pictures(pipeline, family, GUIDED, noise())
    pipeline.load_lora_weights(last)
    after = pipeline_pictures(pipeline, family, GUIDED, noise())
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(our_pictures(ours, GUIDED), after, rtol=0, atol=5e-6)

    soup = evaluate_soup(configured(
        toy_config, folder, family, "tiny_soup", run_name="soup", resume_from=str(last), mixing_coef_1=(0.0, 1.0)
    ))  # fmt: skip
    alone = evaluate(configured(toy_config, folder, family, "tiny_evaluate", run_name="e", resume_from=str(last)))
    scores = json.loads((soup / "soup.json").read_text())
    assert scores[0][REWARD]["mean"] != scores[1][REWARD]["mean"]
    pixels = [np.asarray(Image.open(place / "images" / "000000.png")) for place in (soup / "c_1", alone)]
    assert np.array_equal(*pixels)


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
    model = load_model(str(folders(family)), resolution=SIDE.get(family))
    first = model.encode_prompts(PROMPTS)
    model.encode = None
    again = model.encode_prompts(PROMPTS[::-1])
    assert model.knows(PROMPTS) and not model.knows(["a dog"])
    assert all(torch.equal(again[name], tensor.flip(0)) for name, tensor in first.items())


def test_stable_diffusion_3_can_do_without_t5(folders):
    folder = folders("sd3")
    model = load_model(str(folder), without=["t5"])
    assert len(model.text_encoders) == 2 and model.reader()[1] == 77
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline_pictures(pipeline, "sd3", GUIDED, generators(range(2), "x"))
    torch.testing.assert_close(our_pictures(model, GUIDED), expected, rtol=0, atol=5e-6)
    planned = skeleton(folder_config(folder), torch.float32, without=["t5"])
    assert planned.blank_conditioning(1)["prompt_embeds"].shape == model.encode_prompts(["a cat"])["prompt_embeds"].shape


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
    expected = pipeline_pictures(plain_pipeline("sdxl", folder), "sdxl", GUIDED, generators(range(2), "x"))
    torch.testing.assert_close(our_pictures(load_model(str(folder)), GUIDED), expected, rtol=0, atol=5e-6)


def test_a_distilled_klein_knows_no_guidance(tmp_path):
    folder = make_family(tmp_path / "p", "flux2", is_distilled=True)
    model = load_model(str(folder), resolution=16)
    assert not model.takes_guidance and set(model.encode_prompts(PROMPTS)) == {"prompt_embeds"}
    expected = pipeline_pictures(plain_pipeline("flux2", folder), "flux2", 1.0, generators(range(2), "x"))
    for scale in (1.0, GUIDED):
        torch.testing.assert_close(our_pictures(model, scale), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "flux2", "z_image"])
def test_smaller_pictures(folders, family):
    model = load_model(str(folders(family)), resolution=8)
    assert our_pictures(model, 1.0).shape == (2, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"^resolution = 9 must be a multiple of 4"):
        load_model(str(folders(family)), resolution=9)


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
    model = load_model(str(folders(family)), resolution=SIDE.get(family))
    _, limit = model.reader()
    told = "warning: prompts are truncated to "
    model.encode_prompts(["a " * (limit // 3)])
    assert told not in capsys.readouterr().err
    model.encode_prompts(["a " * (limit + 5)])
    assert told in capsys.readouterr().err
