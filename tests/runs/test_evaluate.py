import csv
import json
import time

import pytest
import torch
from safetensors.torch import save_file

from alignprop.build import build_run
from alignprop.engine.seeding import generator, generators, seed_global
from alignprop.evaluation.judges import diversity
from alignprop.evaluation.pictures import save_image
from alignprop.evaluation.results import statistics, write_report
from alignprop.lora import kohya
from alignprop.lora.adapters import add_adapter, get_adapter, trained_parameters
from alignprop.lora.factors import add_lora, set_lora
from alignprop.lora.files import read_lora, save_lora
from alignprop.method.base_distance import chain_distance
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from alignprop.tasks import evaluate, evaluate_soup
from rewards import RewardError
from tests.helpers.training import save_random_lora, train


def pictures(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "images").iterdir())}


def test_the_same_pictures_and_scores_whatever_the_batch_size(toy_config):
    sizes = (dict(per_gpu_capacity=size, num_eval_images=5) for size in (1, 3))
    one, three = (build_run(toy_config("tiny_evaluate", **size)).evaluator() for size in sizes)
    assert one.prompts == three.prompts
    # Matrix products of another batch size round differently; the noise is the same.
    assert (one.images - three.images).abs().max() < 1e-5
    torch.testing.assert_close(one.rewards, three.rewards, rtol=0, atol=1e-5)


def test_prompts_repeat_with_other_noise(toy_config):
    found = build_run(toy_config(num_eval_images=8, max_vis_images=8)).evaluator()
    assert found.prompts[:4] == found.prompts[4:] and len(set(found.prompts)) == 4
    assert (found.images[0] - found.images[4]).abs().max() > 0.01


def test_some_prompts_are_chosen_and_repeat(toy_config):
    def order(**options):
        return build_run(toy_config(num_eval_images=6, **options)).evaluator.order

    whole = order(num_eval_prompts=None)
    assert sorted(whole[:4]) == [0, 1, 2, 3] and whole[4:] == whole[:2]
    assert order(num_eval_prompts=2) == whole[:2] * 3
    assert order(num_eval_prompts=4) == order(num_eval_prompts=9) == whole


def test_measures_do_not_depend_on_the_batch_size(toy_config, pipeline_folder, tmp_path):
    lora = read_lora(save_random_lora(pipeline_folder, tmp_path / "lora", 1))
    found = []
    for size in (1, 3, 10):
        options = dict(per_gpu_capacity=size, num_eval_images=10, num_eval_prompts=4, memory__decode_chunk=2)
        run = build_run(toy_config("tiny_evaluate", **options))
        set_lora(run.model.denoiser, lora)
        found.append(run.evaluator().measures)
    assert found[0].keys() == {"diversity", "base_distance"} and min(found[0].values()) > 1e-3
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[0], rel=1e-3)


def test_the_measures_are_those_of_the_pictures(toy_config, pipeline_folder, tmp_path):
    lora = read_lora(save_random_lora(pipeline_folder, tmp_path / "lora", 1))
    run = build_run(toy_config("tiny_evaluate", num_eval_images=10, num_eval_prompts=4, max_vis_images=10))
    set_lora(run.model.denoiser, lora)
    found = run.evaluator()
    expected = diversity(run.judges.tower.embed_images(found.images), found.prompts)
    assert found.measures["diversity"] == pytest.approx(expected, rel=1e-4)
    latents = run.rollout(generators(range(8), 0, "evaluation"), run.model.encode_prompts(found.prompts[:8]), None)
    cond, noise = run.model.encode_prompts(found.prompts[:8]), generators(range(8), 0, "base distance")
    expected = chain_distance(run.rollout, latents, cond, noise).mean().item()
    assert found.measures["base_distance"] == pytest.approx(expected, rel=1e-4)


def test_a_text_encoder_that_has_moved_is_at_a_distance_and_scales_too(toy_config, pipeline_folder, tmp_path):
    """A denoiser's adapter that is still zero beside one of the text encoder that is not."""
    model = StableDiffusion.load(str(pipeline_folder))
    add_adapter(model, 2, 2.0, None, seed=0, text_encoders=True)
    for name, parameter in trained_parameters(model).items():
        if "text_encoder" in name:
            parameter.data.normal_(0, 0.5, generator=generator(name))
    save_lora(model, get_adapter(model), tmp_path / "lora")

    def made(**options):
        folder = evaluate(toy_config("tiny_evaluate", **options))
        return pictures(folder), json.loads((folder / "summary.json").read_text()).get("base_distance")

    base, _ = made()
    moved, distance = made(resume_from=str(tmp_path / "lora"))
    assert moved != base and distance > 1e-4
    assert made(resume_from=str(tmp_path / "lora"), lora_scale=0.0) == (base, 0.0)


def test_what_is_not_there_is_not_measured(toy_config):
    assert build_run(toy_config(num_eval_images=4)).evaluator().measures == {}  # no prompt twice, no adapter
    run = build_run(toy_config(num_eval_images=8, eval_diversity=False, eval_base_distance=False))
    add_lora(run.model.denoiser, 2, 2.0, ("to_q",), seed=0)
    assert run.evaluator().measures == {}
    assert build_run(toy_config(num_eval_images=8)).evaluator().measures.keys() == {"diversity"}


def test_nothing_in_an_evaluation_draws_from_the_global_generators(toy_config):
    """They are seeded for a user's reward, and stay so."""
    run = build_run(toy_config(eta=1.0))
    seed_global(run.config.seed, "evaluation", 0)
    before = torch.random.get_rng_state()
    run.evaluator()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_report_files_agree_with_the_scores(toy_config, tmp_path):
    found = build_run(toy_config()).evaluator()
    summary = write_report(found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [float(r["tests.helpers.toy_rewards:contrast"]) for r in rows] == found.terms[
        "tests.helpers.toy_rewards:contrast"
    ].tolist()
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward"]["mean"] == pytest.approx(sum(float(r["reward"]) for r in rows) / 4)
    assert set(summary["per_prompt"]) == set(found.prompts)
    assert (tmp_path / "grid.png").exists()


def test_a_report_by_tags_weighs_each_tag_alike(toy_config, tmp_path):
    rows = [("a cat", "one"), ("a dog", "two"), ("an owl", "two"), ("a bee", None)]
    lines = [json.dumps({"prompt": prompt} | ({"tag": tag} if tag else {})) for prompt, tag in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    found = build_run(toy_config(eval_prompt_fn=str(tmp_path / "p.jsonl"))).evaluator()
    summary = write_report(found, tmp_path)
    score = dict(zip(found.prompts, found.rewards.tolist(), strict=True))
    one, two = score["a cat"], (score["a dog"] + score["an owl"]) / 2
    assert {tag: s["reward"]["mean"] for tag, s in summary["per_tag"].items()} == pytest.approx(
        {"one": one, "two": two}
    )
    assert {tag: s["reward"]["n"] for tag, s in summary["per_tag"].items()} == {"one": 1, "two": 2}
    assert summary["mean_of_tags"]["reward"] == pytest.approx((one + two) / 2)
    assert summary["mean_of_tags"].keys() == {"reward", *found.terms}
    assert len({one, two, score["a bee"]}) == 3 and json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_report_without_tags_has_none(toy_config, tmp_path):
    summary = write_report(build_run(toy_config()).evaluator(), tmp_path)
    assert not {"per_tag", "mean_of_tags", "per_size"} & summary.keys()


def test_scores_that_are_not_finite_are_null_and_told(toy_config, tmp_path, capsys):
    found = build_run(toy_config()).evaluator()
    found.rewards[0] = float("nan")
    write_report(found, tmp_path)

    def refuse(word):
        pytest.fail(f"{word} is no JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["reward"]["mean"] is None and summary["tests.helpers.toy_rewards:contrast"]["mean"] > 0
    told = capsys.readouterr().err
    assert "warning: " in told and "summary.json are not finite and were written as null: reward.mean" in told


def test_a_weighted_sum_and_its_terms(toy_config):
    config = toy_config(reward_fn="tests.helpers.toy_rewards:redness:2,tests.helpers.toy_rewards:contrast:0.5")
    found = build_run(config).evaluator()
    redness, contrast = (
        found.terms["tests.helpers.toy_rewards:redness"],
        found.terms["tests.helpers.toy_rewards:contrast"],
    )
    torch.testing.assert_close(found.rewards, 2 * redness + 0.5 * contrast)
    assert list(found.columns) == ["reward", "tests.helpers.toy_rewards:redness", "tests.helpers.toy_rewards:contrast"]


def test_a_single_reward_is_not_shown_twice(toy_config):
    assert list(build_run(toy_config()).evaluator().columns) == [
        "tests.helpers.toy_rewards:redness",
        "tests.helpers.toy_rewards:contrast",
    ]


def test_a_reward_that_is_trained_is_not_computed_again_as_an_extra(toy_config):
    run = build_run(toy_config(eval_reward_fn="tests.helpers.toy_rewards:redness,tests.helpers.toy_rewards:contrast"))
    assert list(run.judges.extra.terms) == ["tests.helpers.toy_rewards:contrast"]
    assert build_run(toy_config(eval_reward_fn="tests.helpers.toy_rewards:redness")).judges.extra is None


def test_a_reward_that_is_not_a_number_is_refused_in_evaluation(toy_config):
    with pytest.raises(RewardError, match=r"not_a_number.*non-finite"):
        build_run(toy_config(eval_reward_fn="tests.helpers.toy_rewards:not_a_number")).evaluator()


def test_statistics():
    assert statistics(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        {"mean": 2.5, "std": 1.2909944, "stderr": 0.6454972, "n": 4}
    )
    assert statistics(torch.tensor([3.0]))["stderr"] == 0.0


def test_evaluate_task_of_a_checkpoint_and_of_the_base(toy_config, pipeline_folder, tmp_path):
    lora = save_random_lora(pipeline_folder, tmp_path / "lora", 1)
    base = evaluate(toy_config("tiny_evaluate", run_name="base"))
    tuned = evaluate(toy_config("tiny_evaluate", run_name="tuned", resume_from=lora))
    assert len(pictures(base)) == 4 and pictures(base) != pictures(tuned)
    assert {p.name for p in tuned.iterdir()} == {"config.json", "images", "grid.png", "scores.csv", "summary.json"}
    again = evaluate(toy_config("tiny_evaluate", run_name="base"))
    assert again != base and pictures(again) == pictures(base)


def test_the_summary_has_the_measures(toy_config, pipeline_folder, tmp_path, capsys):
    lora = save_random_lora(pipeline_folder, tmp_path / "lora", 1)
    folder = evaluate(toy_config("tiny_evaluate", resume_from=lora, num_eval_images=8))
    summary = json.loads((folder / "summary.json").read_text())
    told = f"diversity {summary['diversity']:.4f}, base_distance {summary['base_distance']:.4f}"
    assert summary["base_distance"] > 0 and told in capsys.readouterr().out


def test_a_scaled_checkpoint_is_the_base_at_0_and_itself_at_1(toy_config, pipeline_folder, tmp_path):
    lora = save_random_lora(pipeline_folder, tmp_path / "lora", 1)

    def made(**options):
        return pictures(evaluate(toy_config("tiny_evaluate", run_name="x", **options)))

    base, tuned = made(), made(resume_from=lora)
    assert made(resume_from=lora, lora_scale=0.0) == base
    assert made(resume_from=lora, lora_scale=1.0) == tuned
    assert made(resume_from=lora, lora_scale=0.0, lora_schedule="linear") == base
    assert made(resume_from=lora, lora_schedule="linear") not in (base, tuned)
    assert made(resume_from=lora, lora_schedule="linear", num_inference_steps=1) == made(
        resume_from=lora, num_inference_steps=1
    )


def test_whole_weights_cannot_be_scaled(toy_config):
    checkpoint = str(train(toy_config(use_lora=False, num_epochs=1)).run.folder)
    for options in ({"lora_scale": 0.5}, {"lora_schedule": "linear"}):
        with pytest.raises(ConfigError, match=r"^lora_scale = .* must be 1 and 'constant'"):
            evaluate(toy_config("tiny_evaluate", run_name="x", resume_from=checkpoint, **options))


def test_the_evaluate_task_ends_when_everything_is_written(toy_config, monkeypatch, capsys):
    monkeypatch.setattr("alignprop.tasks.save_image", lambda *args: (time.sleep(0.05), save_image(*args)))
    folder = evaluate(toy_config("tiny_evaluate", run_name="base"))
    assert len(pictures(folder)) == 4 and (folder / "grid.png").exists()
    assert f"({folder})" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_ends_the_evaluate_task(toy_config, monkeypatch, capsys):
    def full(image, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("alignprop.tasks.save_image", full)
    with pytest.raises(OSError, match=r"No space left on device: .*000000\.png"):
        evaluate(toy_config("tiny_evaluate"))
    assert "base" not in capsys.readouterr().out


def test_the_last_picture_that_cannot_be_written_ends_the_soup_task(toy_config, monkeypatch, pipeline_folder, tmp_path):
    def full(image, path):
        if path.parts[-3:] == ("c_0", "images", "000003.png"):
            time.sleep(0.5)  # until there is nothing left to submit
            raise OSError(28, "No space left on device", str(path))
        save_image(image, path)

    monkeypatch.setattr("alignprop.tasks.save_image", full)
    lora = save_random_lora(pipeline_folder, tmp_path / "lora", 1)
    with pytest.raises(OSError, match=r"No space left on device: .*c_0"):
        evaluate_soup(toy_config("tiny_soup", run_name="soup", resume_from=lora, mixing_coef_1=(1.0, 0.0)))
    (folder,) = (tmp_path / "logs" / "soup" / "eval").iterdir()
    assert len(pictures(folder / "c_1")) == 4 and (folder / "c_1" / "grid.png").exists()
    assert not (folder / "c_0" / "grid.png").exists() and not (folder / "soup.json").exists()


@pytest.mark.parametrize("mode", ["delta", "factors"])
def test_soup_ends_are_the_checkpoints_pictures_exactly(toy_config, pipeline_folder, tmp_path, mode):
    first = save_random_lora(pipeline_folder, tmp_path / "first", 1)
    second = save_random_lora(pipeline_folder, tmp_path / "second", 2)
    folder = evaluate_soup(toy_config("tiny_soup", run_name="soup", resume_from=first, resume_from_2=second,
                                      mixing_coef_1=(1.0, 0.5, 0.0), soup_mode=mode))  # fmt: skip
    ends = [evaluate(toy_config("tiny_evaluate", run_name="x", resume_from=path)) for path in (first, second)]
    assert pictures(folder / "c_1") == pictures(ends[0])
    assert pictures(folder / "c_0") == pictures(ends[1])
    assert pictures(folder / "c_0.5") not in (pictures(ends[0]), pictures(ends[1]))
    results = json.loads((folder / "soup.json").read_text())
    assert [r["mixing_coef_1"] for r in results] == [1.0, 0.5, 0.0]
    assert (folder / "soup.png").exists()


def test_soup_with_the_base_model(toy_config, pipeline_folder, tmp_path):
    first = save_random_lora(pipeline_folder, tmp_path / "first", 1)
    folder = evaluate_soup(toy_config("tiny_soup", run_name="soup", resume_from=first, mixing_coef_1=(0.0,)))
    assert pictures(folder / "c_0") == pictures(evaluate(toy_config("tiny_evaluate", run_name="base")))


def test_a_file_in_kohyas_format_is_a_checkpoint_like_any_other(toy_config, pipeline_folder, tmp_path):
    own = save_random_lora(pipeline_folder, tmp_path / "own", 1)
    model, kohyas = StableDiffusion.load(str(pipeline_folder)), tmp_path / "kohya.safetensors"
    save_file(kohya.pack(read_lora(own).tensors, 1.0, model)[0], kohyas)
    options = dict(run_name="soup", resume_from=own, resume_from_2=str(kohyas), mixing_coef_1=(1.0, 0.0))
    soup = evaluate_soup(toy_config("tiny_soup", **options))
    assert pictures(soup / "c_0") == pictures(soup / "c_1")
    alone = evaluate(toy_config("tiny_evaluate", run_name="x", resume_from=str(kohyas)))
    assert pictures(alone) == pictures(soup / "c_1")


def test_soup_needs_a_checkpoint(toy_config):
    with pytest.raises(ConfigError, match="resume_from is empty"):
        evaluate_soup(toy_config("tiny_soup"))
