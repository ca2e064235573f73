"""Fields that everybody expects of a trainer, together, from the command line to the files of the run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from alignprop.engine.seeding import generator, generators
from alignprop.evaluation.pictures import read_grid
from alignprop.lora.adapters import add_adapter, get_adapter, trained_parameters
from alignprop.lora.files import LORA_FILE, save_lora
from alignprop.lora.scaling import scale_lora
from alignprop.models import FAMILIES
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.sizes import picture_sizes
from scripts.bench.families import GUIDED, config_for, load, rollout_of
from tests.cli.test_main import flags
from tests.helpers import warm
from tests.helpers.tiny_pipelines import make_family

MY_REWARD = """
import torch

def strong(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) * torch.tensor([row["strength"] for row in metadata])
"""
PROMPTS = [
    {"prompt": "a cat", "strength": 2.0, "weight": 3, "negative_prompt": "a blue square"},
    {"prompt": "a dog", "strength": 1.0},
    {"prompt": "two birds", "strength": 1.0, "weight": 0},
]
RATE = 0.05
SIZES = "24x16,16x24"


@pytest.fixture
def here(tmp_path):
    (tmp_path / "my_reward.py").write_text(MY_REWARD)
    (tmp_path / "my_prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    return tmp_path


def call(here, family, preset="quickstart", **fields):
    """main.py on the tiny model of a family, towards `my_reward`; what it printed, and the folder of the run."""
    prompts = str(here / "my_prompts.jsonl")
    own = {
        "reward_fn": "my_reward:strong", "prompt_fn": prompts, "eval_prompt_fn": prompts, "resolution": SIZES,
        "true_cfg_scale": GUIDED if family == "flux" else 1.0,
    }  # fmt: skip
    config = config_for(family, here / family, here / "logs", preset, **own | fields)
    done = warm.call("main.py", *flags(config, preset), environment={"PYTHONPATH": here})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, here / "logs" / config.run_name


def rows_of(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


def save_random_lora(model, folder):
    """Leaves it in the model, at half of its strength."""
    add_adapter(model, 2, 2.0, None, seed=0)
    for name, parameter in sorted(trained_parameters(model).items()):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator(name))
    folder.mkdir()
    save_lora(model, get_adapter(model), folder)
    scale_lora(model.denoiser, 0.5)


@torch.no_grad()
def pictures_of(model, labels):
    """What an evaluation in two sizes makes of the prompts in its captions, with the LoRA in the model."""
    pictures = []
    for j, label in enumerate(labels):
        rollout = rollout_of(model.of_size(picture_sizes(SIZES)[j % 2]), GUIDED)
        cond = model.encode_prompts([label.partition("\n")[0]])
        pictures.append(model.decode(rollout.sample(generators([j], 0, "evaluation"), cond)[0])[0])
    return pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(here, family):
    make_family(here / family, family)
    model = load(family, here / family, resolution=SIZES, true_cfg_scale=GUIDED if family == "flux" else 1.0)
    model.negatives = {PROMPTS[0]["prompt"]: PROMPTS[0]["negative_prompt"]}
    save_random_lora(model, here / "frozen")
    schedule = {"train.learning_rate": RATE, "train.lr_schedule": "linear", "train.lr_warmup_steps": 1}
    frozen = {"pretrained.loras": f"{here / 'frozen'}@0.5"}
    told, run = call(here, family, run_name="whole", **schedule, **frozen)
    pictures, labels = torch.load(run / "samples" / "before.pt", weights_only=True)
    torch.testing.assert_close(pictures, pictures_of(model, labels), rtol=0, atol=1e-5)
    assert [row["lr"] for row in rows_of(run)] == pytest.approx([0, RATE, RATE * 2 / 3, RATE / 3])
    drawn = [next(iter(row["reward_by_size"])) for row in rows_of(run)]
    assert sorted(drawn[:2]) == sorted(drawn[2:]) == sorted(SIZES.split(","))
    assert "an epoch is longer than the prompt set" in told and "prompts: 2 of 3 were drawn" in told
    lora = load_file(checkpoints_of(run)[-1] / LORA_FILE)
    assert any(tensor.any() for name, tensor in lora.items() if "lora_B" in name or "lora.up" in name)
    if family == "sd":
        call(here, family, run_name="parts", num_epochs=1, **schedule, **frozen)
        told, parts = call(here, family, run_name="parts", resume_from="latest", **schedule, **frozen)
        assert "after step 2" in told and "num_epochs: 1 → 2" in told
        assert [next(iter(row["reward_by_size"])) for row in rows_of(parts)] == drawn
        # The schedule of the first part was one of two updates; the second part continues on that of four.
        assert [row["lr"] for row in rows_of(parts)] == pytest.approx([0, RATE, RATE * 2 / 3, RATE / 3])


def test_a_negative_prompt_moves_the_pictures_of_its_prompt_alone(here):
    make_family(here / "sd", "sd")
    _, run = call(here, "sd", "tiny_evaluate", run_name="with", max_vis_images=4, resolution="24x16")
    without = [{k: v for k, v in row.items() if k != "negative_prompt"} for row in PROMPTS]
    (here / "my_prompts.jsonl").write_text("\n".join(map(json.dumps, without)))
    _, other = call(here, "sd", "tiny_evaluate", run_name="without", max_vis_images=4, resolution="24x16")
    found = []
    for folder in (run, other):
        (grid,) = folder.glob("eval/*/grid.png")
        found.append({label.partition("\n")[0]: picture for label, picture in read_grid(grid)})
    assert found[0]["a cat"].tobytes() != found[1]["a cat"].tobytes()
    assert found[0]["a dog"].tobytes() == found[1]["a dog"].tobytes()
