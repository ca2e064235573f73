"""Forecasts against what a real step needs, counted on real tensors."""

import sys
from itertools import pairwise

import pytest
import torch

from alignprop.engine.seeding import generator
from alignprop.evaluation.judges import Judges, build_judges
from alignprop.memory.accounting import Account, on_meta
from alignprop.memory.planner import forecast, skeletons
from alignprop.memory.simulation import simulate
from alignprop.method.prefix_cache import blocks_of
from alignprop.models import packed
from alignprop.models.sd import StableDiffusion
from alignprop.prompts import load_prompts
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES, MemoryPolicy
from alignprop.settings.resolve import resolve
from alignprop.trainer import AlignPropTrainer
from config.align_prop import TINY
from rewards import build_reward

STEPS, CAPACITY = 3, 3
STAYING = {
    "balanced": POLICIES["balanced"], "some kept": MemoryPolicy(keep_steps=2),
    "blocks": MemoryPolicy(sweep_chunk=2, block_checkpointing=True),
}  # fmt: skip


def real_cost(trainer):
    """(bytes at most, FLOPs) of one micro-batch and of the update, on the CPU."""
    run, account = trainer.run, Account("cpu")
    trainer.step()  # prompts are remembered and the optimizer has its moments
    size = trainer.config.per_gpu_capacity
    plan = trainer.estimator(run.rollout.sampler, size, generator(trainer.config.seed, 0, "plan"))
    account.track(run.model.denoiser, run.model.decoder, run.reward)
    account.track([list(moments.values()) for moments in trainer.weights.optimizer.state.values()])
    with account:
        trainer.add_gradients((0, 0), torch.arange(size), plan)
        trainer.weights.sum_over_processes()
        trainer.weights.optimizer.step()
    return account.peak, sum(account.flops.values())


@pytest.fixture
def options():
    return dict(
        num_inference_steps=STEPS, estimator="full", per_gpu_capacity=CAPACITY, eval_reward_fn="",
        train__total_batch_size=CAPACITY, train__total_samples_per_epoch=CAPACITY,
    )  # fmt: skip


def compare(config, memory):
    """(forecast, real) as (bytes, FLOPs)."""
    with config.unlocked():
        config.memory_policy = "fast"
        config.memory.update(vars(memory))
    c = resolve(config, 1)
    model = StableDiffusion.load(c.pretrained.model)
    judges = build_judges(c, load_prompts(c.eval_prompt_fn, "eval_prompt_fn"))
    ours = forecast(lambda: (on_meta(model), on_meta(judges)), c, "x", memory, c.per_gpu_capacity)
    trainer = AlignPropTrainer(config)
    return (ours.peak, ours.flops * c.per_gpu_capacity), real_cost(trainer)


@pytest.fixture
def small(toy_config, pipeline_folder, options, tmp_path):
    """A random model with the bundled aesthetic reward, on prompts that are all different."""
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"{count} circles\n" for count in range(500)))

    def make(**overrides):
        fields = {"pretrained__model": str(pipeline_folder), "reward_fn": "aesthetic", "prompt_fn": str(prompts)}
        return toy_config(**fields | options | overrides)

    return make


@pytest.mark.parametrize("name", STAYING)
def test_a_forecast_is_what_a_real_step_needs(small, name):
    """Bytes within 5 %, FLOPs within 1 %."""
    (ours, our_flops), (real, real_flops) = compare(small(), STAYING[name])
    assert ours == pytest.approx(real, rel=0.05)
    assert our_flops == pytest.approx(real_flops, rel=0.01)


# Every field that adds calls of a network to a step, or takes some away.
CALLS = {
    "kl_coeff": {"kl_coeff": 2.0, "train_text_encoder": True},
    "guidance_scale": {"guidance_scale": 1.0},
    "guidance_grad": {"guidance_grad": "cond"},
    # Beside a smaller model it would show that a real prompt has more tokens than the forecast's empty one.
    "reward_fn": {"reward_fn": "aesthetic,clip:2", "pretrained__model": str(TINY / "pipeline")},
    "reward_noise": {"reward_noise": 0.1},
}


ONE_CHUNK = MemoryPolicy(sweep_chunk=2, decode_chunk=2)  # is simulated; a real step has a second one
_FLOPS: dict[str, float] = {}  # by model, found once for all fields


def flops_without(config) -> float:
    c = resolve(config, 1)
    if c.pretrained.model not in _FLOPS:
        _FLOPS[c.pretrained.model] = forecast(skeletons(c), c, "x", ONE_CHUNK, CAPACITY).flops
    return _FLOPS[c.pretrained.model]


@pytest.mark.parametrize("field", CALLS)
def test_a_forecast_counts_what_a_field_adds(small, field):
    """Its operations are those of a real step, and are not those of a step without the field."""
    config = small(**CALLS[field])
    plain = small(pretrained__model=config.pretrained.model)
    (ours, our_flops), (real, real_flops) = compare(config, ONE_CHUNK)
    assert our_flops == pytest.approx(real_flops, rel=0.002)
    assert ours == pytest.approx(real, rel=0.05)
    if field != "reward_noise":  # which is no call, but has a tensor of its own
        assert abs(our_flops / CAPACITY / flops_without(plain) - 1) > 0.004


def test_a_forecast_counts_what_a_prefix_cache_predicts(small, deeper_pipeline):
    """Its operations, and the outputs of blocks that it holds, one more for each order."""
    fields = {"num_inference_steps": 8, "estimator": "truncated", "pretrained__model": deeper_pipeline}
    (ours, our_flops), (real, real_flops) = compare(small(**fields, train__prefix_cache=2), ONE_CHUNK)
    assert our_flops == pytest.approx(real_flops, rel=0.002)
    assert ours == pytest.approx(real, rel=0.05)
    held = []
    for interval, order in ((1, 0), (2, 0), (2, 1), (2, 2)):
        c = resolve(small(**fields, train__prefix_cache=interval, train__prefix_cache_order=order), 1)
        held.append(forecast(skeletons(c), c, "x", ONE_CHUNK, CAPACITY))
    assert held[0].flops > 1.1 * held[1].flops == pytest.approx(1.1 * held[3].flops)
    model, sizes = StableDiffusion.load(c.pretrained.model), []
    for name in blocks_of(model.denoiser):
        model.denoiser.get_submodule(name).register_forward_hook(lambda *call: sizes.append(call[-1].nbytes))
    model.predict(torch.zeros(4, 4, 8, 8), torch.tensor(0), model.blank_conditioning(4))  # 2 samples, 2 branches
    for before, after in pairwise(held):
        # Some outputs are alive at the peak without a cache too: those that skip connections wait with.
        assert after.peaks["denoise"] - before.peaks["denoise"] == pytest.approx(sum(sizes), rel=0.15)


@pytest.mark.parametrize(("estimator", "exact_bytes"), [("draft_lv", True), ("refl", False)])
def test_a_forecast_knows_of_copies_and_early_exits(small, estimator, exact_bytes):
    """Samples that leave the chain make a step's calls smaller, never larger, than those that memory is planned for."""
    more = {"plan__copies": 3} if estimator == "draft_lv" else {}
    (ours, our_flops), (real, real_flops) = compare(small(estimator=estimator, **more), MemoryPolicy())
    assert our_flops == pytest.approx(real_flops, rel=0.01)
    assert ours == pytest.approx(real, rel=0.05) if exact_bytes else ours >= 0.95 * real


def test_a_forecast_has_the_judges_that_only_an_evaluation_asks(small):
    """A second tower is loaded for it: in the phase of its own, all of its bytes."""
    peaks = {}
    for judges in ("", "clip"):
        c = resolve(small(eval_reward_fn=judges, eval_diversity=False), 1)
        peaks[judges] = forecast(skeletons(c), c, "x", POLICIES["fast"], CAPACITY).peaks
    _, both = skeletons(c)()
    tower = sum(t.numel() * t.element_size() for t in both.extra.state_dict().values())
    assert "measure" not in peaks[""] and tower > 2**20
    update = peaks["clip"]["update"]  # the weights that stay, and nothing besides but gradients
    assert update + 0.8 * tower < peaks["clip"]["measure"] < update + 3 * tower
    assert {**peaks["clip"], "measure": 0} == {**peaks[""], "measure": 0}


def test_a_forecast_needs_no_package_of_an_optimizer(small, deeper_pipeline, monkeypatch):
    """Of each trained number AdamW has 8 bytes, AdamW8bit 2, and Prodigy 16."""
    for package in ("bitsandbytes", "prodigyopt"):
        monkeypatch.setitem(sys.modules, package, None)
    peaks = {}
    for name in ("adamw", "adamw8bit", "prodigy"):
        c = resolve(small(train__optimizer=name, use_lora=False, pretrained__model=deeper_pipeline), 1)
        peaks[name] = forecast(skeletons(c), c, "x", POLICIES["fast"], CAPACITY).peaks["sweep"]
    model, _ = skeletons(c)()
    trained = sum(p.numel() for p in model.denoiser.parameters())
    assert peaks["adamw"] - peaks["adamw8bit"] == pytest.approx(6 * trained, rel=0.1)
    assert peaks["prodigy"] - peaks["adamw"] == pytest.approx(8 * trained, rel=0.1)


REWARD = Judges(build_reward("tests.helpers.toy_rewards:redness"))


# ---- without weights


@pytest.mark.parametrize("reward", ["aesthetic", "clip", "aesthetic:1,tests.helpers.toy_rewards:redness:2"])
def test_skeletons_have_the_shapes_of_the_real_parts(toy_config, reward):
    """The bundled model's folder and CLIP, read for their configuration files alone."""
    config = resolve(toy_config(pretrained__model=str(TINY / "pipeline"), reward_fn=reward), 1)
    model, judges = skeletons(config)()
    real = StableDiffusion.load(str(TINY / "pipeline"))
    options = {name: config[name].to_dict() for name in ("aesthetic", "clip")}
    pairs = [
        (model.denoiser, real.denoiser),
        (model.decoder, real.decoder),
        (judges.reward, build_reward(reward, options)),
    ]
    for ours, theirs in pairs:
        shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert all(tensor.is_meta for tensor in ours.state_dict().values())


def test_a_forecast_from_files_is_that_of_the_loaded_parts(toy_config, pipeline_folder):
    config = resolve(toy_config(pretrained__model=str(pipeline_folder)), 1)
    model, judges = StableDiffusion.load(str(pipeline_folder)), build_judges(config, None)

    def short_step(build):
        found = simulate(build, config, POLICIES["small"], 2, prompts=1, steps=2, copies=0)
        operators = {phase: count for phase, count in found.operators.items() if phase not in ("decode", "measure")}
        return found._replace(operators=operators)  # without those of the user's own rewards, which files do not have

    loaded = short_step(lambda: (on_meta(model), on_meta(judges)))
    assert short_step(skeletons(config)) == loaded and loaded.flops["sweep"] > 0


def test_a_single_file_is_planned_from_its_configuration(toy_config, pipeline_folder):
    config = resolve(toy_config(pretrained__model="model.safetensors", pretrained__config=str(pipeline_folder)), 1)
    whole = resolve(toy_config(), 1)
    assert skeletons(config)()[0].latent_shape == skeletons(whole)()[0].latent_shape
    config = resolve(toy_config(pretrained__model="model.safetensors"), 1)
    with pytest.raises(ConfigError, match=r"^pretrained.model = 'model.safetensors' is a single file: to plan, pretr"):
        skeletons(config)


def test_kept_steps_cost_fewer_operations_the_more_there_are(toy_config, pipeline_folder):
    config = resolve(toy_config(num_inference_steps=6, estimator="truncated", trunc_backprop_timestep=2), 1)
    model = StableDiffusion.load(str(pipeline_folder))
    parts, found = (lambda: (on_meta(model), on_meta(REWARD))), {}
    done: dict = {}
    for keep in (0, 1, 2, 4, 99):
        found[keep] = forecast(parts, config, "x", MemoryPolicy(keep_steps=keep), 2, done)
    assert found[4] == found[99]
    config_k1 = resolve(toy_config(num_inference_steps=6, estimator="truncated"), 1)
    of_one = forecast(parts, config_k1, "x", MemoryPolicy(keep_steps=99), 2, done)
    assert of_one.peaks["sweep"] < found[1].peaks["sweep"]  # which calls the network again besides
    assert found[1].peak < found[2].peak < found[4].peak
    saved = [found[keep].flops - found[4].flops for keep in (0, 1, 2)]
    assert saved[2] > 0
    # The lowest step, called again without ∂f/∂x, costs the same call of the network as any other.
    assert saved == pytest.approx([2 * saved[2], 1.5 * saved[2], saved[2]], rel=1e-6)


def test_a_full_fine_tuning_needs_more_than_a_lora(toy_config, pipeline_folder):
    peaks = []
    for use_lora in (True, False):
        config = resolve(toy_config(pretrained__model=str(pipeline_folder), use_lora=use_lora), 1)
        short_step = simulate(skeletons(config), config, POLICIES["fast"], 2, prompts=1, steps=1, copies=0)
        peaks.append(max(short_step.peaks.values()))
    assert peaks[1] > peaks[0]


@pytest.mark.parametrize("residency", ["phase", "stream"])
def test_a_forecast_of_the_bytes_that_move(small, monkeypatch, tmp_path, residency):
    """Exact for modules; a layer that streams may come once more, or once less, at the ends of a phase."""
    (tmp_path / "one.txt").write_text("a cat\n")  # whose encoding is remembered
    monkeypatch.setattr(packed, "NARROWEST", 8)
    memory = MemoryPolicy(sweep_chunk=1, decode_chunk=1, residency=residency)
    config = small(num_inference_steps=4, prompt_fn=str(tmp_path / "one.txt"))
    with config.unlocked():
        config.memory_policy = "fast"
        config.memory.update(vars(memory))
    c = resolve(config, 1)
    ours = forecast(skeletons(c), c, "x", memory, CAPACITY)
    trainer = AlignPropTrainer(config)
    trainer.step()
    run = trainer.run
    before = run.residency.moved, run.residency.streamed
    trainer.step()
    moved, streamed = run.residency.moved - before[0], run.residency.streamed - before[1]
    assert ours.moved * CAPACITY == pytest.approx(moved, rel=0.01)
    assert ours.streamed * CAPACITY == pytest.approx(streamed, rel=0.03)
    assert (streamed > 0) == (residency == "stream") and moved > 0
