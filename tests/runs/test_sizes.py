"""Runs whose pictures have several sizes: which size a step draws, its gradient, and an evaluation in each size."""

import csv
import json

import pytest
import torch

from alignprop.build import build_run
from alignprop.ddpo import DDPOTrainer
from alignprop.engine.seeding import generator, generators
from alignprop.evaluation.judges import diversity
from alignprop.evaluation.pictures import read_grid
from alignprop.memory.planner import skeletons
from alignprop.method.samplers import chain_of
from alignprop.models import FAMILIES
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve
from alignprop.tasks import evaluate
from alignprop.trainer import AlignPropTrainer
from rewards import RewardError
from scripts.bench.families import config_for, load
from tests.helpers.tiny_pipelines import make_family

SIZES = "24x16,16x24,16"


def gradients_of_two_steps(config):
    """The gradient of two samples in each of the first two steps, always from the same weights."""
    trainer, found = AlignPropTrainer(config), []
    for parameter in trainer.weights.parameters:
        parameter.data.normal_(0, 0.3, generator=generator("w", parameter.numel()))
    for step in (0, 1):
        key, indices = (config.seed, step), torch.tensor([2, 3])
        plan = trainer.estimator(trainer.rollout(key).sampler, 4, generator(*key, "plan"))
        trainer.add_gradients(key, indices, plan.select(indices))
        found.append(torch.cat([p.grad.flatten() for p in trainer.weights.parameters]))
        trainer.weights.zero_grad()
    return found


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_the_gradient_of_a_step_is_that_of_a_run_with_its_size_alone(tmp_path, family):
    """Also where the size is an input of the network (SDXL), or the noise levels depend on it (FLUX)."""
    folder = make_family(tmp_path / family, family)
    drawn, small, large = (
        gradients_of_two_steps(config_for(family, folder, tmp_path, resolution=resolution, run_name="r"))
        for resolution in ("16,32x24", "16", "32x24")
    )
    is_small, is_large = ([torch.equal(a, b) for a, b in zip(drawn, alone, strict=True)] for alone in (small, large))
    assert is_small in ([True, False], [False, True]) and is_large == is_small[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_size_is_the_model_loaded_with_that_size(tmp_path, family):
    folder = make_family(tmp_path / family, family)
    loaded, other = (load(family, folder, resolution=size) for size in ("24x16", "32"))
    moved = other.of_size((16, 24))
    assert moved.denoiser is other.denoiser and other.latent_shape != moved.latent_shape == loaded.latent_shape
    assert torch.equal(chain_of(moved, 3).timesteps, chain_of(loaded, 3).timesteps)
    assert torch.equal(chain_of(moved, 3).b, chain_of(loaded, 3).b)
    cond = other.encode_prompts(["a cat"])
    assert moved.knows(["a cat"])
    pictures = []
    for model in (moved, loaded):
        model_cond = cond if model is moved else loaded.encode_prompts(["a cat"])
        (branch,) = model.branches(model_cond, 1.0)[-1:]
        pictures.append(
            model.predict(model.init_latents(generators([0], "x")), chain_of(model, 3).timesteps[0], branch)
        )
    assert torch.equal(*pictures)


def test_each_size_is_drawn_once_in_a_round_and_the_order_depends_on_the_seed(toy_config):
    trainer = AlignPropTrainer(toy_config(resolution=SIZES, num_eval_images=3))
    orders = [[trainer.run.rollouts.index(trainer.rollout((seed, step))) for step in range(12)] for seed in (0, 1)]
    for order in orders:
        assert all(sorted(order[first : first + 3]) == [0, 1, 2] for first in range(0, 12, 3))
        assert len({tuple(order[first : first + 3]) for first in range(0, 12, 3)}) > 1
    assert orders[0] != orders[1]
    largest = trainer.rollout((0, "trial"))
    assert largest.model.latent_shape[1:] == trainer.run.model.latent_shape[1:] == (8, 12)
    assert [r.model.latent_shape[1:] for r in trainer.run.rollouts] == [(8, 12), (12, 8), (8, 8)]


def test_a_size_that_is_named_twice_is_drawn_twice_as_often(toy_config):
    trainer = AlignPropTrainer(toy_config(resolution="16,24x16,16", num_eval_images=3))
    shapes = [trainer.rollout((0, step)).model.latent_shape[1:] for step in range(6)]
    assert shapes.count((8, 8)) == 4 and shapes.count((8, 12)) == 2


def test_rows_have_the_size_of_their_step_and_policy_gradients_draw_it_too(toy_config):
    config = toy_config(algorithm="ddpo", resolution="24x16,16", eta=1.0, train__total_samples_per_epoch=4)
    trainer, seen = DDPOTrainer(config), []
    sample = trainer.sample
    trainer.sample = lambda *arguments: seen.append(sample(*arguments)) or seen[-1]
    rows = [trainer.step() for _ in range(2)]
    names = {(8, 12): "24x16", (8, 8): "16"}
    sizes = [names[samples[0].latents[0].shape[2:]] for samples, _ in seen]
    assert sizes[0] == sizes[1] != sizes[2] == sizes[3]
    assert [row["reward_by_size"] for row in rows] == [{s: r["reward"]} for s, r in zip(sizes[::2], rows, strict=True)]
    assert all(row["ratio_mean"] == 1 for row in rows)


def test_policy_gradients_compare_rewards_of_one_size(toy_config):
    """A reward that depends on the size alone gives no advantage to any sample."""
    config = toy_config(
        algorithm="ddpo", resolution="24x16,16", eta=1.0, train__total_samples_per_epoch=4, ddpo__per_prompt_min_count=1
    )
    trainer = DDPOTrainer(config, reward_function=lambda images, *_: images.new_full((len(images),), images.shape[3]))
    advantages, seen = trainer.statistics.advantages, []
    trainer.statistics.advantages = lambda *given: seen.append(advantages(*given)) or seen[-1]
    rewards = {trainer.step()["reward"] for _ in range(4)}
    assert rewards == {24.0, 16.0} and not torch.cat(seen).any()
    assert {name.rpartition(" ")[2] for name in trainer.statistics.rewards} == {"[24x16]", "[16]"}


# ---- an evaluation


def test_each_prompt_is_drawn_in_each_size(toy_config):
    one = build_run(toy_config("tiny_evaluate", resolution=SIZES, num_eval_images=12, per_gpu_capacity=1))
    assert one.judges.tower is None  # each prompt has one picture in each size, so that there is no diversity
    found, many = one.evaluator(), build_run(
        toy_config("tiny_evaluate", resolution=SIZES, num_eval_images=12, per_gpu_capacity=3)
    ).evaluator()  # fmt: skip
    assert found.sizes == ["24x16", "16x24", "16"] * 4 and many.sizes == found.sizes
    assert found.prompts[::3] == found.prompts[1::3] == found.prompts[2::3] and len(set(found.prompts)) == 4
    torch.testing.assert_close(found.rewards, many.rewards, rtol=0, atol=1e-5)
    means = found.row()["reward_by_size"]
    assert means == {name: pytest.approx(found.rewards[s::3].mean().item()) for s, name in enumerate(found.sizes[:3])}


def test_its_pictures_are_those_of_an_evaluation_in_one_size(toy_config):
    """The noise of picture j depends on j alone."""
    both = build_run(toy_config("tiny_evaluate", resolution="24x16,16", num_eval_images=4, max_vis_images=4))
    single = build_run(toy_config("tiny_evaluate", resolution="16", num_eval_images=4, max_vis_images=4))
    found, rollout = both.evaluator(), single.rollout
    for j in (1, 3):
        cond = single.model.encode_prompts([found.prompts[j]])
        latents = rollout(generators([j], both.config.seed, "evaluation"), cond, None)
        torch.testing.assert_close(found.images[j], single.model.decode(latents)[0], rtol=0, atol=1e-5)
    assert "reward_by_size" not in single.evaluator().row() and torch.is_tensor(single.evaluator().images)


def test_diversity_compares_pictures_of_one_size(toy_config):
    options = dict(resolution="24x16,16", num_eval_images=8, num_eval_prompts=2, max_vis_images=8)
    run = build_run(toy_config("tiny_evaluate", **options))
    found = run.evaluator()
    means = []
    for s in (0, 1):
        embeddings = run.judges.tower.embed_images(torch.stack(found.images[s::2]))
        means.append(diversity(embeddings, found.prompts[s::2]))
    assert found.measures["diversity"] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_each_size_has_as_many_pictures(toy_config):
    with pytest.raises(ConfigError, match=r"^num_eval_images = 4 is not a multiple of the 3 sizes of "):
        build_run(toy_config("tiny_evaluate", resolution=SIZES, num_eval_images=4))


def test_its_report_has_each_size(toy_config):
    folder = evaluate(toy_config("tiny_evaluate", resolution="24x16,16", num_eval_images=4, max_vis_images=4))
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    assert [row["size"] for row in rows] == ["24x16", "16"] * 2
    summary = json.loads((folder / "summary.json").read_text())
    means = {name: [float(row["reward"]) for row in rows if row["size"] == name] for name in ("24x16", "16")}
    assert {name: s["reward"]["mean"] for name, s in summary["per_size"].items()} == {
        name: pytest.approx(sum(values) / 2) for name, values in means.items()
    }
    assert [picture.width / picture.height for _, picture in read_grid(folder / "grid.png")] == [1.5, 1.0] * 2


@pytest.mark.parametrize("task", ["guide", "explore"])
def test_tasks_for_one_size_say_so(toy_config, task):
    with pytest.raises(ConfigError, match=rf"^resolution = '24x16,16' must be one size for task = '{task}'"):
        build_run(toy_config("tiny_evaluate", task=task, resolution="24x16,16"))


def test_a_model_of_ones_own_needs_to_know_other_sizes(toy_config):
    run = build_run(toy_config("tiny_evaluate"))
    own = type("Own", (), {"encode_prompts": 0, "predict": 0})()
    with pytest.raises(ConfigError, match=r"^resolution = '24x16,16' needs a model with `of_size`"):
        build_run(toy_config("tiny_evaluate", resolution="24x16,16"), model=own)
    for resolution in ("32x24", "16,32x24"):  # memory is planned for `run.model`
        mine = build_run(toy_config("tiny_evaluate", resolution=resolution), model=run.model)
        assert mine.model.latent_shape == mine.rollout.model.latent_shape == (4, 12, 16)


# ---- mistakes


def test_a_reward_is_tried_in_each_size(toy_config):
    def squares_only(images, prompts, metadata):
        if images.shape[2] != images.shape[3]:
            raise ValueError("not a square")
        return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match="not a square"):
        build_run(toy_config("tiny_evaluate", resolution="32,24x16"), squares_only)


def test_a_plan_checks_each_size(toy_config, pipeline_folder):
    with pytest.raises(ConfigError, match=r"^resolution = 17 must be a multiple of 4"):
        skeletons(resolve(toy_config(resolution="32,17"), 1))()


def test_a_run_says_its_sizes_and_how_they_are_written_changes_nothing(toy_config, capfd):
    assert resolve(toy_config(resolution=("16", "24x16")), 1).resolution == "24x16,16"
    model = StableDiffusion.load(toy_config().pretrained.model)
    build_run(toy_config("tiny_evaluate", resolution="16,24x16", prompt_fn="a"), model=model)
    assert "picture sizes, width x height: 24x16, 16x16" in "".join(capfd.readouterr())


def test_a_long_prompt_is_warned_of_once(toy_config, capfd):
    run = build_run(toy_config("tiny_evaluate", resolution="24x16,16"))
    for rollout in run.rollouts:
        rollout.model.encode_prompts([f"{rollout.model.latent_shape} " + "cat " * 100])
    assert "".join(capfd.readouterr()).count("prompts are truncated") == 1
