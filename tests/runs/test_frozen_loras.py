"""LoRAs that stay on, frozen, beneath the trained one."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from alignprop.engine.seeding import generators
from alignprop.lora.files import read_lora
from alignprop.lora.frozen import merge_frozen, parse_loras
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.tasks import evaluate
from scripts.bench.families import GUIDED, config_for, load, our_pictures, pipeline_pictures, plain_pipeline
from scripts.bench.families import train as train_family
from tests.helpers.tiny_pipelines import make_family
from tests.helpers.training import train


@pytest.fixture
def other(toy_config, tmp_path):
    """A LoRA of an earlier run with large steps."""
    run = train(toy_config(run_name="other", num_epochs=1, train__learning_rate=0.05, lora_rank=2)).run
    return checkpoints_of(run.folder)[-1]


def pictures_of(pipeline):
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline(["a cat", "a dog"], generator=generators(range(2), "x"), **options).images


def test_a_run_trains_on_top_and_a_pipeline_has_both(toy_config, other, pipeline_folder):
    """The pictures of a run are those of a pipeline with the frozen LoRA at its strength, and the trained one."""
    trainer = train(
        toy_config(run_name="top", num_epochs=1, pretrained__loras=f"{other}@0.5", train__learning_rate=0.05)
    )
    run = trainer.run
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    plain = pictures_of(pipeline)
    pipeline.load_lora_weights(other, adapter_name="other")
    pipeline.load_lora_weights(checkpoints_of(run.folder)[-1], adapter_name="top")
    pipeline.scheduler = type(run.model.scheduler).from_config(run.model.scheduler.config)
    found = {}
    for name, strengths in {"frozen": [0.5, 0.0], "both": [0.5, 1.0]}.items():
        pipeline.set_adapters(["other", "top"], strengths)
        found[name] = pictures_of(pipeline)
    assert (found["frozen"] - plain).abs().max() > 1e-3 and (found["both"] - found["frozen"]).abs().max() > 1e-3
    ours = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    ours.unet = run.model.denoiser
    torch.testing.assert_close(pictures_of(ours), found["both"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_text_encoders_and_other_families(family, tmp_path):
    folder = make_family(tmp_path / "p", family)
    path = train_family(config_for(family, folder, tmp_path, num_epochs=1, train_text_encoder=True))
    model, pipeline = load(family, folder), plain_pipeline(family, folder)
    before = our_pictures(load(family, folder), GUIDED)
    merge_frozen(model, [(Path(path), 0.7)])
    pipeline.load_lora_weights(path)
    parts = {"unet", "transformer"} | {name.partition(".")[0] for name in read_lora(path).modules}
    pipeline.fuse_lora(components=sorted(parts & pipeline.components.keys()), lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours = our_pictures(model, GUIDED)
    torch.testing.assert_close(ours, pipeline_pictures(family, pipeline, GUIDED), rtol=0, atol=5e-6)
    assert (ours - before).abs().max() > 1e-3


def test_a_checkpoint_is_not_of_the_plain_base(toy_config, other):
    train(toy_config(run_name="top", num_epochs=1, pretrained__loras=str(other)))
    told = "^resume_from = .* with different weights: pretrained.loras, pretrained.denoiser or the files are others$"
    with pytest.raises(ConfigError, match=told):
        evaluate(toy_config(run_name="top", resume_from="latest", task="evaluate"))
    evaluate(toy_config(run_name="top", resume_from="latest", task="evaluate", pretrained__loras=str(other)))


def test_names_and_strengths():
    assert parse_loras("a/b, c.safetensors@0.6,d@-1") == [("a/b", 1.0), ("c.safetensors", 0.6), ("d", -1.0)]
    assert parse_loras("") == []


@pytest.mark.parametrize(("value", "message"), [
    ("a@b", r"^pretrained.loras = 'a@b' must be NAME or NAME@STRENGTH"),
    ("a@nan", r"^pretrained.loras = 'a@nan' must be NAME or NAME@STRENGTH"),
    ("a@0", r"^pretrained.loras = 'a@0' must be NAME or NAME@STRENGTH.* a strength is not 0"),
    ("@0.5", r"^pretrained.loras = '@0.5' must be NAME or NAME@STRENGTH"),
    ("nowhere.safetensors", r"^pretrained.loras: 'nowhere.safetensors' is no file, no folder and no name on the hub"),
])  # fmt: skip
def test_what_is_no_lora_is_one_line_before_the_model_is_loaded(toy_config, monkeypatch, value, message):
    monkeypatch.setattr("alignprop.build.load_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        train(toy_config(pretrained__loras=value))


def test_a_folder_without_a_lora_names_the_field(toy_config):
    with pytest.raises(ConfigError, match=r"^pretrained.loras: no LoRA file at"):
        train(toy_config(pretrained__loras="."))
