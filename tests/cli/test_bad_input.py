"""Every mistake of a person, through the real command line: one plain line, exit status 1, nothing on disk touched."""

import csv
import hashlib
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_main import run_main
from tests.helpers import warm
from tests.helpers.reward_files import make_clip

# Small enough that a mistake which is not found ends soon, too.
TOY = {
    "reward_fn": "tests.helpers.toy_rewards:redness", "eval_reward_fn": "", "run_name": "r", "num_inference_steps": 2,
    "num_epochs": 1, "num_eval_images": 2, "max_vis_images": 2, "per_gpu_capacity": 2, "train.total_batch_size": 2,
    "train.total_samples_per_epoch": 2, "pretrained.model": "{pipeline}", "prompt_fn": "{here}/prompts.txt",
    "eval_prompt_fn": "{here}/prompts.txt", "log_dir": "{here}/logs",
}  # fmt: skip
TRAINING = ("num_epochs", "prompt_fn", "train.total_batch_size", "train.total_samples_per_epoch")


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        message: pattern of the line, behind "error: ".
        fields: overrides of TOY; {here} is the row's own folder, {pipeline} a model.
        preset: or the configuration file.
        raw: further command-line arguments.
        files: name -> content, made in the row's folder, which is also where modules are imported from.
        prepare: called with the row's folder and the model's.
        late: found at the first pictures, when the run folder is there.
    """

    name: str
    message: str
    fields: dict = field(default_factory=dict)
    preset: str = "quickstart"
    raw: tuple[str, ...] = ()
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path, Path], None] = lambda here, pipeline: None
    late: bool = False


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def evil(name: str, zipped: bool = False):
    """Writes a pickle that would make a file beside it; as a plain pickle or as torch.save does."""

    def prepare(here: Path, pipeline: Path):
        weights = {"weight": torch.zeros(2), "evil": Evil(here / "unpickled")}
        if zipped:
            torch.save(weights, here / name)
        else:
            (here / name).write_bytes(pickle.dumps(weights["evil"]))

    return prepare


def evil_pipeline(part: str, weights: str):
    def prepare(here: Path, pipeline: Path):
        shutil.copytree(pipeline, here / "model")
        for file in (here / "model" / part).glob("*.safetensors"):
            file.unlink()
        evil(f"model/{part}/{weights}", zipped=True)(here, pipeline)

    return prepare


def evil_clip(here: Path, pipeline: Path):
    make_clip(here / "clip")
    (here / "clip" / "model.safetensors").unlink()
    evil("clip/pytorch_model.bin", zipped=True)(here, pipeline)


def lora(*modules: str, keep: slice = slice(None), name="lora.safetensors"):
    """A LoRA for 16-wide layers of these names; `keep` cuts the file's bytes."""

    def prepare(here: Path, pipeline: Path):
        tensors = {}
        for module in modules:
            tensors[f"unet.{module}.lora_A.weight"] = torch.ones(2, 16)
            tensors[f"unet.{module}.lora_B.weight"] = torch.ones(16, 2)
        save_file(tensors, here / name)
        (here / name).write_bytes((here / name).read_bytes()[keep])

    return prepare


def truncated_pipeline(here: Path, pipeline: Path):
    shutil.copytree(pipeline, here / "model")
    file = next((here / "model" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def earlier_run(here: Path, pipeline: Path):
    (here / "logs" / "r" / "checkpoints" / "checkpoint_1").mkdir(parents=True)
    (here / "logs" / "r" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {"resume_from": "{here}/lora.safetensors"}
RAISES = "def reward(images, prompts, metadata):\n    return images @ images.new_ones(3)\n"
STUDENT = "class Reward:\n    def __init__(self):\n        raise KeyError('weights')\n"

OWN_PRESET = """from config.align_prop import quickstart

def get_config():
    c = quickstart()
    {}
    return c
"""

ROWS = [
    # the command line and the configuration file
    Row("preset", r"preset = 'quikstart' is not one of .*did you mean 'quickstart'\?", preset="quikstart"),
    Row("no such file", r"--config={here}/none.py.* could not be used: .*No such file", preset="{here}/none.py"),
    Row("folder", r"--config={here}.* could not be used: IsADirectoryError", preset="{here}"),
    Row("not Python", r"--config={here}/a.txt.* SyntaxError", preset="{here}/a.txt", files={"a.txt": "Dear diary, ×"}),
    Row("no preset in it", r"--config={here}/a.py.* 'get_config'", preset="{here}/a.py", files={"a.py": "x = 1"}),
    Row("raises", r"--config={here}/a.py.* ZeroDivision.*\(line 1\)", preset="{here}/a.py", files={"a.py": "1 / 0"}),
    Row("a value of another type in it", r"--config={here}/a.py could not be used: TypeError: .*'seed'.* \(line 5\)",
        preset="{here}/a.py", files={"a.py": OWN_PRESET.format("c.seed = 'x'")}),
    Row("a misspelt field in it", r"--config={here}/a.py .*Did you mean \"seed\" instead of \"seeed\"\? \(line 5\)",
        preset="{here}/a.py", files={"a.py": OWN_PRESET.format("c.lock().seeed = 1")}),
    Row("given twice", r"mixing_coef_1 is given twice", raw=("--config.mixing_coef_1=0", "--config.mixing_coef_1=1")),
    Row("a field's name", r"num_epoch is not a field .*did you mean 'num_epochs'\?", {"num_epoch": 1}),
    Row("a group's name", r"trian.seed is not a field of the configuration", {"trian.seed": 1}),
    Row("field without group", r"learning_rate is not .*did you mean 'train.learning_rate'", {"learning_rate": 1}),
    Row("a flag's name", r".*'cofig.seed'", raw=("--cofig.seed=1",)),
    Row("not a flag", r"'seed=1' is not a flag", raw=("seed=1",)),
    # types
    Row("text for int", r"seed = 'x' must be a whole number", {"seed": "x"}),
    Row("float for int", r"num_epochs = '1.5' must be a whole number", {"num_epochs": 1.5}),
    Row("text for bool", r"use_lora = 'maybe' must be True or False", {"use_lora": "maybe"}),
    Row("text for float", r"train.learning_rate = '1e-' must be a finite number", {"train.learning_rate": "1e-"}),
    Row("text for optional", r"lora_alpha = 'x' must be None or a finite number", {"lora_alpha": "x"}),
    Row("text for numbers", r"mixing_coef_1 = '0 1' must be one or more finite numbers", {"mixing_coef_1": "0 1"}),
    Row("one for two", r"truncated_backprop_minmax = \(3,\) must be .*2 whole", {"truncated_backprop_minmax": 3}),
    # values
    Row("zero epochs", r"num_epochs = 0 must be .* at least 1", {"num_epochs": 0}),
    Row("negative rank", r"lora_rank = -4 must be .* at least 1", {"lora_rank": -4}),
    Row("zero capacity", r"per_gpu_capacity = 0 must be .* at least 1", {"per_gpu_capacity": 0}),
    Row("negative batch", r"train.total_batch_size = -8 must", {"train.total_batch_size": -8}),
    Row("nan", r"train.learning_rate = nan must be a finite number", {"train.learning_rate": "nan"}),
    Row("inf", r"guidance_scale = inf must be a finite number", {"guidance_scale": "inf"}),
    Row("precision", r"mixed_precision = 'fp61' is not .*did you mean 'fp16'", {"mixed_precision": "fp61"}),
    Row("optimizer", r"train.optimizer = 'adam' is not .*'adamw'", {"train.optimizer": "adam"}),
    Row("run_name", r"run_name = '../x' must be a plain folder name", {"run_name": "../x"}),
    Row("repository", r"hub.repo = 'toy' must be empty or 'user/name'", {"hub.repo": "toy"}),
    Row("no token", r"hub.repo = 'me/toy'( needs a token|: the hub cannot)", {"hub.repo": "me/toy"}),
    Row("no log_dir", r"log_dir = '' must be text", {"log_dir": ""}),
    Row("first step", r"trunc_backprop_timestep = 2 must be from 0 to .* 1", {"trunc_backprop_timestep": 2}),
    Row("reversed", r"truncated_backprop_minmax = \(2, 0\) must", {"truncated_backprop_minmax": "2,0"}),
    Row("out of range", r"truncated_backprop_minmax = \(0, 3\) must", {"truncated_backprop_minmax": "0,3"}),
    Row("epoch", r"train.total_samples_per_epoch = 3 is .*nearest: 2 or 4", {"train.total_samples_per_epoch": 3}),
    Row("coefficient", r"mixing_coef_1 = \(1.5,\).* from 0 to 1", LORA | {"mixing_coef_1": 1.5}, preset="tiny_soup"),
    Row("soup of nothing", r"resume_from is empty; evaluate_soup needs", preset="tiny_soup"),
    Row("fp16 on a CPU", r"mixed_precision = 'fp16' needs a GPU", {"mixed_precision": "fp16"}),
    Row("estimator", r"estimator = 'trunkated' is not .*did you mean 'truncated'", {"estimator": "trunkated"}),
    Row("layers", r"lora_target_modules.*to_nowhere", {"lora_target_modules": "to_nowhere"}),
    # folders and checkpoints
    Row("run exists", r"run_name = 'r'.*/logs/r.* already holds a run", prepare=earlier_run),
    Row("log_dir in a file", r"log_dir = '{here}/file/logs'", {"log_dir": "{here}/file/logs"}, files={"file": "x"}),
    Row("no checkpoint", r"resume_from = '{here}/none' does not exist", {"resume_from": "{here}/none"}),
    Row("empty folder", r"resume_from = '{here}/e' holds no checkpoint", {"resume_from": "{here}/e"},
        prepare=lambda here, pipeline: (here / "e").mkdir()),
    Row("no latest", r"resume_from = 'latest', but .* checkpoint", {"resume_from": "latest", "run_name": ""}),
    Row("LoRA of another model",
        r"'{here}/lora.safetensors': 1 of its 3 layers are this model's, 2 are not, .*'unet.elsewhere.to_q'", LORA,
        preset="tiny_evaluate", prepare=lora(ATTENTION, "elsewhere.to_q", "elsewhere.to_v")),
    Row("truncated LoRA", r".*lora.safetensors' is not a whole safetensors file", LORA, preset="tiny_evaluate",
        prepare=lora(ATTENTION, keep=slice(-9))),
    # pickles, which could run code
    Row("pickled LoRA", r".*lora.bin' is not a whole safetensors file", {"resume_from": "{here}/lora.bin"},
        preset="tiny_evaluate", prepare=evil("lora.bin")),
    Row("pickled head", r"aesthetic.head_file='{here}/h.pth' .*plain weights",
        {"reward_fn": "aesthetic", "aesthetic.head_file": "{here}/h.pth"}, prepare=evil("h.pth", zipped=True)),
    Row("pickled HPS", r"hps.checkpoint='{here}/h.pt' .*plain weights",
        {"reward_fn": "hps", "hps.checkpoint": "{here}/h.pt"}, prepare=evil("h.pt")),
    Row("pickled CLIP", r"clip.model='{here}/clip' cannot be loaded",
        {"reward_fn": "clip", "clip.model": "{here}/clip"}, prepare=evil_clip),
    Row("pickled denoiser", r"pretrained.model = '{here}/model' could not be loaded",
        {"pretrained.model": "{here}/model"}, prepare=evil_pipeline("unet", "diffusion_pytorch_model.bin")),
    Row("pickled text encoder", r"pretrained.model = '{here}/model' could not be loaded",
        {"pretrained.model": "{here}/model"}, prepare=evil_pipeline("text_encoder", "pytorch_model.bin")),
    Row("pickled single file", r"pretrained.model = '{here}/m.ckpt' could not be loaded",
        {"pretrained.model": "{here}/m.ckpt", "pretrained.config": "{pipeline}"}, prepare=evil("m.ckpt", zipped=True)),
    Row("field in a flagfile", r"train.lr is not a field of the configuration; here it is train.learning_rate",
        raw=("--flagfile={here}/f.txt",), files={"f.txt": "--config.train.lr=1"}),
    Row("no flagfile", r"Unable to open flagfile: .*'{here}/f.txt'", raw=("--flagfile={here}/f.txt",)),
    # models
    Row("no model", r"pretrained.model = 'nobody/nothing' .*tried .*hub.*local pipeline folder.*HF_HOME",
        {"pretrained.model": "nobody/nothing"}),
    Row("no file", r"pretrained.model = '{here}/x.safetensors' .*no such file",
        {"pretrained.model": "{here}/x.safetensors"}),
    Row("truncated model", r"pretrained.model = '{here}/model' could not be loaded",
        {"pretrained.model": "{here}/model"}, prepare=truncated_pipeline),
    Row("no reward model", r"clip.model='nobody/nothing'.*hub.*local folder.*HF_HOME",
        {"reward_fn": "clip", "clip.model": "nobody/nothing"}),
    Row("no HPSv2", r"hps.checkpoint=None, .*xswu/HPSv2.*HF_HOME", {"reward_fn": "hps"}),
    # prompts
    Row("prompt set", r"prompt_fn = 'simple_animal' .*did you mean 'simple_animals'", {"prompt_fn": "simple_animal"}),
    Row("no prompt file", r"prompt_fn = '{here}/no.txt'.*No such file", {"prompt_fn": "{here}/no.txt"}),
    Row("empty prompt file", r"eval_prompt_fn = '{here}/e.txt'.*holds no prompt", {"eval_prompt_fn": "{here}/e.txt"},
        files={"e.txt": "\n \r\n"}),
    Row("not UTF-8", r"prompt_fn = '{here}/l.txt'.*not UTF-8", {"prompt_fn": "{here}/l.txt"},
        files={"l.txt": "Bär".encode("latin-1")}),
    Row("HPSv2's prompts", r"prompt_fn = 'hps_v2_all'.*HPDv2.*HF_HOME", {"prompt_fn": "hps_v2_all"}),
    # rewards
    Row("reward", r"reward 'nicest': 'nicest' is not known", {"reward_fn": "nicest"}),
    Row("no module", r"reward 'no_such:f': cannot import 'no_such': ModuleNotFoundError", {"reward_fn": "no_such:f"}),
    Row("no interpreter", r"reward 'process:{here}/python::mine:x': '{here}/python' is not an executable file",
        {"reward_fn": "process:{here}/python::mine:x"}),
    Row("raises at import", r"reward 'mine:x': cannot import 'mine': ZeroDivisionError: .*mine.py, line 2\)",
        {"reward_fn": "mine:x"}, files={"mine.py": "x = 1\ny = 1 / 0"}),
    Row("raises when built", r"reward 'mine:Reward': .*KeyError: 'weights' \(.*mine.py, line 3\)",
        {"reward_fn": "mine:Reward"}, files={"mine.py": STUDENT}),
    Row("raises when called", r"reward 'mine:reward' failed: RuntimeError: .*mine.py, line 2\)",
        {"reward_fn": "mine:reward"}, files={"mine.py": RAISES}, late=True),
    Row("not differentiable", r"reward 'tests.helpers.toy_rewards:hidden_rating' says differentiable=False",
        {"reward_fn": "tests.helpers.toy_rewards:hidden_rating"}),
    Row("wrong shape", r"reward 'tests.helpers.toy_rewards:wrong_shape' returned shape \[2, 1\], expected \[2\]",
        {"reward_fn": "tests.helpers.toy_rewards:wrong_shape"}, late=True),
    Row("gradient", r"reward '.*:at_a_corner' has finite scores, but a gradient that is not finite",
        {"reward_fn": "tests.helpers.toy_rewards:at_a_corner"}),
    Row("no gradient", r"reward '.*:in_levels' has a gradient of exactly 0 in every pixel of 2 pictures",
        {"reward_fn": "tests.helpers.toy_rewards:in_levels"}),
    Row("weight 0", r"reward '.*:redness:0,.*': the weight in '.*:redness:0' is 0, so that it has no effect; leave it",
        {"reward_fn": "tests.helpers.toy_rewards:redness:0,tests.helpers.toy_rewards:contrast"}),
    Row("in place", r"reward 'tests.helpers.toy_rewards:in_place' changes the images in place",
        {"eval_reward_fn": "tests.helpers.toy_rewards:in_place"}),
    Row("NaN", r"reward 'tests.helpers.toy_rewards:not_a_number' returned non-finite scores",
        {"reward_fn": "tests.helpers.toy_rewards:not_a_number"}, late=True),
    Row("detached", r"reward 'tests.helpers.toy_rewards:detached' returned scores that do not depend on the images",
        {"reward_fn": "tests.helpers.toy_rewards:detached"}, late=True),
]  # fmt: skip


def warm_main(*arguments, environment):
    return warm.call("main.py", *arguments, environment=environment)


def snapshot(folder: Path) -> dict:
    """{path: (mtime, size, SHA-256)} of every file and folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size, path.is_file() and digest(path))
        for path in sorted(folder.rglob("*"))
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attempt(row: Row, here: Path, pipeline: Path, run=warm_main):
    here.mkdir()
    (here / "prompts.txt").write_text("a cat\na dog\n")
    for name, content in row.files.items():
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    row.prepare(here, pipeline)
    before, started = snapshot(here), time.monotonic()
    done = call(row, here, pipeline, run)
    return done, time.monotonic() - started, before, snapshot(here)


def call(row: Row, here: Path, pipeline: Path, run=warm_main, **environment) -> subprocess.CompletedProcess:
    filled = lambda text: str(text).replace("{here}", str(here)).replace("{pipeline}", str(pipeline))  # noqa: E731
    config = row.preset if row.preset.startswith("{here}") else f"config/align_prop.py:{row.preset}"
    dead = TRAINING if row.preset in ("tiny_evaluate", "tiny_soup") else ()
    fields = [f"--config.{k}={v}" for k, v in (TOY | row.fields).items() if k not in dead]
    environment |= {**warm.SURROUNDINGS, "PYTHONPATH": str(here)}
    return run(filled(f"--config={config}"), *map(filled, fields), *map(filled, row.raw), environment=environment)


# A mistake that is found before torch is loaded, and one that is found at the first pictures.
COLD = ("preset", "raises when called")


@pytest.mark.parametrize("name", COLD)
def test_a_mistake_is_one_plain_line_of_a_fresh_process_too(tmp_path, pipeline_folder, name):
    (row,) = [row for row in ROWS if row.name == name]
    done, *_ = attempt(row, tmp_path / "here", pipeline_folder, run_main)
    lines = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip() and "%|" not in line]
    assert done.returncode == 1 and len(lines) == 1 and re.match("error: " + row.message, lines[0]), done.stderr


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_mistake_is_one_plain_line_and_touches_nothing(tmp_path, pipeline_folder, row):
    here = tmp_path / "here"
    done, seconds, before, after = attempt(row, here, pipeline_folder)
    lines = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip()]
    if row.late:
        lines = [line for line in lines if "%|" not in line]  # progress
        before = {name: stat for name, stat in before.items() if name in after and stat[2]}
        after = {name: stat for name, stat in after.items() if stat[2] and not name.startswith("logs/r/")}
    assert len(lines) == 1, done.stderr
    assert re.match("error: " + row.message.replace("{here}", re.escape(str(here))), lines[0]), lines[0]
    assert done.returncode == 1
    assert after == before
    assert seconds < 60  # on a machine with other things to do; alone it is 0.1 to 6


# ---- what looks like a mistake and is none


def test_odd_prompts_and_paths_write_into_the_run_folder_alone(tmp_path, pipeline_folder):
    """Line ends of Windows, blank lines, a byte order mark; prompts that are paths, commands, emoji or far too long."""
    prompts = ["../../x", "/etc/passwd", "$(touch x); `touch x`", "😀 ein Bär, 熊", "cat " * 125, "very " * 99 + "long"]
    name = "a b; $(touch x) ..😀 & more.txt"
    content = "\ufeff" + "\r\n \r\n\r\n".join(prompts) + "\r\n"
    fields = {"eval_prompt_fn": "{here}/" + name, "num_eval_images": len(prompts)}
    row = Row("odd", "", fields, preset="tiny_evaluate", files={name: content})
    done, _, before, after = attempt(row, tmp_path / "here", pipeline_folder)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip() and "%|" not in line]
    assert warning.startswith("warning: prompts are truncated to 75 tokens") and "every other prompt" in warning

    assert {file: stat for file, stat in after.items() if file.split("/")[0] != "logs"} == before
    assert {path.name for path in (tmp_path / "here" / "logs").iterdir()} == {"r"}
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    (folder,) = (tmp_path / "here" / "logs" / "r" / "eval").iterdir()
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"{j:06d}.png" for j in range(len(prompts))]
    rows = list(csv.DictReader((folder / "scores.csv").open(newline="")))
    assert sorted(row["prompt"] for row in rows) == sorted(prompt.strip() for prompt in prompts)


def test_a_run_without_network_keeps_its_keys_to_itself(tmp_path, pipeline_folder):
    """wandb with a key but nobody to show it to: a warning, an offline run, and no key in anything that is written."""
    keys = {"HF_TOKEN": "hf_" + "s3cret" * 6, "WANDB_API_KEY": "s3cret" * 7}
    here = tmp_path / "here"
    here.mkdir()
    (here / "prompts.txt").write_text("a cat\n")
    surroundings = {"HOME": str(here), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": ""}
    row = Row("secrets", "", {"log_with": "wandb,tensorboard"})
    done = call(row, here, pipeline_folder, **keys, **surroundings)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "warning: " in line]
    assert "warning: wandb runs offline: " in warning
    written = [path for path in here.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "training_state.pt"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written) and any("tfevents" in path.name for path in written)
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert "s3cret" not in done.stdout + done.stderr
