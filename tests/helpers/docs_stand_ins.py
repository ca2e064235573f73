"""What the documents' commands run with here: small files in the place of large ones, and a folder to run them in."""

import re
import shutil
import sys
from functools import cached_property
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignprop.command import run_task
from alignprop.models.configs import find_config
from alignprop.settings.command_line import KNOWN_GPUS, PRESET, with_lists, without_nones
from alignprop.settings.resolve import flatten
from config.align_prop import TINY, get_config
from tests.helpers.docs_commands import ROOT, blocks
from tests.helpers.reward_files import make_options
from tests.helpers.tiny_families import SIDE
from tests.helpers.tiny_pipelines import make_family
from tests.helpers.vlm_server import VlmServer, completion

SMALL = {
    "num_inference_steps": 2, "train.num_inference_steps": 2, "num_epochs": 1, "num_eval_images": 2,
    "num_eval_prompts": 1, "max_vis_images": 2, "eval_base_distance": False, "per_gpu_capacity": 2,
    "train.total_batch_size": 2, "train.total_samples_per_epoch": 2, "mixed_precision": "no",
}  # fmt: skip
PROJECT = (
    "alignprop", "config", "main.py", "pyproject.toml", "requirements.txt", "requirements-dev.txt",
    "requirements-hps.txt", "rewards", "scripts", "tests",
)  # fmt: skip
REWARD_PAGES = ("rewards.md", "tutorial.md")  # have the reader save their Python as my_rewards.py
# In the place of .venv/bin/python: this interpreter, which has everything already and gets nothing installed.
INTERPRETER = f"""#!/bin/sh
case "$1 $2 $3" in
    "-m pip --version") ;;
    "-m pip install") echo "$@" >> pip.txt ;;
    "-c import torch"*) echo 13.0 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def parsed(arguments) -> flags.FlagValues:
    """The flags of main.py, as absl parses them; `sys.argv` is where ml_collections looks for overrides."""
    values = flags.FlagValues()
    given, nones = without_nones(with_lists(["main.py", *arguments]))
    before, sys.argv = sys.argv, given
    try:
        config_flags.DEFINE_config_file("config", PRESET, flag_values=values)
        flags.DEFINE_bool("plan", False, "", flag_values=values)
        flags.DEFINE_float("gpu_memory", None, "", flag_values=values)
        flags.DEFINE_enum("gpu", None, KNOWN_GPUS, "", flag_values=values)
        assert values(sys.argv) == ["main.py"]
        values.config.update_from_flattened_dict(dict.fromkeys(nones))
    finally:
        sys.argv = before
    return values


class StandIns:
    """Each is made when it is first asked for.

    Attributes:
        root: the folder they are in.
    """

    def __init__(self, root: Path):
        self.root = root
        (root / "prompts.txt").write_text("a cat\na dog\n")

    def random_model(self, family: str) -> Path:
        folder = self.root / family
        return folder if folder.exists() else make_family(folder, family)

    @cached_property
    def rewards(self) -> dict[str, str]:
        """Random weights in the formats that the rewards read, by the fields that name them."""
        names = ("aesthetic", "clip", "geneval", "hps", "imagereward", "pickscore", "siglip")
        options = {name: make_options(name, self.root) for name in names}
        return {f"{name}.{option}": path for name in names for option, path in options[name].items()}

    @cached_property
    def trained(self) -> Path:
        """The folder of a run that has ended."""
        config = get_config("quickstart")
        fields = {**self.fields(config), "log_dir": str(self.root), "run_name": "trained", "eval_reward_fn": ""}
        config.update_from_flattened_dict(fields)
        run_task(config)
        return self.root / "trained"

    @cached_property
    def vlm_server(self) -> VlmServer:
        """Answers what the judges can read. It ends with the process."""
        return VlmServer(lambda number, body: completion("Final Score: 1")).__enter__()  # on every scale

    def fields(self, config: ConfigDict) -> dict:
        """Fields, and values for them, with which a configuration runs in a second; local files it keeps."""
        flat, family = flatten(config.to_dict()), find_config(config.pretrained.model)["family"]
        named = f"{config.reward_fn},{config.eval_reward_fn},clip"  # of which the last measures diversity
        found = dict(SMALL)
        for field, path in self.rewards.items():
            if field.partition(".")[0] in named and not is_file(flat[field]):
                found[field] = path
        if flat["train.prefix_cache"] > 1:
            found["num_inference_steps"] = found["train.num_inference_steps"] = 6  # fewer are all computed in full
        found["pretrained.model"] = str(TINY / "pipeline" if family == "sd" else self.random_model(family))
        if side := 32 if config.resolution else SIDE.get(family):
            found["resolution"] = side
        for name in ("vlm_judge", "unifiedreward"):
            if config[name].endpoint:
                found[f"{name}.endpoint"] = self.vlm_server.url
        if config.hps.backend == "hpsv2":  # the package is not installed here
            found["hps.backend"] = "transformers"
        for field in ("prompt_fn", "eval_prompt_fn"):
            if "hps" in config[field]:  # they are on the hub
                found[field] = str(self.root / "prompts.txt")
        return found

    def flags(self, arguments) -> list[str]:
        """The same for a command of main.py, as flags to put behind its own."""
        values = parsed(arguments)
        fields = self.fields(values.config)
        if values.plan:  # each of the other policies would take as long again
            family = find_config(values.config.pretrained.model)["family"]
            fields |= {"memory_policy": "fast", "pretrained.model": str(self.random_model(family))}
        return as_flags(fields)


def as_flags(fields: dict) -> list[str]:
    return [f"--config.{field}={value}" for field, value in fields.items()]


def is_file(name: str | None) -> bool:
    return name is not None and Path(name).exists()


def lay_out(folder: Path, stand_ins: StandIns, text: str) -> None:
    """Makes `folder` a copy of the project's, by links, with every run and interpreter in it that a text names.

    A run is named as logs/<run>, an interpreter as process:<path>::.
    """
    for name in PROJECT:
        (folder / name).symlink_to(ROOT / name)
    code = [block for page in REWARD_PAGES for block in blocks(ROOT / "docs" / page, "python")]
    (folder / "my_rewards.py").write_text("\n\n".join(code).rstrip() + "\n")
    for name in ("prompts.txt", "heldout.txt"):
        (folder / name).write_text("a cat\na dog\n")
    (folder / "signs.txt").write_text('a sign that says "OPEN"\nthe word "bread" on a wall\n')
    interpreters = re.findall(r"\bprocess:(\S+?)::", text)
    write_programs(folder, dict.fromkeys(interpreters, f'#!/bin/sh\nexec {sys.executable} "$@"\n'))
    for name in re.findall(r"\blogs/(\w+)", text):
        shutil.copytree(stand_ins.trained, folder / "logs" / name, symlinks=True, dirs_exist_ok=True)


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    """Files that can be executed: {path in the folder: text}."""
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def make_environment(folder: Path) -> None:
    """A virtual environment .venv that scripts/setup_env.sh finds complete."""
    tools = {f".venv/bin/{tool}": f'#!/bin/sh\nexec {sys.executable} -m {tool} "$@"\n' for tool in ("ruff", "mypy")}
    write_programs(folder, {".venv/bin/python": INTERPRETER, **tools})
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / ".venv" / f"installed-{name}")
