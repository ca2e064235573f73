import inspect
import json
import math
from dataclasses import replace

import pytest
from ml_collections import ConfigDict

from alignprop.method.losses import LOSSES
from alignprop.settings.errors import ConfigError, one_of
from alignprop.settings.fields import FIELDS, GROUPS
from alignprop.settings.fields.field import GUIDE, Field
from alignprop.settings.fields.rules import COUNT
from alignprop.settings.memory_policies import NAMES, POLICIES
from alignprop.settings.options import memory_policy, updates_of_epoch
from alignprop.settings.resolve import as_run, changes, flatten, resolve, save_config
from alignprop.settings.warnings import warnings_for
from config import align_prop, ddpo, models
from config.align_prop import PRESETS, base, get_config
from rewards import REWARDS, options_name, reward_class
from rewards.hps import BACKENDS, CHECKPOINTS
from rewards.rules import optional
from rewards.towers import DTYPES
from scripts import config_docs


def preset(name="hps", **overrides):
    c = get_config(name)
    with c.unlocked():
        c.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return c


def test_derived_values_follow_the_overrides_and_the_processes():
    c = resolve(preset(num_inference_steps=20, lora_rank=8), num_processes=4)
    assert c.trunc_backprop_timestep == 19 and c.truncated_backprop_minmax == (0, 20)
    assert c.lora_alpha == 8.0
    assert c.train.gradient_accumulation_steps == 128 // (4 * 4) and c.train.steps_per_epoch == 2


@pytest.mark.parametrize(("batch", "capacity", "processes", "taken"), [
    (8, 8, 1, 8), (8, 8, 2, 4), (8, 3, 1, 2), (12, 8, 1, 6), (12, 5, 3, 4), (7, 4, 1, 1), (2, 4, 1, 2), (2, 4, 2, 1),
])  # fmt: skip
def test_a_micro_batch_is_the_largest_that_divides_the_work(batch, capacity, processes, taken):
    fields = dict(train__total_batch_size=batch, train__total_samples_per_epoch=batch, per_gpu_capacity=capacity)
    c = resolve(preset(**fields), processes)
    assert c.per_gpu_capacity == taken
    assert c.train.gradient_accumulation_steps * taken * processes == batch


def test_what_no_micro_batch_can_divide_is_refused():
    message = r"^train.total_batch_size = 8 is not a multiple of 3 processes; nearest: 6 or 9$"
    for capacity in (8, 1, "auto"):
        fields = dict(train__total_batch_size=8, train__total_samples_per_epoch=8, per_gpu_capacity=capacity)
        with pytest.raises(ConfigError, match=message):
            resolve(preset(**fields), 3)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("presets", [align_prop, ddpo, models])
def test_every_preset_starts_with_1_2_4_and_8_processes(presets, processes):
    configs = [presets.get_config(name) for name in presets.PRESETS]
    started = [resolve(c, processes) for c in configs if c.task == "train"]
    assert len(started) >= 5


def test_explicit_values_are_kept():
    c = resolve(preset(trunc_backprop_timestep=10, truncated_backprop_minmax=(5, 40), lora_alpha=1.5), 1)
    assert (c.trunc_backprop_timestep, c.truncated_backprop_minmax, c.lora_alpha) == (10, (5, 40), 1.5)


def test_target_modules_may_come_as_one_word():
    assert resolve(preset(lora_target_modules=("to_q,to_v",)), 1).lora_target_modules == ("to_q", "to_v")


def test_the_original_is_left_alone():
    config = preset()
    resolve(config, 1)
    assert config.lora_alpha is None and "steps_per_epoch" not in config.train


@pytest.mark.parametrize(("overrides", "message"), [
    (dict(train__total_samples_per_epoch=200), r"total_samples_per_epoch = 200 is not .* = 128; nearest: 128 or 256"),
    (dict(train__total_samples_per_epoch=100), r"total_samples_per_epoch = 100 is not .*; nearest: 128$"),
    (dict(trunc_backprop_timestep=50), r"trunc_backprop_timestep = 50 must be from 0 to .* 49"),
    (dict(truncated_backprop_minmax=(30, 10)), r"truncated_backprop_minmax = \(30, 10\)"),
    (dict(truncated_backprop_minmax=(0, 51)), r"truncated_backprop_minmax = \(0, 51\)"),
    (dict(loss="target"), r"loss = 'target' needs loss_target"),
    (dict(loss="targt"), r"loss = 'targt' .*did you mean 'target'"),
    (dict(learning_rate=1e-3), r"^learning_rate is not a field .*did you mean 'train.learning_rate'"),
])  # fmt: skip
def test_mistakes_name_the_field_the_value_and_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(preset(**overrides), 1)
    assert "\n" not in str(caught.value)


# ---- every field by itself

# At least one refused value for every field; what each would be without its row in FIELDS is a traceback, later.
REFUSED = {
    "task": ["trian"], "run_name": ["a/b", "..", "a\\b", "x" * 201, "é" * 101, "a\nb"], "log_dir": ["", " "],
    "log_with": [None], "seed": [-1, 0.5, True], "resume_from": [None], "save_freq": [0], "num_checkpoint_limit": [-1],
    "timeout_minutes": [0.0, math.nan, math.inf, 1e9], "mixed_precision": ["fp8"], "allow_tf32": ["yes", 1],
    "pretrained.model": [""], "pretrained.revision": [""], "pretrained.variant": [""],
    "pretrained.config": [""], "use_lora": [None],
    "train_text_encoder": ["yes", None],
    "lora_rank": [0, 2.0], "lora_alpha": [0.0, math.inf], "lora_target_modules": [(), ("to_q", ""), (3,)],
    "init_lora": [None, 3], "lora_initialization": ["pissa", True],
    "hub.repo": ["me", "me/", "a/b/c", "me/a b", "me/a--b", "me/é", None], "hub.private": ["yes", 1],
    "channels_last": ["NHWC"], "compile": ["reduce-overhead"], "num_inference_steps": [0],
    "sampler": ["", " ", "magic"], "sampler_options": [None, 3, "karras"],
    "train.sampler": ["", "magic"], "train.sampler_options": [3, "karras"],
    "train.prefix_cache": [0, 1.5], "train.prefix_cache_order": [-1, 0.5, 3],
    "resolution": [8, 512.0, "768x", "768x8", "big", True, "512,8", "512,", (), (512, 8)],
    "pretrained.loras": [None, 3], "negative_prompt": [None, 3], "guidance_interval": [(0.5,), (-0.1, 1), (0.6, 0.4)],
    "guidance_scale": [0.5, math.nan], "eta": [-0.5, 1.5],
    "estimator": [""], "trunc_backprop_timestep": [-1], "truncated_backprop_minmax": [(1,), (0, 1.5), (0, 1, 2)],
    "algorithm": ["ppo"], "plan.num_active": [0], "plan.exit_window": [0.0, 1.5], "plan.copies": [0, 1.5],
    "plan.late_bias": [-1.0], "plan.rescale": [2.0], "plan.coupling": [-0.1, 1.1], "plan.order": [0],
    "plan.support_scale": [0.0], "reward_combine": ["max"], "reward_noise": [-0.1], "kl_coeff": [-1.0],
    "num_eval_prompts": [0], "eval_diversity": ["yes"], "eval_base_distance": [1], "stop_when": [None],
    "best_by": [None], "lora_scale": [math.nan], "lora_schedule": ["cosine"],
    "guide.strength": [0.0], "guide.through": ["vae"], "guide.schedule": ["linear"],
    "guide.window": [(0.5,), (0.0, 1.5)], "ddpo.inner_epochs": [0], "ddpo.clip_range": [0.0],
    "ddpo.adv_clip_max": [-1.0], "ddpo.timestep_fraction": [0.0, 1.1], "ddpo.min_noise": [-0.1],
    "ddpo.per_prompt_buffer": [-1], "ddpo.per_prompt_min_count": [0],
    "guidance_grad": ["uncond"], "adjoint_clip": [-1.0], "reward_fn": [""], "eval_reward_fn": [None], "loss": ["l2"],
    "loss_target": [math.nan],
    "grad_scale": [0.0], "aesthetic.clip": [""], "aesthetic.head_repo": [""], "aesthetic.head_file": [""],
    "aesthetic.dtype": ["fp32"], "hps.version": ["v3"], "hps.checkpoint": [""], "hps.tokenizer": [""],
    "hps.dtype": ["half"], "hps.backend": ["open_clip"], "clip.model": [""], "clip.dtype": ["int8"],
    "aesthetic_v2_5.model": [""], "aesthetic_v2_5.revision": [3], "aesthetic_v2_5.head_file": [None],
    "aesthetic_v2_5.head_repo": [""], "aesthetic_v2_5.head_revision": [""], "aesthetic_v2_5.dtype": ["half"],
    "cyclereward.checkpoint": [""], "cyclereward.checkpoint_repo": [""], "cyclereward.checkpoint_revision": [""],
    "cyclereward.tokenizer": [None], "cyclereward.dtype": ["fp8"],
    "mps.checkpoint": [None], "mps.checkpoint_repo": [""], "mps.checkpoint_revision": [""], "mps.processor": [""],
    "mps.dtype": ["fp16"],
    "dino.model": [""], "dino.revision": [3], "dino.dtype": [None], "lpips.net": ["squeeze"], "lpips.lin": [""],
    "lpips.trunk": [""], "lpips.trunk_repo": [""], "lpips.trunk_revision": [""], "lpips.dtype": ["half"],
    "pretrained.vae": [""], "pretrained.denoiser": [""], "pretrained.quantize": ["int2", None],
    "pretrained.quantize_products": ["int8", None], "memory.decode_activations": ["cpu", 1],
    "pretrained.quantize_text_encoders": ["fp16", None], "quantize_rewards": [8, None],
    "pretrained.without": [None, 3], "true_cfg_scale": [0.5],
    "pickscore.model": [""], "pickscore.processor": [None], "pickscore.dtype": ["fp8"],
    "imagereward.checkpoint": [""], "imagereward.tokenizer": [""], "imagereward.dtype": ["float64"],
    "siglip.model": [""], "siglip.dtype": [None],
    "hpsv3.checkpoint": [""], "hpsv3.checkpoint_repo": [""], "hpsv3.checkpoint_revision": [""],
    "hpsv3.tokenizer": [None], "hpsv3.dtype": ["int8"],
    "geneval.model": [""], "geneval.revision": [""], "geneval.clip": [""], "geneval.clip_revision": [""],
    "geneval.dtype": ["half"], "geneval.threshold": [1.1], "geneval.counting_threshold": [-0.1],
    "geneval.max_overlap": [2.0], "geneval.partial": ["yes"],
    "vqascore.model": [""], "vqascore.revision": [""], "vqascore.tokenizer": [""], "vqascore.log": [1],
    "vqascore.dtype": ["int8"],
    "count.model": [""], "count.threshold": [0.0, 1.0],
    "aesthetic.clip_revision": [""], "aesthetic.head_revision": [""], "clip.revision": [""], "count.revision": [""],
    "hps.checkpoint_repo": [""], "hps.checkpoint_revision": [""], "imagereward.checkpoint_repo": [""],
    "imagereward.checkpoint_revision": [""], "pickscore.revision": [""], "siglip.revision": [3],
    "colour.target": [(0.5, 0.5), (0.0, 0.0, 2.0)],
    "jpeg.quality": [0, 101, 9.5],
    "vlm_judge.question": ["", None], "vlm_judge.lowest": [math.nan, "1"], "vlm_judge.highest": [math.inf, None],
    "vlm_judge.model": [""], "vlm_judge.revision": [""], "vlm_judge.dtype": ["int8"], "vlm_judge.endpoint": ["", 8000],
    "vlm_judge.api_key_variable": ["", 3], "vlm_judge.max_tokens": [0, 9.5], "vlm_judge.timeout": [0.0, math.inf],
    "vlm_judge.at_once": [0, 257], "vlm_judge.cache_dir": [""], "vlm_judge.missing": [math.nan],
    "unifiedreward.template": ["long", None], "unifiedreward.model": [""], "unifiedreward.revision": [""],
    "unifiedreward.dtype": ["fp8"], "unifiedreward.endpoint": [""], "unifiedreward.api_key_variable": [""],
    "unifiedreward.max_tokens": [0], "unifiedreward.timeout": [-1.0], "unifiedreward.at_once": [0],
    "unifiedreward.cache_dir": [""], "unifiedreward.missing": [math.inf],
    "prompt_fn": [""], "eval_prompt_fn": [None], "eval_freq": [-1], "resume_from_2": [""],
    "mixing_coef_1": [(), ("0.5",), (math.nan,), (math.inf, 0.0)], "allow_extrapolation": [2],
    "soup_mode": ["mean"], "num_eval_images": [0], "max_vis_images": [-3], "num_epochs": [0, True],
    "memory_policy": ["tiny"], "memory.sweep_chunk": [-1], "memory.decode_chunk": [1.5], "memory.decode_tiles": [-8],
    "memory.guidance_batching": ["both"], "memory.keep_steps": [-1], "memory.block_checkpointing": [1],
    "memory.decoder_checkpointing": ["yes"], "memory.residency": ["cpu"], "memory.lean": [0],
    "per_gpu_capacity": [0, "most", 2.0], "train.num_inference_steps": [0], "train.total_batch_size": [0],
    "train.total_samples_per_epoch": [-1],
    "train.optimizer": ["adam"], "train.learning_rate": [0.0, -1e-3, math.nan, math.inf],
    "train.lr_schedule": ["step"], "train.lr_warmup_steps": [-1, 0.5], "train.lr_num_cycles": [0, 1.5],
    "train.lr_power": [0.0, math.inf],
    "train.adam_beta1": [1.0, -0.1], "train.adam_beta2": [1.0], "train.adam_weight_decay": [-0.1],
    "train.adam_epsilon": [0.0], "train.max_grad_norm": [0.0, math.inf], "train.loss_coeff": [0.0],
    "train.ema_decay": [1.0, -0.5], "train.max_skipped_steps": [0],
}  # fmt: skip


def test_every_field_has_a_check_and_a_refused_value():
    fields = flatten(base().to_dict()).keys()
    assert fields == FIELDS.keys() == REFUSED.keys()


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values])
def test_a_value_that_cannot_be_is_one_line_with_field_value_and_what_is_allowed(field, value):
    content = get_config("hps").to_dict()  # unlike an override, a dict may have a value of any type
    *group, name = field.split(".")
    (content[group[0]] if group else content)[name] = value
    config = ConfigDict(content)
    with pytest.raises(ConfigError) as caught:
        resolve(config, 1)
    message = str(caught.value)
    assert message.startswith(f"{field} = {value!r} ") and "\n" not in message
    assert "must be " in message or "is not one of " in message


def test_presets_share_the_fields_of_base():
    for name in PRESETS:
        assert flatten(get_config(name).to_dict()).keys() == {*FIELDS, "preset"}


@pytest.mark.parametrize("presets", [align_prop, ddpo, models], ids=lambda module: module.__name__)
def test_every_field_of_a_preset_can_be_given_on_the_command_line(presets):
    """A field of no type is refused there: None alone gives it none."""
    for name in presets.PRESETS:
        config = presets.get_config(name)
        for field in FIELDS:
            *groups, last = field.split(".")
            place = config[groups[0]] if groups else config
            assert place.get_type(last) is not type(None), f"{name}: {field}"


def test_choices_are_those_of_the_code_that_has_them():
    assert FIELDS["loss"].rule.choices == tuple(LOSSES)
    assert FIELDS["memory_policy"].rule.choices == ("auto", *POLICIES)
    assert {name for name in FIELDS if name.startswith("memory.")} == {f"memory.{name}" for name in NAMES}
    assert set(FIELDS["hps.version"].rule.choices) == set(CHECKPOINTS)
    assert set(FIELDS["hps.backend"].rule.choices) == set(BACKENDS)
    towers = [name for name in FIELDS if name.endswith(".dtype")]
    assert len(towers) == 16 and all(set(FIELDS[name].rule.choices) == set(DTYPES) for name in towers)


def test_every_reward_option_is_a_field():
    for name in REWARDS:
        taken = inspect.signature(reward_class(name).__init__).parameters
        options = {option: p.default for option, p in taken.items() if option not in ("self", "args", "kwargs")}
        group = options_name(name)
        fields = {f.partition(".")[2]: d.default for f, d in FIELDS.items() if options and f.startswith(f"{group}.")}
        assert fields == options, name


def test_a_field_is_its_declaration_alone(monkeypatch):
    """Default, type, rule, effect and documentation of a new one all follow from one entry."""
    field = Field("guide.new", 3, optional(COUNT), "What it does.", (GUIDE,))
    monkeypatch.setitem(FIELDS, "guide.new", field)
    monkeypatch.setitem(GROUPS, "Reward guidance without training", (field,))
    c = base()
    assert c.guide.new == 3 and c.guide.get_type("new") is int
    c.guide.new = None
    assert resolve(c, 1).guide.new is None
    assert warnings_for(c, ["guide.new"]) == ["guide.new has no effect: it needs task = 'guide'"]
    c.guide.new = 0
    with pytest.raises(ConfigError, match=r"^guide.new = 0 must be None or a whole number of at least 1$"):
        resolve(c, 1)
    assert "| `guide.new` | `3` | What it does. |" in config_docs.page()


def test_the_page_of_all_fields_is_fresh():
    made = (config_docs.ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert made == config_docs.page(), "run: python scripts/config_docs.py"


def test_a_field_that_is_missing_is_named():
    flat = get_config("hps").to_dict()
    del flat["eta"]
    with pytest.raises(ConfigError, match=r"^eta is missing"):
        resolve(ConfigDict(flat), 1)


def test_a_resolved_configuration_resolves_again():
    once = resolve(preset(), 2)
    assert resolve(once, 2) == once


def test_every_field_has_help_of_its_own():
    helps = [field.help for name, field in FIELDS.items() if name.partition(".")[0] not in REWARDS]
    assert len(helps) == len(set(helps)) > 90
    assert all(len(field.help.split()) >= 3 and field.help.endswith(".") for field in FIELDS.values())


def test_a_memory_policy_fills_what_is_not_set():
    c = resolve(preset(memory_policy="small", memory__sweep_chunk=2), 1)
    assert memory_policy(c) == replace(POLICIES["small"], sweep_chunk=2)


def test_auto_stays_open_and_what_it_came_to_is_written_down():
    c = resolve(preset(per_gpu_capacity="auto", memory__keep_steps=3), 2)
    assert c.memory.lean is None and c.per_gpu_capacity == "auto" and "gradient_accumulation_steps" not in c.train
    assert c.train.steps_per_epoch == 2
    written = as_run(c, 2, POLICIES["fast"], 8)
    assert memory_policy(written) == POLICIES["fast"] and c.memory.lean is None
    assert written.per_gpu_capacity == 8 and written.train.gradient_accumulation_steps == 8


@pytest.mark.parametrize(("overrides", "message"), [
    (dict(memory_policy="small", memory__keep_steps=2), r"^memory.keep_steps = 2 must be 0 where .* = 'phase'"),
    (dict(memory__residency="phase", memory_policy="roomy"), r"^memory.keep_steps = 1000 must be 0"),
    (dict(memory__residency="phase", use_lora=False), r"^memory.residency = 'phase' needs use_lora = True"),
    (dict(memory_policy="small", use_lora=False), r"^memory.residency = 'phase' needs use_lora = True"),
])  # fmt: skip
def test_policies_that_contradict_themselves(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(preset(**overrides), 1)


def test_training_may_have_fewer_sampler_steps_than_evaluation():
    c = resolve(preset("hps_k1", train__num_inference_steps=15), 1)
    assert (c.num_inference_steps, c.train.num_inference_steps, c.trunc_backprop_timestep) == (50, 15, 14)
    assert resolve(preset(), 1).train.num_inference_steps == 50
    with pytest.raises(ConfigError, match=r"trunc_backprop_timestep = 15 .* train.num_inference_steps - 1 = 14"):
        resolve(preset(train__num_inference_steps=15, trunc_backprop_timestep=15), 1)


@pytest.mark.parametrize("coefficients", [(1.5,), (0.5, -0.1)])
def test_mixing_coefficients_lie_between_0_and_1_unless_asked_for(coefficients):
    config = preset("evaluate_soup", resume_from="x", mixing_coef_1=coefficients)
    with pytest.raises(ConfigError, match=r"mixing_coef_1 = \(.*from 0 to 1, unless allow_extrapolation = True"):
        resolve(config, 1)
    config.allow_extrapolation = True
    assert resolve(config, 1).mixing_coef_1 == coefficients


def test_a_soup_needs_its_checkpoint():
    with pytest.raises(ConfigError, match=r"^resume_from is empty"):
        resolve(preset("evaluate_soup"), 1)


def test_a_page_is_served_by_one_process():
    assert resolve(preset("explore"), 1).task == "explore"
    with pytest.raises(ConfigError, match=r"^task = 'explore' needs one process; there are 2"):
        resolve(preset("explore"), 2)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(kl_coeff=0.1, use_lora=False), r"kl_coeff = 0.1 needs use_lora = True"),
    (dict(train_text_encoder=True, use_lora=False), r"train_text_encoder = True needs use_lora = True"),
    (dict(train_text_encoder=True, algorithm="ddpo", eta=1.0), r"train_text_encoder = True needs algorithm = 'align_p"),
    (dict(guide__window=(0.5, 0.5)), r"guide.window = \(0.5, 0.5\) must be \(from, to\)"),
    (dict(algorithm="ddpo"), r"eta = 0 must be greater than 0 if algorithm = 'ddpo'"),
    (dict(algorithm="ddpo", eta=1.0, train__total_batch_size=1, train__total_samples_per_epoch=1, per_gpu_capacity=1),
     r"train.total_samples_per_epoch = 1 must be at least 2 if algorithm = 'ddpo'"),
    (dict(num_epochs=3, train__lr_warmup_steps=6), r"train.lr_warmup_steps = 6 must be less than .* of the run, 6$"),
    (dict(num_epochs=3, train__lr_warmup_steps=24, algorithm="ddpo", eta=1.0, ddpo__inner_epochs=4),
     r"train.lr_warmup_steps = 24 must be less than the number of optimizer updates of the run, 24$"),
    (dict(train__lr_schedule="polynomial", train__learning_rate=1e-7),
     r"train.learning_rate = 1e-07 must be greater than 1e-07, where train.lr_schedule = 'polynomial' ends"),
])  # fmt: skip
def test_combinations_of_newer_fields_that_cannot_run(fields, message):
    with pytest.raises(ConfigError, match=message):
        resolve(preset(**fields), 1)


def test_a_warm_up_may_last_until_the_last_update():
    longest = [(5, dict()), (23, dict(algorithm="ddpo", eta=1.0, ddpo__inner_epochs=4))]
    for steps, fields in longest:
        c = resolve(preset(num_epochs=3, train__lr_warmup_steps=steps, **fields), 1)
        assert c.num_epochs * updates_of_epoch(c) == steps + 1


def test_what_only_training_uses_is_checked_for_training_only():
    fields = dict(task="evaluate", kl_coeff=0.1, use_lora=False, loss="ceiling", loss_target=None)
    assert resolve(preset(**fields), 1).task == "evaluate"
    unused = warnings_for(resolve(preset(**fields), 1), ["kl_coeff", "loss", "compile"])
    assert [line.split(" ")[0] for line in unused] == ["kl_coeff", "loss", "compile"]


def test_every_preset_resolves():
    for name in PRESETS:
        resolve(preset(name, **({"resume_from": "x"} if "soup" in name else {})), 1)


def test_published_hyper_parameters():
    c = resolve(preset("aesthetic"), 1)
    train = c.train
    assert (train.learning_rate, train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (1e-3, 0.9, 0.999, 0.1)
    assert (train.max_grad_norm, train.loss_coeff) == (5.0, 0.01)
    assert (train.total_samples_per_epoch, train.total_batch_size, c.per_gpu_capacity) == (256, 128, 4)
    assert (c.num_inference_steps, c.guidance_scale, c.mixed_precision) == (50, 7.5, "fp16")
    assert (c.num_epochs, c.loss, c.loss_target, c.prompt_fn) == (7, "target", 10.0, "simple_animals")
    assert resolve(preset("hps_k1"), 1).trunc_backprop_timestep == 49 and preset("hps_k1").num_epochs == 200


def test_a_variant_states_only_its_difference():
    estimators = ("draft_lv", "refl", "drtune", "sparse", "bridge", "lagrange", "leapalign")
    for variant, plain in (("aesthetic_k1", "aesthetic"), ("hps_k1", "hps"), *((name, "hps") for name in estimators)):
        a, b = (flatten(get_config(n).to_dict()) for n in (variant, plain))
        assert {k for k in a if a[k] != b[k]} == {"estimator", "preset"}


def test_unknown_preset_and_nearest_name():
    with pytest.raises(ConfigError, match=r"preset = 'aestetic' .*did you mean 'aesthetic'"):
        get_config("aestetic")


def test_one_of_without_a_near_name():
    with pytest.raises(ConfigError, match=r"^x = 'zzz' is not one of 'a', 'b'$"):
        one_of("x", "zzz", ["a", "b"])


def test_saved_configuration_has_values_and_versions(tmp_path):
    save_config(resolve(preset(), 2), tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["train"]["gradient_accumulation_steps"] == 16 and saved["versions"]["torch"]


def test_what_tells_where_a_run_lies_and_how_it_was_called_is_no_change():
    before = {"run_name": "a", "command": "python main.py", "train": {"learning_rate": 1e-3}}
    now = {"run_name": "b", "command": "python main.py --config.seed=1", "train": {"learning_rate": 1e-4}}
    assert changes(before, now) == ["train.learning_rate: 0.001 → 0.0001"]
