"""Hints for names that are no fields."""

import re
from pathlib import Path

import pytest

from alignprop.settings.elsewhere import ELSEWHERE, answer_for
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.settings.resolve import check_name

DOCS = Path(__file__).resolve().parents[2] / "docs"
ALIKE = {"learning_rate": "train.learning_rate", "sed": "seed", "num_epoch": "num_epochs", "lorarank": "lora_rank"}


def told(name):
    with pytest.raises(ConfigError) as error:
        check_name(name)
    return str(error.value)


@pytest.mark.parametrize("page", ["moving_from_trl.md", "moving_from_alignprop.md"])
def test_every_name_that_a_moving_page_answers_is_answered(page):
    rows = re.findall(r"^\| (`[^|]*) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([\w.]+)(?: = [^`]*)?`", row)} - FIELDS.keys()
    assert len(names) > 8
    assert {name for name in names if not answer_for(name)} == set()


def test_an_answer_names_fields_that_there_are():
    names = [answer for answer in ELSEWHERE.values() if re.fullmatch(r"[\w.]+", answer)]
    assert len(names) > 20 and set(names) <= FIELDS.keys() and not ELSEWHERE.keys() & FIELDS.keys()


@pytest.mark.parametrize(("name", "answer"), [
    ("negative_prompts", "here it is negative_prompt"),
    ("sample_num_steps", "here it is num_inference_steps"),
    ("train.batch_size", "here it is per_gpu_capacity"), ("sample.guidance_scale", "here it is guidance_scale"),
    ("lr_scheduler", "here it is train.lr_schedule"), ("lr_warmup_steps", "here it is train.lr_warmup_steps"),
    ("train.use_8bit_adam", "here it is train.optimizer"), ("guidance_rescale", "guidance is not rescaled"),
    ("use_dora", "a plain LoRA is trained"), ("timestep_spacing", "here it is sampler_options"),
])  # fmt: skip
def test_a_name_of_another_program_is_answered(name, answer):
    assert told(name) == f"{name} is not a field of the configuration; {answer}"


def test_only_what_is_alike_is_hinted_at():
    for name, field in ALIKE.items():
        assert told(name).endswith(f"did you mean {field!r}?")
    for name in ("num_prompts_to_avoid", "guided", "colours", "foo"):
        assert told(name).endswith("; docs/config.md lists all fields")
