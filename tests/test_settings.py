import json

import pytest

from alignprop.settings import ConfigError, flatten, one_of, resolve, save_config, warnings_for
from config.align_prop import PRESETS, get_config


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
    (dict(train__total_batch_size=130), r"total_batch_size = 130 .* 4 × 1 = 4; nearest: 128 or 132"),
    (dict(train__total_batch_size=2), r"nearest: 4"),
    (dict(train__total_samples_per_epoch=200), r"total_samples_per_epoch = 200 is not a multiple"),
    (dict(trunc_backprop_timestep=50), r"trunc_backprop_timestep = 50 must be from 0 to .* 49"),
    (dict(truncated_backprop_minmax=(30, 10)), r"truncated_backprop_minmax = \(30, 10\)"),
    (dict(truncated_backprop_minmax=(0, 51)), r"truncated_backprop_minmax = \(0, 51\)"),
    (dict(mixed_precision="fp8"), r"mixed_precision = 'fp8' is not one of 'no', 'fp16', 'bf16'"),
    (dict(per_gpu_capacity=0), r"per_gpu_capacity = 0 must be greater than 0"),
    (dict(eta=-0.5), r"eta = -0.5 must not be negative"),
    (dict(eta=1.5), r"eta = 1.5 must be from 0"),
    (dict(train__adam_beta2=1.0), r"train.adam_beta2 = 1.0 must be at least 0 and less than 1"),
    (dict(lora_alpha=0.0), r"lora_alpha = 0.0 must be greater than 0"),
    (dict(guidance_scale=0.5), r"guidance_scale = 0.5"),
    (dict(train__ema_decay=1.0), r"train.ema_decay = 1.0 must be at least 0 and less than 1"),
    (dict(loss="target"), r"loss = 'target' needs loss_target"),
    (dict(loss="targt"), r"loss = 'targt' .*did you mean 'target'"),
])  # fmt: skip
def test_mistakes_name_the_field_the_value_and_what_is_allowed(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(preset(**overrides), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("coefficients", [(1.5,), (0.5, -0.1), ()])
def test_mixing_coefficients_lie_between_0_and_1(coefficients):
    with pytest.raises(ConfigError, match="mixing_coef_1"):
        resolve(preset("evaluate_soup", resume_from="x", mixing_coef_1=coefficients), 1)


def test_fields_without_effect_are_told():
    c = resolve(preset(trunc_backprop_timestep=10), 1)
    assert warnings_for(c, ["trunc_backprop_timestep", "seed"]) == [
        "trunc_backprop_timestep has no effect: it needs estimator = 'truncated'"
    ]
    assert warnings_for(resolve(preset("hps_k1"), 1), ["trunc_backprop_timestep"]) == []
    (line,) = warnings_for(resolve(preset("evaluate"), 1), ["train.learning_rate", "num_eval_images"])
    assert line.startswith("train.learning_rate has no effect")


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
    for variant, base in (("aesthetic_k1", "aesthetic"), ("hps_k1", "hps")):
        a, b = (flatten(get_config(n).to_dict()) for n in (variant, base))
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
