"""The trainers as a library: a person's own reward, prompts and hook, in TRL's conventions, and their mistakes."""

import itertools
import json
import random
import re
import runpy
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import alignprop
from alignprop.callbacks import PromptFunction, call_hook
from alignprop.ddpo import DDPOTrainer
from alignprop.engine.stopping import plain_endings
from alignprop.lora.files import LORA_FILE
from alignprop.prompts import draw_prompts
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.settings.fields import FIELDS
from alignprop.settings.resolve import flatten, resolve
from alignprop.trainer import AlignPropTrainer
from config.align_prop import get_config
from rewards import RewardError, as_reward
from scripts import alignprop_like_trl as like_trl
from tests.cli.test_main import ROOT
from tests.distributed.test_processes import assert_rows_agree, difference
from tests.helpers import warm
from tests.helpers.toy_rewards import redness
from tests.helpers.training import rows, weights

THINGS = ["a cat", "a dog", "two red circles", "a blue bird", "a tree"]
SMALL = {"eval_reward_fn": "", "eval_base_distance": False, "num_eval_images": 2, "num_epochs": 1}


def prompts_of_all_kinds():
    """A prompt from NumPy's generator, and metadata from Python's and torch's."""
    return np.random.choice(THINGS), {"weight": random.random(), "shift": torch.rand(()).item()}


class Reward:
    """Redness by TRL's convention, with metadata beside it; remembers what it saw with gradient, sample by sample."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, metadata):
        if torch.is_grad_enabled():
            self.seen += list(zip(prompts, (row.get("weight") for row in metadata), strict=True))
        return redness(images, prompts, metadata), {"anything": 1}


# ---- the package


def test_importing_the_package_costs_nothing():
    code = "import sys, alignprop; print('torch' in sys.modules, 'AlignPropTrainer' in dir(alignprop))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr


def test_it_has_what_it_names():
    for name in alignprop.__all__:
        assert getattr(alignprop, name).__name__ == name.replace("ddpo_", "")
    assert alignprop.AlignPropTrainer is AlignPropTrainer and alignprop.DDPOTrainer is DDPOTrainer
    assert alignprop.get_config("hps").algorithm == "align_prop"
    assert alignprop.get_ddpo_config("tiny").algorithm == "ddpo"
    with pytest.raises(AttributeError, match="AlignPropConfig"):
        _ = alignprop.AlignPropConfig


# ---- prompts


def test_a_sample_keeps_its_prompt_however_the_batch_is_cut():
    source = PromptFunction(prompts_of_all_kinds)
    whole = draw_prompts(source, 0, 3, range(8))
    assert len(set(whole[0])) > 2 and len({row["weight"] for row in whole[1]}) == 8
    assert all(type(prompt) is str for prompt in whole[0])  # a checkpoint could not hold NumPy's
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [6, 2]):
        random.random()
        assert draw_prompts(source, 0, 3, part) == tuple([found[j] for j in part] for found in whole)
    assert draw_prompts(source, 0, 4, range(8)) != whole and draw_prompts(source, 1, 3, range(8)) != whole


def test_nobody_else_notices_that_prompts_are_drawn():
    source = PromptFunction(prompts_of_all_kinds)

    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [numbers(), numbers()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = numbers()
    draw_prompts(source, 0, 0, range(3))
    with pytest.raises(ConfigError):
        PromptFunction(lambda: random.seed(5))
    assert [first, numbers()] == expected


def test_metadata_belongs_to_the_sample():
    row = {"count": 2}
    source = PromptFunction(lambda: ("two cats", row))
    draw_prompts(source, 0, 0, [0])[1][0]["count"] = 5
    assert draw_prompts(source, 0, 0, [0]) == (["two cats"], [{"count": 2}])
    assert draw_prompts(PromptFunction(lambda: ["a cat", None]), 0, 0, [0]) == (["a cat"], [{}])


def counts_calls():
    calls = itertools.count()
    return lambda: (f"cat number {next(calls)}", {})


def has_a_generator():
    own = np.random.default_rng(0)
    return lambda: (THINGS[own.integers(5)], {})


def ends():
    prompts = iter(THINGS[:3])
    return lambda: (next(prompts), {})


def fails():
    raise ValueError("first line\nsecond line")


BAD = [
    (lambda: "a cat", r"returned 'a cat', expected \(prompt, metadata\), such as \('a cat', {}\)$"),
    (lambda: "ab", "returned 'ab', expected"),
    (lambda: ("a cat", {}, 1), r"returned \('a cat', {}, 1\), expected"),
    (lambda: (1, {}), r"returned \(1, {}\), expected"),
    (lambda: (np.zeros((40, 40)), {}), "returned .{79}…, expected"),
    (lambda: None, "returned None, expected"),
    (THINGS, "failed: TypeError: 'list' object is not callable"),
    (fails, r"failed: ValueError: first line \(.*test_library\.py, line \d+\)$"),
    (ends(), "failed: StopIteration"),
    (counts_calls(), "gave 'cat number 0' and then 'cat number 8' from the same random numbers, so .*random.choice"),
    (has_a_generator(), "gave .* from the same random numbers"),
]


@pytest.mark.parametrize(("function", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_function_that_gives_no_prompts_is_refused_with_one_line(function, message):
    with pytest.raises(ConfigError, match=f"^prompt_function {message}") as caught:
        PromptFunction(function)
    assert "\n" not in str(caught.value)


def test_prompts_to_evaluate_on_may_be_the_functions_too(toy_config):
    source = PromptFunction(prompts_of_all_kinds)
    fixed = source.fixed(0, 64)
    assert sorted(fixed.prompts) == sorted(THINGS) and len(fixed.metadata) == len(fixed) == 5
    assert source.fixed(0, 64) == fixed and source.fixed(1, 64).metadata != fixed.metadata
    seen = []

    def reward(images, prompts, metadata):
        seen.extend(row["weight"] for row in metadata)  # which a prompt of a file does not have
        return redness(images, prompts, metadata)

    config = toy_config(**SMALL, eval_prompt_fn="prompt_function", num_eval_prompts=8)
    trainer = AlignPropTrainer(config, reward, prompts_of_all_kinds)
    trained_on = set(seen)
    found = trainer.run.evaluator()
    assert set(found.prompts) <= set(THINGS) and [row["weight"] for row in found.metadata] == seen[2:]
    assert trained_on <= {row["weight"] for row in source.fixed(0, 8).metadata}
    with pytest.raises(ConfigError, match="eval_prompt_fn = 'prompt_function' is not a prompt set"):
        AlignPropTrainer(config)


# ---- a run


def seen_by(reward, size):
    """What it saw, a set a step: processes and micro-batches take the samples of a step in another order."""
    parts = [reward.seen[first : first + size] for first in range(2, len(reward.seen), size)]  # 2 are the trial's
    return [sorted(part) for part in parts]


def test_the_micro_batch_changes_no_prompt(toy_config):
    found = []
    for capacity in (4, 2):
        reward = Reward()
        config = toy_config(**SMALL, run_name=f"c{capacity}", per_gpu_capacity=capacity)
        trainer = AlignPropTrainer(config, reward, prompts_of_all_kinds)
        random.seed(capacity), np.random.seed(capacity), torch.manual_seed(capacity)
        means = [trainer.step()["reward"] for _ in range(2)]
        found.append((seen_by(reward, 4), means))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 2 and found[0][0][0] != found[0][0][1]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_a_resumed_run_gets_the_same_prompts(toy_config):
    options = {**SMALL, "num_epochs": 2, "train__total_samples_per_epoch": 4}
    rewards = [Reward() for _ in range(3)]
    whole = AlignPropTrainer(toy_config(run_name="whole", **options), rewards[0], prompts_of_all_kinds)
    whole.train()
    half = toy_config(run_name="parts", **{**options, "num_epochs": 1})
    AlignPropTrainer(half, rewards[1], prompts_of_all_kinds).train()
    random.seed(5)
    again = toy_config(resume_from="latest", run_name="parts", **options)
    parts = AlignPropTrainer(again, rewards[2], prompts_of_all_kinds)
    assert parts.global_step == 1
    parts.train()
    whole_run, before, after = (seen_by(reward, 4) for reward in rewards)
    assert [*before, *after] == whole_run and len(before) == len(after) == 1
    assert torch.equal(weights(parts), weights(whole)) and rows(parts, "train") == rows(whole, "train")


def test_the_hook_gets_the_pictures_that_are_shown(toy_config, capsys):
    got = []

    def hook(data, global_step, tracker):
        got.append((global_step, tracker, deepcopy(data)))
        data["images"].zero_()  # they are the hook's own
        data["prompt_metadata"][0]["spoilt"] = True
        if global_step:
            raise OSError("no room\nfor it")

    config = toy_config(**{**SMALL, "num_eval_images": 4}, log_with="tensorboard")
    trainer = AlignPropTrainer(config, Reward(), prompts_of_all_kinds, image_samples_hook=hook)
    trainer.train()
    assert [step for step, *_ in got] == [0, 2]
    expected = trainer.run.evaluator()
    _, tracker, data = got[-1]
    assert tracker.name == "tensorboard" and data.keys() == {"images", "prompts", "prompt_metadata", "rewards"}
    assert data["images"].shape == (2, 3, 16, 16) and data["images"].dtype == torch.float32
    assert torch.equal(data["images"], expected.images) and 0 <= data["images"].min() < data["images"].max() <= 1
    assert data["prompts"] == expected.prompts[:2] and data["prompt_metadata"] == [{}, {}]
    assert torch.equal(data["rewards"], expected.rewards[:2].float()) and data["rewards"].shape == (2,)
    assert expected.metadata == [{}] * 4
    first, _ = torch.load(trainer.run.folder / "samples" / "before.pt", weights_only=True)
    assert torch.equal(first, got[0][2]["images"])
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if "image_samples_hook" in line]
    assert "warning: step 2: image_samples_hook failed, training goes on: OSError: no room (" in line
    assert (
        "reward_fn = 'tests.helpers.toy_rewards:redness' is not used: reward_function Reward takes its place\n"
        in told.out
    )
    assert "is not used: prompt_function prompts_of_all_kinds takes its place\n" in told.out
    saved = json.loads((trainer.run.folder / "config.json").read_text())
    named = "prompt_function prompts_of_all_kinds", "reward_function Reward"
    assert (saved["prompt_fn"], saved["reward_fn"]) == named
    assert [row["step"] for row in rows(trainer, "eval")] == [0, 2] and checkpoints_of(trainer.run.folder)


def test_without_a_tracker_the_hook_gets_none_and_stops_nothing_but_itself(capsys):
    evaluation = SimpleNamespace(
        images=torch.zeros(1, 3, 2, 2), prompts=["a", "b"], metadata=[{}, {}], rewards=torch.zeros(2)
    )
    call_hook(lambda data, step, tracker: tracker.log_images({}), evaluation, 7, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: step 7: image_samples_hook failed, training goes on: AttributeError")
    with pytest.raises(KeyboardInterrupt):
        call_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), evaluation, 7, None)


def test_ddpo_takes_the_same_functions(toy_config):
    options = dict(algorithm="ddpo", eta=1.0, train__total_samples_per_epoch=8, per_gpu_capacity=2)
    seen, told = [], {}

    def reward(images, prompts, metadata):
        seen.extend(prompts)
        return images.mean(dim=(1, 2, 3)), {}

    trainer = DDPOTrainer(toy_config(**SMALL, **options), reward, prompts_of_all_kinds, None, lambda *_: None)
    seen.clear()
    advantages = trainer.statistics.advantages
    trainer.statistics.advantages = lambda prompts, r: told.update(prompts=prompts) or advantages(prompts, r)
    assert trainer.step()["grad_norm"] > 0
    assert seen == told["prompts"] and set(seen) <= set(THINGS) and len(set(seen)) > 1


USERS_SCRIPT = """
import json
import sys

import numpy as np

import alignprop

ANIMALS = ["cat", "dog", "horse", "monkey", "rabbit"]


def reward_function(images, prompts, metadata):
    redness = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    return redness, {}


def prompt_function():
    return np.random.choice(ANIMALS), {}


def image_samples_hook(data, global_step, tracker):
    print("hook", global_step, *data["images"].shape, sep=",")


if __name__ == "__main__":
    with alignprop.plain_endings():
        config = alignprop.get_config("quickstart")
        config.update_from_flattened_dict(json.loads(sys.argv[1]))
        trainer = alignprop.AlignPropTrainer(
            config, reward_function, prompt_function, image_samples_hook=image_samples_hook
        )
        trainer.train()
"""


def test_a_persons_script_trains_the_same_on_two_processes(toy_config, tmp_path):
    script = tmp_path / "my_script.py"
    script.write_text(USERS_SCRIPT)
    theirs, ours = (flatten(c.to_dict()) for c in (get_config("quickstart"), toy_config(**SMALL, run_name="two")))
    fields = {name: value for name, value in ours.items() if value != theirs[name]}
    done = warm.call(script, json.dumps(fields), processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "hook" in line] == ["hook,0,2,3,16,16", "hook,2,2,3,16,16"]
    own = runpy.run_path(str(script))
    one = AlignPropTrainer(toy_config(**SMALL, run_name="one"), own["reward_function"], own["prompt_function"])
    one.train()
    folders = one.run.folder, one.run.folder.with_name("two")
    assert difference(*(load_file(checkpoints_of(folder)[-1] / LORA_FILE) for folder in folders)) == 0
    read = [list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())) for folder in folders]
    assert len(read[0]) == 4
    for ours, theirs in zip(*read, strict=True):
        assert_rows_agree(ours, theirs)


# ---- mistakes


@pytest.mark.parametrize(("answer", "message"), [
    (lambda images: (redness(images, [], [])[:, None], {}), r"returned shape \[2, 1\], expected \[2\]"),
    (lambda images: (redness(images, [], [])[:1], {}), r"returned shape \[1\], expected \[2\]"),
    (lambda images: (redness(images, [], []).tolist(), {}), r"returned list, expected a torch.Tensor"),
    (lambda images: (redness(images, [], []), {}, {}), r"returned tuple, expected a torch.Tensor"),
    (lambda images: ({}, redness(images, [], [])), r"returned dict, expected a torch.Tensor"),
    (lambda images: (redness(images.detach(), [], []), {}), "no gradient to follow"),
])  # fmt: skip
def test_a_reward_that_gives_no_scores_is_refused_with_one_line(answer, message):
    def my_reward(images, prompts, metadata):
        return answer(images)

    with pytest.raises(RewardError, match=f"^reward 'my_reward' .*{message}") as caught:
        as_reward(my_reward).score_terms(torch.rand(2, 3, 4, 4, requires_grad=True), ["a", "b"], [{}, {}])
    assert "\n" not in str(caught.value)


def test_scores_may_come_with_metadata_or_without():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    plain, pair = (as_reward(f)(images, ["a", "b"], [{}, {}]) for f in (redness, Reward()))
    assert torch.equal(plain, pair) and pair.requires_grad


@dataclass
class AlignPropConfig:
    num_epochs: int = 1


@pytest.mark.parametrize("trainer", [AlignPropTrainer, DDPOTrainer])
@pytest.mark.parametrize(("given", "message"), [
    ({"config": AlignPropConfig()}, r"^config is a AlignPropConfig; it must be what alignprop\.get_config"),
    ({"model": object()}, r"^model is a object, which has no encode_prompts or no predict; .* pretrained\.model"),
    ({"image_samples_hook": "print"}, "^image_samples_hook is a str, which cannot be called"),
    ({"prompt_function": lambda: "a cat"}, "^prompt_function returned 'a cat'"),
])  # fmt: skip
def test_what_cannot_be_meant_is_told_before_anything_is_loaded(toy_config, monkeypatch, trainer, given, message):
    monkeypatch.setattr("alignprop.loop.build_run", lambda *_, **__: pytest.fail("loading"))
    with pytest.raises(ConfigError, match=message):
        trainer(**{"config": toy_config(), **given})


def test_a_script_ends_with_one_line_for_a_mistaken_reward():
    with pytest.raises(SystemExit) as ended, plain_endings():
        raise RewardError("reward 'x' is wrong")
    assert ended.value.code == "error: reward 'x' is wrong"
    with pytest.raises(ValueError, match="of something else"), plain_endings():
        raise ValueError("of something else")


# ---- the script with TRL's flags


def like(*arguments, num_processes=1):
    return resolve(like_trl.configuration(list(arguments), num_processes), num_processes)


def test_flags_of_trl_become_ours():
    c = like()
    assert (c.estimator, c.truncated_backprop_minmax) == ("per_step", (0, 50))
    assert (c.loss, c.train.loss_coeff, c.grad_scale) == ("maximise", 1, 1)
    assert (c.guidance_scale, c.eta, c.train.adam_weight_decay, c.train.max_grad_norm) == (5.0, 1.0, 1e-4, 1.0)
    assert c.num_epochs == 100 and c.reward_fn == "aesthetic" and c.pretrained.revision is None
    c = like("--num_epochs=20", "--train_gradient_accumulation_steps", "4", "--train-batch-size=8", num_processes=4)
    assert (c.num_epochs, c.per_gpu_capacity, c.train.total_batch_size, c.train.steps_per_epoch) == (20, 8, 128, 1)
    assert c.train.gradient_accumulation_steps == 4
    c = like("--truncated_backprop_rand=False", "--truncated_backprop_timestep=40", "--mixed_precision=none")
    assert (c.estimator, c.trunc_backprop_timestep, c.mixed_precision) == ("truncated", 40, "no")
    c = like("--truncated_rand_backprop_minmax", "10", "50", "--use_lora", "False", "--no_allow_tf32", "--seed=3")
    assert (c.truncated_backprop_minmax, c.use_lora, c.allow_tf32, c.seed) == ((10, 50), False, False, 3)
    c = like("--config.per_gpu_capacity=auto", "--config.mixing_coef_1=0.5", "--config.lora_target_modules=to_q,to_v")
    assert (c.per_gpu_capacity, c.mixing_coef_1, c.lora_target_modules) == ("auto", (0.5,), ("to_q", "to_v"))
    c = like("--config.run_name=2026", "--config.train.learning_rate=1", "--sample_num_steps=7")
    assert (c.run_name, c.train.learning_rate, c.num_inference_steps) == ("2026", 1.0, 7)


def test_where_the_result_is_pushed_to():
    given = like_trl.make_parser().parse_args(["--push_to_hub", "--hf_hub_model_id=me/mine"])
    assert like_trl.translate(given, 1)["hub.repo"] == "me/mine"
    assert "hub.repo" not in like_trl.translate(like_trl.make_parser().parse_args(["--hf_hub_model_id=me/mine"]), 1)


@pytest.mark.parametrize(("flag", "message"), [
    ("--train_use_8bit_adam", "^--train_use_8bit_adam has no counterpart here: --config.train.optimizer=adafactor"),
    ("--negative_prompts=blurry", r"--config\.negative_prompt="),
    ("--tracker_kwargs={}", "WANDB_ENTITY"),
    ("--num_epoch=3", "^'--num_epoch=3' is not a flag; did you mean --num_epochs"),
    ("20", "^'20' is not a flag; fields of ours look like"),
    ("--config.seed", "^'--config.seed' is not a flag"),
    ("--num_epochs=ten", "--num_epochs.*'ten'"),
    ("--use_lora=maybe", "--use_lora.*'maybe' is neither true nor false"),
    ("--config.train.learning_rat=1", r"^train\.learning_rat is not a field .*did you mean 'train\.learning_rate'"),
    ("--config.train.learning_rate=fast", r"^train\.learning_rate = 'fast' must be a finite number greater than 0"),
    ("--sample_eta=2", "^eta = 2.0 must be a finite number at least 0 and at most 1"),
])  # fmt: skip
def test_flags_without_a_counterpart_are_one_line(flag, message):
    with pytest.raises(ConfigError, match=message) as caught:
        like(flag)
    assert "\n" not in str(caught.value)


def test_flags_that_change_no_result_are_passed_over(capsys):
    assert like("--tracker_project_name=stable_diffusion_training").task == "train"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --tracker_project_name has no effect: ")


def test_the_script_trains_the_bundled_model(tmp_path, capsys):
    tiny = ROOT / "alignprop" / "assets" / "tiny"
    like_trl.main([
        "--num_epochs=1", "--train_batch_size=2", "--sample_num_steps=2", "--mixed_precision=no", "--log_image_freq=1",
        f"--pretrained_model={tiny / 'pipeline'}", f"--logdir={tmp_path}", "--run_name=r",
        f"--hf_hub_aesthetic_model_filename={tiny / 'aesthetic.safetensors'}",
        f"--config.aesthetic.clip={tiny / 'clip'}", f"--config.clip.model={tiny / 'clip'}",
        "--config.num_eval_images=2", "--config.eval_base_distance=False",
    ])  # fmt: skip
    told = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in told] == [("eval", 0), ("train", 1), ("eval", 1)]
    assert told[1]["loss"] == pytest.approx(-told[1]["reward"]) and told[1]["samples"] == 2
    assert capsys.readouterr().out.count("best is ") == 2
    assert (checkpoints_of(tmp_path / "r")[-1] / LORA_FILE).exists()


# ---- the documents


def tables(name):
    """The rows of a document's tables: their first two cells."""
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row[:2] for row in found if row[1] not in ("here", "the same", "–")]


def names_in(text):
    return re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)?)(?: = [^`]*)?`", text)


@pytest.mark.parametrize("name", ["moving_from_trl.md", "moving_from_alignprop.md"])
def test_every_field_that_the_tables_name_exists(name):
    ours = [field for _, cell in tables(name) for field in names_in(cell)]
    assert len(ours) > 10 and not set(ours) - {*FIELDS, "hub.repo"}


def test_every_flag_of_the_script_is_in_the_table_and_means_what_it_says():
    text = (ROOT / "docs" / "moving_from_trl.md").read_text(encoding="utf-8")
    for flag in (*like_trl.SAME, *like_trl.CHANGED, *like_trl.MISSING, *like_trl.IDLE):
        assert f"`{flag}`" in text, flag
    said = {(flag, field) for theirs, cell in tables("moving_from_trl.md") for flag in names_in(theirs)
            for field in names_in(cell)}  # fmt: skip
    for flag, (_, field) in like_trl.SAME.items():
        assert (flag, field) in said or flag not in dict(said), flag
