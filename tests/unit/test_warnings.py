import inspect

import pytest

from alignprop.method.estimators import ESTIMATORS
from alignprop.settings.fields import FIELDS
from alignprop.settings.fields.sampling import PLAN_FIELDS
from alignprop.settings.resolve import resolve
from alignprop.settings.warnings import warnings_for
from tests.unit.test_resolve import preset


def test_fields_without_effect_are_told():
    c = resolve(preset(trunc_backprop_timestep=10), 1)
    assert warnings_for(c, ["trunc_backprop_timestep", "seed"]) == [
        "trunc_backprop_timestep has no effect: it needs estimator = 'truncated'"
    ]
    assert warnings_for(resolve(preset("hps_k1"), 1), ["trunc_backprop_timestep"]) == []
    (line,) = warnings_for(resolve(preset("evaluate"), 1), ["train.learning_rate", "num_eval_images"])
    assert line.startswith("train.learning_rate has no effect")
    overridden = ["train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.adam_weight_decay"]
    lines = warnings_for(preset(train__optimizer="sgd"), [*overridden, "allow_extrapolation"])
    assert [line.split()[0] for line in lines] == [*overridden[:3], "allow_extrapolation"]
    for optimizer in ("adamw", "adamw8bit", "prodigy"):
        assert warnings_for(preset(train__optimizer=optimizer), overridden) == []


def test_a_plan_field_of_another_estimator_is_told():
    c = preset("refl", plan__exit_window=0.5, plan__copies=3)
    assert warnings_for(c, ["plan.exit_window", "plan.copies"]) == [
        "plan.copies has no effect: it needs estimator = 'draft_lv'"
    ]


def test_which_estimators_have_a_plan_field_is_what_their_functions_take():
    for field, names in PLAN_FIELDS.items():
        assert {n for n, f in ESTIMATORS.items() if field in inspect.signature(f).parameters} == set(names)
    assert {name for name in FIELDS if name.startswith("plan.")} == {f"plan.{field}" for field in PLAN_FIELDS}


@pytest.mark.parametrize(("config", "field", "told"), [
    (dict(), "lora_scale", "task = 'evaluate' or 'guide'"),
    (dict(task="evaluate_soup"), "lora_schedule", "task = 'evaluate' or 'guide'"),
    (dict(), "guide.strength", "task = 'guide'"),
    (dict(), "ddpo.clip_range", "algorithm = 'ddpo'"),
    (dict(algorithm="ddpo", eta=1.0, ddpo__per_prompt_buffer=8), "ddpo.per_prompt_min_count", "at least as many"),
    (dict(algorithm="ddpo", eta=1.0), "estimator", "algorithm = 'ddpo' does not use it"),
    (dict(train__lr_schedule="cosine"), "train.lr_num_cycles", "train.lr_schedule = 'cosine_with_restarts'"),
    (dict(train__lr_schedule="linear"), "train.lr_power", "train.lr_schedule = 'polynomial'"),
    (dict(task="evaluate"), "train.lr_warmup_steps", "does not train"),
    (dict(reward_fn="hps"), "reward_combine", "several rewards"),
    (dict(reward_fn="hps", eval_reward_fn="aesthetic"), "siglip.model", "that reward in reward_fn or eval_reward_fn"),
    (dict(), "hub.private", "hub.repo"),
    (dict(pretrained__model="sd3.safetensors"), "pretrained.without", "a pipeline as pretrained.model"),
    (dict(task="evaluate", hub__repo="me/toy"), "hub.repo", "does not train"),
])  # fmt: skip
def test_newer_fields_without_effect_are_told(config, field, told):
    (line,) = warnings_for(preset(**config), [field])
    assert line.startswith(f"{field} has no effect") and told in line


@pytest.mark.parametrize(("field", "beside", "local"), [
    ("clip.revision", "clip.model", "folder"), ("pickscore.revision", "pickscore.model", "folder"),
    ("siglip.revision", "siglip.model", "folder"), ("aesthetic.clip_revision", "aesthetic.clip", "folder"),
    ("aesthetic.head_revision", "aesthetic.head_repo", "folder"),
    ("aesthetic.head_repo", "aesthetic.head_file", "file"),
    ("aesthetic.head_revision", "aesthetic.head_file", "file"), ("hps.checkpoint_repo", "hps.checkpoint", "file"),
    ("hps.checkpoint_revision", "hps.checkpoint_repo", "folder"),
    ("imagereward.checkpoint_revision", "imagereward.checkpoint", "file"),
])  # fmt: skip
def test_a_repository_beside_a_local_file_is_told(tmp_path, field, beside, local):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    c = preset(reward_fn="aesthetic,hps,clip,pickscore,siglip,imagereward")
    assert warnings_for(c, [field, beside]) == []
    c.update_from_flattened_dict({beside: str(tmp_path / local)})
    (line,) = warnings_for(c, [field, beside])
    assert line == f"{field} has no effect: it needs {beside} " + (
        "of the hub, not a local folder" if local == "folder" else "in a repository, not a local file"
    )


def test_options_of_rewards_that_are_named_have_an_effect():
    c = preset(reward_fn="imagereward:2, jpeg_proxy", eval_reward_fn="count_hard,my_rewards:brightness")
    used = ["imagereward.dtype", "jpeg.quality", "count.model", "clip.model"]
    unused = ["hps.version", "pickscore.model"]
    assert [line.split()[0] for line in warnings_for(c, used + unused)] == unused
    c.eval_diversity = False  # which needs clip.model
    (line,) = warnings_for(c, ["clip.model"])
    assert line.endswith("it needs that reward in reward_fn or eval_reward_fn, or eval_diversity = True")
