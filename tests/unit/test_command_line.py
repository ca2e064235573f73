"""What a person types for a field, and what the configuration gets."""

import pytest

from alignprop.settings.command_line import with_files, with_lists, without_nones
from alignprop.settings.fields import FIELDS
from alignprop.settings.resolve import flatten, resolve
from tests.helpers.docs_stand_ins import parsed

NAMES = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize(("typed", "value"), [
    ("to_q,to_k,to_v,to_out.0", NAMES), ("to_q, to_k, to_v, to_out.0", NAMES), (repr(NAMES), NAMES),
    ("[to_q,to_k,to_v,to_out.0]", NAMES), ("'to_q','to_k','to_v','to_out.0'", NAMES), ("to_q", ("to_q",)),
    ("to_out.0", ("to_out.0",)), ("('to_q',)", ("to_q",)), ("ff.net.0.proj,ff.net.2", ("ff.net.0.proj", "ff.net.2")),
    ("0,1", ("0", "1")),
])  # fmt: skip
@pytest.mark.parametrize("apart", [False, True])
def test_names_of_layers_may_be_typed_in_any_usual_way(typed, value, apart):
    flag = "--config.lora_target_modules"
    config = parsed([flag, typed] if apart else [f"{flag}={typed}"]).config
    assert config.lora_target_modules == value == resolve(config, 1).lora_target_modules


@pytest.mark.parametrize(("field", "typed", "value"), [
    ("mixing_coef_1", "0.5", (0.5,)), ("mixing_coef_1", "0,.25,1", (0, 0.25, 1)), ("mixing_coef_1", "(1e-1,)", (0.1,)),
    ("guide.window", "0, 1", (0, 1)), ("truncated_backprop_minmax", "[3,20]", (3, 20)),
    ("colour.target", "0.1,0.9,0.5", (0.1, 0.9, 0.5)),
])  # fmt: skip
def test_numbers_too(field, typed, value):
    assert flatten(parsed([f"--config.{field}={typed}"]).config.to_dict())[field] == value


def test_every_default_is_taken_as_docs_config_md_has_it():
    """Also lists without their brackets, as `to_q,to_v`."""
    typed = {name: field.default for name, field in FIELDS.items() if field.default not in (None, "")}
    lists = {name: ",".join(map(str, value)) for name, value in typed.items() if isinstance(value, tuple)}
    for given in (typed, typed | lists):
        config = flatten(parsed([f"--config.{name}={value}" for name, value in given.items()]).config.to_dict())
        assert {name: config[name] for name in typed} == typed


def test_other_arguments_stay_as_they_are():
    argv = ["main.py", "--plan", "--config.seed=1,2", "--config.mixing_coef_1=None", "--config.guide.window="]
    assert with_lists(argv) == argv


@pytest.mark.parametrize(("given", "left", "nones"), [
    (["--config.num_eval_prompts=None"], [], ["num_eval_prompts"]),
    (["--config.num_eval_prompts", "None", "--plan"], ["--plan"], ["num_eval_prompts"]),
    (["--config.num_eval_prompts=None", "--config.num_eval_prompts=3"], ["--config.num_eval_prompts=3"], []),
    (["--config.num_eval_prompts=3", "--config.num_eval_prompts=None"], [], ["num_eval_prompts"]),
    (["--config.seed=None", "--plan"], ["--config.seed=None", "--plan"], []),  # it may not be None
    (["--noconfig.channels_last", "--plan"], ["--plan", "--noconfig.channels_last"], []),
])  # fmt: skip
def test_none_is_a_value_like_others_and_the_last_one_counts(given, left, nones):
    assert without_nones(given) == (left, nones)


def test_a_file_of_flags_is_read_as_if_they_were_typed(tmp_path):
    (tmp_path / "flags.txt").write_text("--config.seed=7\n--config.lora_target_modules=to_q,to_out.0\n")
    config = parsed(with_files(["main.py", f"--flagfile={tmp_path / 'flags.txt'}", "--config.num_epochs=3"])[1:]).config
    assert (config.seed, config.num_epochs, config.lora_target_modules) == (7, 3, ("to_q", "to_out.0"))
