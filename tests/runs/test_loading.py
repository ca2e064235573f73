"""Models whose files lack something, or say something unusual: right, or refused in one line."""

import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from alignprop.models.loading import load_model
from alignprop.models.said import only_variant
from alignprop.models.sd3 import StableDiffusion3
from alignprop.models.whole import set_precision, whole_parts
from alignprop.settings.errors import ConfigError
from tests.helpers.single_file import make_pipeline, write_single_file
from tests.helpers.tiny_pipelines import make_family


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A function: family -> the folder of a tiny pipeline, which nobody changes."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family) / "p", family)
        return made[family]

    return folder


@pytest.fixture
def copy(families, tmp_path):
    """A function: family -> a copy of its folder."""
    import shutil

    return lambda family: shutil.copytree(families(family), tmp_path / family)


def change_json(path, **fields):
    """Fields that are None are taken out of the file."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# ---- weights that are in no file


@pytest.mark.parametrize(("family", "part", "weight"), [
    ("sd", "unet", "conv_out.weight"),
    ("sd", "vae", "decoder.conv_in.weight"),
    ("sd", "text_encoder", "mlp.fc1.weight"),
    ("sdxl", "text_encoder_2", "text_projection.weight"),
    ("sd3", "text_encoder_3", "DenseReluDense.wo.weight"),
    ("flux", "transformer", "x_embedder.weight"),
    ("flux", "text_encoder_2", "SelfAttention.k.weight"),
])  # fmt: skip
def test_a_part_without_some_weights_is_refused(copy, family, part, weight):
    folder = copy(family)
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(weight))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"the files lack 1 of the weights of its \w+, such as '.*weight'") as error:
        load_model(str(folder))
    assert weight in str(error.value) and "\n" not in str(error.value)


def test_a_single_file_without_some_weights_is_refused(tmp_path):
    folder = make_pipeline(tmp_path / "p", channels=(16, 32), layers_per_block=1)
    path = tmp_path / "model.safetensors"
    write_single_file(folder, path)
    tensors = load_file(path)
    for part in ("cond_stage_model", "model.diffusion_model.out", "first_stage_model.decoder"):
        lost = next(name for name in tensors if name.startswith(part) and name.endswith("weight"))
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
        with pytest.raises(ConfigError, match="could not be loaded"):
            load_model(str(path), config=str(folder))


def test_the_libraries_are_as_they_were():
    before = AutoencoderKL.from_pretrained
    with whole_parts():
        assert AutoencoderKL.from_pretrained != before
    assert AutoencoderKL.from_pretrained == before


# ---- precision


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_t5_keeps_the_layers_that_overflow_in_float32(families, family):
    """As transformers does when it loads in float16; here the model is trained whole."""
    t5 = load_model(str(families(family)), dtype=torch.float16, full=True).text_encoders[-1]
    plain = load_model(str(families(family))).text_encoders[-1]
    kept = {name: p for name, p in t5.named_parameters() if p.dtype == torch.float32}
    assert kept and all(".wo." in name for name in kept)
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in kept.items())
    set_precision(plain, torch.bfloat16)
    assert {p.dtype for n, p in plain.named_parameters() if ".wo." not in n} == {torch.bfloat16}


# ---- VAEs


def tiny_vae(folder, channels, latents):
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, latent_channels=latents,
        num_encoder_blocks=(1,) * len(channels), num_decoder_blocks=(1,) * len(channels),
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_another_vae_may_be_of_another_class(families, tmp_path, family):
    base = load_model(str(families(family)), resolution=16)
    theirs = tiny_vae(tmp_path / "vae", (8, 8), base.decoder.config.latent_channels).eval()
    model = load_model(str(families(family)), resolution=16, vae=str(tmp_path / "vae"))
    assert isinstance(model.decoder, AutoencoderTiny)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (theirs.decode(latents / theirs.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(model.decode(latents), expected)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_a_vae_of_other_latents_is_refused(families, tmp_path, family):
    tiny_vae(tmp_path / "vae", (8, 8), 7)
    with pytest.raises(ConfigError, match=r"^pretrained.vae = .* has latents of 7 channels, and this model's have \d+"):
        load_model(str(families(family)), vae=str(tmp_path / "vae"))


# ---- what configurations leave open


@pytest.mark.parametrize("length", [None, 10**30, 512, 20])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_prompt_ends_where_the_text_encoder_does(copy, families, family, length):
    folder = copy(family)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        change_json(path, model_max_length=length)
    prompts = ["a photo of the cat " * 40]
    found = load_model(str(folder)).encode_prompts(prompts)["prompt_embeds"]
    assert found.shape[1] == (20 if length == 20 else 77)
    if length != 20:
        torch.testing.assert_close(found, load_model(str(families(family))).encode_prompts(prompts)["prompt_embeds"])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_model_that_names_no_size_needs_one(copy, family):
    folder = copy(family)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": None}))
    with pytest.raises(ConfigError, match=r"^resolution = None: the model's files name no size"):
        load_model(str(folder))
    assert load_model(str(folder), resolution=16).latent_shape[1:] == (8, 8)


@pytest.mark.parametrize(("family", "part"), [("sdxl", "text_encoder"), ("sd3", "text_encoder_3"), ("sd", "tokenizer")])
def test_a_pipeline_without_a_part_is_refused(copy, family, part):
    folder = copy(family)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: [None, None]}))
    with pytest.raises(ConfigError, match=rf"^pretrained.model = .*{part}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_what_is_left_out_of_a_single_file_is_not_looked_for(monkeypatch, tmp_path):
    asked = {}

    def from_single_file(name, **options):
        asked.update(options)
        raise ValueError("read no further")

    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_single_file", from_single_file)
    with pytest.raises(ConfigError, match="a single file that holds denoiser, VAE and text encoders"):
        StableDiffusion3.load(str(tmp_path / "model.safetensors"), without=("t5",))
    assert {"text_encoder_3", "tokenizer_3"} <= asked.keys() and asked["text_encoder_3"] is None
    assert only_variant(str(tmp_path)) is None
