import io
import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from alignprop.evaluation.pictures import save_grid
from alignprop.lora.files import LORA_FILE
from alignprop.publish.card import model_card, usage
from alignprop.publish.hub import contents_of
from alignprop.publish.run_folder import read_run
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve, save_config
from config import ddpo
from tests.helpers.training import train
from tests.unit.test_pictures import BLUE, RED, flat
from tests.unit.test_resolve import preset


def eval_row(step, **rewards):
    return {"kind": "eval", "step": step, "epoch": 0, "reward": 0.0, "rewards": rewards}


def train_row(step, **rewards):
    return {"kind": "train", "step": step, "epoch": 0, "reward": 0.0, "rewards": rewards or {"hps": 0.0}}


def make_run(folder, rows=(), config=None, checkpoints=(2, 4), best=None, grids=()):
    """What a run might have left."""
    for step in checkpoints:
        (folder / "checkpoints" / f"checkpoint_{step}").mkdir(parents=True)
        (folder / "checkpoints" / f"checkpoint_{step}" / LORA_FILE).write_bytes(b"weights")
    if best:
        (folder / "checkpoints" / "best").symlink_to(f"checkpoint_{best}")
    for step in grids:
        save_grid(flat(RED, RED, BLUE), ["a cat\n1.00", "a cat\n2.00", 'two "blue" birds\n3.00'],
                  folder / "samples" / f"step_{step:06d}.png")  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_config(resolve(config or preset(), 1), folder / "config.json")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def card_of(folder, repo="me/toy"):
    """The header, the text and the names of what is uploaded."""
    contents = contents_of(read_run(folder), repo)
    card = ModelCard(contents["README.md"].decode())
    return card.data.to_dict(), card.text, set(contents)


def table(text, first):
    """{cell of the first column: the others} of the table whose head begins with `first`."""
    lines = text[text.index(first) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells if set(row) != {"---"}}


WHOLE = [
    eval_row(0, hps=0.25, clip=0.3) | {"diversity": 0.5}, train_row(1), train_row(2),
    eval_row(2, hps=0.3125, clip=0.2) | {"diversity": 0.25}, train_row(3), train_row(4),
    eval_row(4, hps=0.28, clip=None) | {"diversity": 0.125},
]  # fmt: skip


def test_the_card_of_a_whole_run(tmp_path):
    folder = make_run(tmp_path / "r", WHOLE, best=2, grids=(0, 2, 4))
    for name in ("curves.png", "before_after.png"):
        (folder / name).write_bytes(b"")
    header, text, names = card_of(folder)
    assert header == {
        "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "alignprop", "reward"],
        "widget": [
            {"text": "a cat", "output": {"url": "images/0.png"}},
            {"text": 'two "blue" birds', "output": {"url": "images/1.png"}},
        ],
    }
    assert table(text, "|  | step 0 |") == {
        "": ["step 0", "step 2 (this repository)", "step 4"],
        "`hps`": ["0.25", "0.3125", "0.28"], "`clip`": ["0.3", "0.2", "–"], "`diversity`": ["0.5", "0.25", "0.125"],
    }  # fmt: skip
    for picture in ("before_after.png", "curves.png", "samples/step_000002.png"):
        assert f"]({picture})" in text and picture in names
    told = table(text, "|  |  |")
    assert told["optimizer steps"] == ["2 of the 4 that were made; 400 planned"]
    assert told["reward"] == ["`hps`"] and told["estimator"] == ["`randomized`, truncated_backprop_minmax = [0, 50]"]
    assert told["trained"] == ["LoRA of rank 4, alpha 4"]
    assert "torch 2" in told["versions"][0] and "diffusers 0" in told["versions"][0]
    assert "license" not in header and "license" not in text.lower()


def test_a_card_has_the_schedule_of_the_learning_rate(tmp_path):
    def told(name, **train):
        return table(card_of(make_run(tmp_path / name, WHOLE, config=preset(**train)))[1], "|  |  |")["optimizer"]

    plain = "adamw, learning rate 0.001"
    assert told("a") == [plain] and told("b", train__lr_schedule="cosine") == [f"{plain} (cosine)"]
    both = dict(train__lr_schedule="linear", train__lr_warmup_steps=7)
    assert told("c", **both) == [f"{plain} (linear), 7 updates of warm-up"]


def test_a_card_says_that_the_text_encoder_was_trained_too(tmp_path):
    _, text, _ = card_of(make_run(tmp_path / "r", config=preset(train_text_encoder=True)))
    assert table(text, "|  |  |")["trained"] == ["LoRA of rank 4, alpha 4, also of the text encoder"]


def test_the_gallery_has_the_uploaded_weights_first_picture_of_each_prompt(tmp_path):
    folder = make_run(tmp_path / "r", WHOLE, best=2)
    for step, colours in ((0, (RED, RED, RED)), (2, (BLUE, RED, RED)), (4, (RED, BLUE, BLUE))):
        labels = ["a cat\n1.00", "a cat\n2.00", "a dog\n3.00"]
        save_grid(flat(*colours), labels, folder / "samples" / f"step_{step:06d}.png")
    contents = contents_of(read_run(folder), "me/toy")
    pictures = [path for path in contents if path.startswith("images/")]
    for name, colour in zip(pictures, (BLUE, RED), strict=True):
        with Image.open(io.BytesIO(contents[name])) as picture:
            assert picture.size == (128, 128) and picture.getcolors() == [(128 * 128, colour)]


def test_a_gallery_is_no_longer_than_a_reader_likes(tmp_path):
    folder = make_run(tmp_path / "r", WHOLE, best=2)
    save_grid(flat(*[RED] * 12), [f"{n} cats\n1" for n in range(12)], folder / "samples" / "step_000002.png")
    assert [one["text"] for one in card_of(folder)[0]["widget"]] == [f"{n} cats" for n in range(8)]


def test_where_the_last_step_is_the_best_one_picture_says_it(tmp_path):
    folder = make_run(tmp_path / "r", WHOLE, best=4, grids=(0, 4))
    (folder / "before_after.png").write_bytes(b"")
    _, text, names = card_of(folder)
    assert "](before_after.png)" in text and "samples/" not in text and "samples/step_000004.png" not in names
    assert table(text, "|  | step 0 |")[""] == ["step 0", "step 4 (this repository)"]


@pytest.mark.parametrize("rows", [[], [train_row(1)], [eval_row(0, hps=0.25), *map(train_row, (1, 2, 3, 4, 5))]])
def test_the_card_of_an_interrupted_run_is_sound(tmp_path, rows):
    folder = make_run(tmp_path / "r", rows, grids=(0,) if rows[1:] else ())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    header, text, names = card_of(folder)
    assert "widget" not in header and "<Gallery" not in text and "![" not in text
    assert names == {LORA_FILE, "README.md", "config.json", "metrics.jsonl"}
    assert ("## Results" in text) == (len(rows) > 1)
    assert table(text, "|  |  |")["optimizer steps"][0].endswith("400 planned")


def test_a_model_from_a_folder_is_named_without_its_place(tmp_path):
    (tmp_path / "secret" / "my_model").mkdir(parents=True)
    config = preset(pretrained__model=str(tmp_path / "secret" / "my_model"), prompt_fn=str(tmp_path / "my_prompts.txt"))
    header, text, _ = card_of(make_run(tmp_path / "r", config=config))
    assert "base_model" not in header and "secret" not in text
    assert "`my_model` (not on the hub)" in text and "`my_prompts.txt`" in text


def test_a_reward_that_was_given_as_an_object_has_its_own_name(tmp_path):
    folder = make_run(tmp_path / "r", [train_row(1, hps=1.0)], preset(reward_fn="hps:2,clip:1"))
    assert "`hps:2,clip:1`" in card_of(folder)[1]
    folder = make_run(tmp_path / "s", [train_row(1, brightness=1.0)])
    assert "`brightness`" in card_of(folder)[1] and "`hps`" not in card_of(folder)[1]


def test_ddpo_is_told_from_alignprop(tmp_path):
    header, text, _ = card_of(make_run(tmp_path / "r", config=ddpo.get_config("compressibility")))
    assert header["tags"] == ["text-to-image", "lora", "ddpo", "reward"] and "2305.13301" in text
    told = table(text, "|  |  |")
    assert "estimator" not in told and "loss" not in told
    assert told["epochs"] == ["4; 100 planned"] and told["samples per epoch"] == ["256"]


def test_options_of_an_estimator_are_told(tmp_path):
    config = preset("sparse", plan__num_active=3)
    told = table(card_of(make_run(tmp_path / "r", config=config))[1], "|  |  |")
    assert told["estimator"] == ["`sparse`, num_active = 3"]


def test_the_command_and_the_settings_are_there(tmp_path):
    config = preset(loss="target", loss_target=10.0)
    with config.unlocked():
        config.command = "python main.py --config=config/align_prop.py:hps"
    _, text, _ = card_of(make_run(tmp_path / "r", config=config))
    assert "```\npython main.py --config=config/align_prop.py:hps\n```" in text
    assert table(text, "|  |  |")["loss"] == ["target 10.0"]


def test_the_header_is_yaml_whatever_the_prompts_are(tmp_path):
    prompts = ["---", "a: b", "# no comment", "'\"", "Bär 熊 😀", "- x\\", "null", "yes"]
    run = read_run(make_run(tmp_path / "r"))
    header = yaml.safe_load(model_card(run, "me/toy", prompts).split("\n---\n")[0].removeprefix("---\n"))
    assert [widget["text"] for widget in header["widget"]] == prompts


# ---- what the card says is how it is used


@pytest.mark.parametrize("use_lora", [True, False])
def test_the_code_on_the_card_makes_the_pictures_on_the_card(toy_config, tmp_path, pipeline_folder, use_lora):
    trainer = train(toy_config(num_epochs=1, use_lora=use_lora, train__learning_rate=1e-2, guidance_scale=3.0))
    run = read_run(trainer.run.folder)
    for name, content in contents_of(run, "me/toy").items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    code = usage(run, "me/toy", ["a cat"]).replace("me/toy", str(tmp_path / "downloaded"))
    assert f'from_pretrained("{pipeline_folder.name}"' in code
    found = {}
    exec(code.replace(f'("{pipeline_folder.name}"', f'("{pipeline_folder}"'), found)
    loaded, trained = found["pipeline"].unet, trainer.run.model.denoiser
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, trained.config.cross_attention_dim)
    with torch.no_grad():
        difference = (loaded(x, 500, text).sample - trained(x, 500, text).sample).abs().max()
    assert difference < 1e-5


def test_one_file_is_loaded_as_one(tmp_path):
    (tmp_path / "base.safetensors").write_bytes(b"")
    config = preset(pretrained__model=str(tmp_path / "base.safetensors"))
    code = usage(read_run(make_run(tmp_path / "r", config=config)), "me/toy", [])
    assert 'StableDiffusionPipeline.from_single_file("base.safetensors")' in code


def test_a_revision_belongs_to_the_base_model(tmp_path):
    code = usage(read_run(make_run(tmp_path / "r", config=preset(pretrained__revision="abc"))), "me/toy", [])
    assert 'from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", revision="abc")' in code


def test_the_pipeline_is_called_for_pictures_like_the_runs(tmp_path):
    """Z-Image's pipeline counts guidance from 0; a size and FLUX.1's second guidance are said where they are set."""
    options = dict(pretrained__model="Tongyi-MAI/Z-Image", guidance_scale=5.0, resolution=512)
    code = usage(read_run(make_run(tmp_path / "z", config=preset(**options))), "me/toy", [])
    assert "guidance_scale=4.0, height=512, width=512)" in code
    options = dict(pretrained__model="black-forest-labs/FLUX.1-dev", guidance_scale=3.5, true_cfg_scale=2.0)
    code = usage(read_run(make_run(tmp_path / "f", config=preset(**options))), "me/toy", [])
    assert "guidance_scale=3.5, true_cfg_scale=2.0, negative_prompt='')" in code


def test_a_card_names_the_sizes_and_calls_the_pipeline_for_the_largest(tmp_path):
    run = read_run(make_run(tmp_path / "r", config=preset(resolution="768x512,256")))
    assert "height=512, width=768)" in usage(run, "me/toy", [])
    assert "768x512,256" in model_card(run, "me/toy", [])


# ---- what is no run


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "config.json").unlink(), r"is not a run folder"),
    (lambda folder: (folder / "config.json").write_text("[]"), r"is not a run folder"),
    (lambda folder: (folder / "config.json").write_text("{"), r"is not a run folder"),
    (lambda folder: shutil.rmtree(folder / "checkpoints"), r"has no checkpoint yet"),
    (lambda folder: (checkpoints_of(folder)[-1] / "training_state.pt").touch(), r"checkpoint_4' is damaged \(manifest"),
    (lambda folder: (folder / "metrics.jsonl").write_text("{\n{}\n"), r"line 1 is damaged"),
])  # fmt: skip
def test_what_is_no_run_is_told(tmp_path, damage, message):
    folder = make_run(tmp_path / "r", WHOLE)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        read_run(folder)


def test_a_link_to_a_best_that_is_gone_counts_for_nothing(tmp_path):
    folder = make_run(tmp_path / "r", best=2)
    shutil.rmtree(folder / "checkpoints" / "checkpoint_2")
    assert read_run(folder).step == 4
