import re

import pytest
import torch

from alignprop.engine.seeding import generators
from alignprop.models.base import select
from alignprop.models.loading import load_model
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from tests.helpers.single_file import make_pipeline, write_single_file


@pytest.fixture
def model(pipeline_folder):
    return StableDiffusion.load(str(pipeline_folder))


def weights(model):
    modules = {"denoiser": model.denoiser, "decoder": model.decoder, "text": model.text_encoders[0]}
    return {f"{name}.{key}": tensor for name, m in modules.items() for key, tensor in m.state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_is_the_model_of_its_folder(tmp_path, suffix):
    folder = make_pipeline(tmp_path / "pipeline", "v_prediction")
    path = write_single_file(folder, tmp_path / f"model{suffix}")
    one, other = load_model(str(path), config=str(folder)), load_model(str(folder))
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert one.scheduler.config.prediction_type == "v_prediction"
    half = load_model(str(path), config=str(folder), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    cond = [m.encode_prompts(["a red cat"]) for m in (one, other)]
    torch.testing.assert_close(cond[0]["prompt_embeds"], cond[1]["prompt_embeds"])


@pytest.mark.parametrize("name", ["nowhere/at-all", "missing.safetensors"])
def test_nothing_to_load(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=f"pretrained.model = '{name}' could not be loaded") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path, pipeline_folder):
    path = write_single_file(make_pipeline(tmp_path / "p"), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_model(str(path), config=str(tmp_path / "p"))


def test_everything_is_frozen_and_in_evaluation_mode(model):
    for module in (model.denoiser, model.decoder, *model.text_encoders):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_shapes_come_from_the_model(tmp_path):
    model = load_model(str(make_pipeline(tmp_path / "p", sample_size=12, channels=(16, 32), vae_channels=(8, 16))))
    latents = model.init_latents(generators(range(2), "x"))
    assert latents.shape == (2, 4, 12, 12) and latents.dtype == torch.float32
    assert model.decode(latents).shape == (2, 3, 24, 24)


def test_each_prompt_is_encoded_once(model):
    first = model.encode_prompts(["a cat", "a dog", "a cat"])
    calls = []
    model.pipeline.encode_prompt = lambda *arguments, **options: calls.append(arguments)
    again = model.encode_prompts(["a dog", "a cat"])
    assert calls == []
    assert torch.equal(again["prompt_embeds"], first["prompt_embeds"][[1, 0]])
    assert torch.equal(select(first, torch.tensor([2]))["prompt_embeds"], again["prompt_embeds"][1:])
    assert not torch.equal(first["prompt_embeds"][0], first["negative_prompt_embeds"][0])


def test_the_branches_of_guidance_are_the_unconditional_and_the_conditional_prompt(model):
    cond = model.encode_prompts(["a cat"])
    unconditional, conditional = model.branches(cond, 4.0)
    assert torch.equal(unconditional["prompt_embeds"], cond["negative_prompt_embeds"])
    assert torch.equal(conditional["prompt_embeds"], cond["prompt_embeds"])
    assert [b["prompt_embeds"] is cond["prompt_embeds"] for b in model.branches(cond, 1.0)] == [True]


def test_a_prediction_is_the_networks_output(model):
    cond = model.encode_prompts(["a cat", "a dog"])
    latents, t = model.init_latents(generators(range(2), "x")), torch.tensor(300)
    with torch.no_grad():
        expected = model.denoiser(latents, t, cond["prompt_embeds"]).sample
        assert torch.equal(model.predict(latents, t, {"prompt_embeds": cond["prompt_embeds"]}), expected)


def test_blank_conditioning_has_the_shapes_of_real_one(model):
    real, blank = model.encode_prompts(["a cat", "a dog"]), model.blank_conditioning(2)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in blank.items()}


def test_pictures_lie_in_the_unit_range_and_carry_gradient(model):
    latents = (5 * model.init_latents(generators([0], "x"))).requires_grad_()
    images = model.decode(latents)
    assert images.min() >= 0 and images.max() <= 1 and images.dtype == torch.float32
    images.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_half_precision_model_samples_float32_latents(pipeline_folder):
    model = StableDiffusion.load(str(pipeline_folder), dtype=torch.bfloat16)
    latents = model.init_latents(generators([0], "x"))
    with torch.no_grad():
        (branch,) = model.branches(model.encode_prompts(["a cat"]), 1.0)
        output = model.predict(latents, torch.tensor(1), branch)
        assert output.dtype == torch.bfloat16 and model.decode(latents).dtype == torch.float32


def test_a_model_of_another_family_is_refused(pipeline_folder, tmp_path):
    import json
    import shutil

    from diffusers import UNet2DConditionModel

    shutil.copytree(pipeline_folder, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "p" / "unet")
    with pytest.raises(ConfigError, match="for a StableDiffusionPipeline: its UNet takes 9"):
        load_model(str(tmp_path / "p"))


def test_long_prompts_are_told_of_once(model, capsys):
    model.encode_prompts(["a cat", "a dog " * 99])
    model.encode_prompts(["a bird " * 99])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: prompts are truncated to \d+ tokens, and 'a dog a dog .* …' has \d+", line)


def test_a_prompt_of_just_the_limit_is_not_told_of(model, capsys):
    tokenizer, limit = model.reader()
    words = next(n for n in range(999) if len(tokenizer("a " * n).input_ids) == limit)
    model.encode_prompts(["a " * words])
    assert not capsys.readouterr().err
    model.encode_prompts(["a " * (words + 1)])
    assert capsys.readouterr().err
