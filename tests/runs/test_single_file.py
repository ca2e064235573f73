import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from alignprop.method.samplers import build_sampler
from alignprop.models.loading import load_model
from alignprop.models.said import follow, said_by
from tests.helpers.single_file import make_pipeline, write_single_file

PARTS = ("unet", "vae", "text_encoder")
CONFIG_FILES = ("*.json", "*.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("random") / "pipeline", prediction_type="v_prediction")


def picture(pipeline):
    # Weights mapped from a file lie at odd addresses, where CPU kernels round differently (4e-6 here).
    for weight in (weight for part in PARTS for weight in getattr(pipeline, part).parameters()):
        weight.data = weight.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline("a red cat", num_inference_steps=2, generator=noise, output_type="pt").images


def test_folder_is_a_small_stable_diffusion(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert sum(weight.numel() for part in PARTS for weight in getattr(pipeline, part).parameters()) < 1_000_000
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.tokenize("a photo of the red cat") == [
        "a</w>", "photo</w>", "of</w>", "the</w>", "red</w>", "cat</w>"
    ]  # fmt: skip
    assert pipeline.tokenizer.tokenize("zoo") == ["z", "o", "o</w>"]  # words it has no merge for fall into bytes
    tokens, text = pipeline.tokenizer("a", padding="max_length").input_ids, pipeline.text_encoder.config
    assert len(tokens) == 77 and tokens[0] == text.bos_token_id and set(tokens[2:]) == {text.eos_token_id}
    images = picture(pipeline)
    assert images.shape == (1, 3, 64, 64)
    assert images.std() > 0.01


def test_building_leaves_the_global_random_state_alone(tmp_path):
    torch.rand(1)  # so that the state is not by chance the one that building ends in
    before = torch.get_rng_state()
    make_pipeline(tmp_path / "pipeline")
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_are_those_of_the_released_checkpoints(folder, tmp_path):
    """Marker keys of Stable Diffusion 1.x: the ones by which loaders tell it from its successors."""
    state = load_file(write_single_file(folder, tmp_path / "model.safetensors"))
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "first_stage_model.quant_conv.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.3.block.2.conv1.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    } <= state.keys()
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_single_file_is_the_folder(folder, tmp_path, kind):
    """Loaded with a configuration folder that holds no weight, so that every weight comes out of the file."""
    path = write_single_file(folder, tmp_path / f"model.{kind}")
    config = tmp_path / "config"
    for pattern in CONFIG_FILES:
        for file in folder.rglob(pattern):
            copy = config / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())

    expected = StableDiffusionPipeline.from_pretrained(folder)
    loaded = StableDiffusionPipeline.from_single_file(str(path), config=str(config), local_files_only=True)
    for part in PARTS:
        wanted, found = getattr(expected, part).state_dict(), getattr(loaded, part).state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[key], found[key]) for key in wanted), part
    assert torch.equal(picture(loaded), picture(expected))


def marked(folder, path, keys=(), header=None):
    """A single file in which a trainer has left some empty tensors, or a header."""
    state = load_file(write_single_file(folder, path))
    save_file(state | {key: torch.zeros(0) for key in keys}, path, header)
    return str(path)


@pytest.mark.parametrize(("keys", "header", "expected"), [
    (["v_pred"], None, {"prediction_type": "v_prediction"}),
    ([], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    (["v_pred", "ztsnr"], None,
     {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
])  # fmt: skip
def test_what_a_file_says_of_itself_counts(tmp_path, capsys, keys, header, expected):
    """Its configuration is that of an epsilon model, as for any file of Stable Diffusion 1.x."""
    folder = make_pipeline(tmp_path / "epsilon")
    model = load_model(marked(folder, tmp_path / "model.safetensors", keys, header), config=str(folder))
    assert {name: model.scheduler.config[name] for name in expected} == expected
    told = capsys.readouterr().err
    assert "says prediction_type = 'v_prediction'" in told and "its configuration 'epsilon'" in told
    sampler = build_sampler(model.scheduler, 4, 0.0)
    same = DDIMScheduler.from_config(load_model(str(folder)).scheduler.config, **expected)
    assert torch.equal(sampler.b, build_sampler(same, 4, 0.0).b)
    assert ("ztsnr" in keys) == (sampler.timesteps[0] == 999)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_that_cannot_begin_at_pure_noise_gives_way(scheduler):
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    followed = follow(scheduler(beta_schedule="scaled_linear"), said, "x")
    assert {name: followed.config[name] for name in said} == said
    assert followed.config.beta_schedule == "scaled_linear"


def test_a_file_that_agrees_or_says_nothing_is_silent(folder, tmp_path, capsys):
    for keys, header in (([], None), (["v_pred"], None), ([], {"modelspec.prediction_type": "v"})):
        model = load_model(marked(folder, tmp_path / "model.safetensors", keys, header), config=str(folder))
        assert model.scheduler.config.prediction_type == "v_prediction"
    assert said_by("model.ckpt") == {}
    assert "says" not in capsys.readouterr().err


# ---- folders of which some parts have variants alone


def varied(folder, tmp_path, *parts, variant="fp16", **sharded):
    """A copy in which these parts have files of a variant only."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "copy")
    for part in parts:
        for file in (tmp_path / "copy" / part).glob("*.safetensors"):
            file.unlink()
        getattr(pipeline, part).save_pretrained(tmp_path / "copy" / part, variant=variant, **sharded)
    return str(tmp_path / "copy")


@pytest.mark.parametrize(("parts", "options"), [
    (PARTS, {}), (("unet",), {}), (("vae", "text_encoder"), {"variant": "bf16"}),
    (("unet",), {"max_shard_size": "1MB"}),
])  # fmt: skip
def test_a_folder_with_a_variant_alone_is_loaded(folder, tmp_path, capsys, parts, options):
    model = load_model(varied(folder, tmp_path, *parts, **options))
    expected = load_model(str(folder))
    for ours, theirs in zip((model.denoiser, model.decoder), (expected.denoiser, expected.decoder), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    told = capsys.readouterr().err
    assert (
        f"the variant {options.get('variant', 'fp16')!r} of {', '.join(sorted(parts))}, which have no plain weight"
        in told
    )


def test_plain_files_are_taken_unless_a_variant_is_asked_for(folder, tmp_path, capsys):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.fill_(3.0)
    pipeline.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert "no plain weight files" not in capsys.readouterr().err
    assert (load_model(str(tmp_path)).denoiser.conv_in.bias != 3).all()
    assert (load_model(str(tmp_path), variant="fp16").denoiser.conv_in.bias == 3).all()
