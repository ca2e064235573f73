"""scripts/bench/time_to_reward.py and curves.py: arithmetic, the race with stand-ins, our side of it; without TRL."""

import json
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from alignprop.lora.factors import add_lora, get_lora
from alignprop.lora.files import read_lora
from config.align_prop import get_config
from scripts.bench import time_to_reward
from scripts.bench.curves import crossing, draw, summary, table
from scripts.bench.ours_tiny_worker import build as build_ours
from scripts.bench.time_to_reward import OBEDIENCE, SIDES, Referee, Side, check_alike, problem_of, race
from scripts.bench.worker import Worker, WorkerError


def curve(rewards, seconds=1.0):
    """Points `seconds` apart, 2 steps each; processor seconds are half of the others, obedience falls by 0.1 each."""
    return [
        {"steps": 2 * i, "seconds": i * seconds, "cpu_seconds": i * seconds / 2, "reward": r, "obedience": 1 - 0.1 * i}
        for i, r in enumerate(rewards)
    ]


# ---- arithmetic


def test_the_crossing_is_interpolated_in_every_number():
    found = crossing(curve([1, 2, 6, 7], seconds=10), 3)
    assert found == pytest.approx({"steps": 2.5, "seconds": 12.5, "cpu_seconds": 6.25, "reward": 3, "obedience": 0.875})


def test_it_is_the_first_one():
    assert crossing(curve([1, 3, 1, 5]), 2)["seconds"] == 0.5
    assert crossing(curve([1, 3]), 3)["seconds"] == 1


def test_there_may_be_none():
    assert crossing(curve([1, 2, 1]), 3) is None


def test_speedups_are_over_the_fastest_rival_in_medians_and_for_each_seed():
    curves = {
        "slow rival": [curve([0, 1], s) for s in (50, 60, 70)],
        "rival": [curve([0, 1], s) for s in (8, 10, 20)],
        "no rival": [curve([0, 1], s) for s in (1, 1, 1)],
        "ours": [curve([0, 1], s) for s in (4, 2, 2)],
    }
    found = summary(curves, ["slow rival", "rival"], 1)
    assert found["ours"]["speedup"] == {"seconds": [5, 2, 10], "cpu_seconds": [5, 2, 10]}
    assert found["rival"]["speedup"]["seconds"] == [1, 1, 1] and found["slow rival"]["speedup"]["seconds"][0] == 1 / 6
    assert found["ours"]["median"] == {"steps": 2, "seconds": 2, "cpu_seconds": 1, "reward": 1, "obedience": 0.9}


def test_who_does_not_arrive_with_every_seed_is_not_compared():
    curves = {"rival": [curve([0, 1])] * 2, "fast, once": [curve([0, 1], 0.1), curve([0, 0.5], 0.1)]}
    found = summary(curves, ["rival", "fast, once"], 1)
    late = found["fast, once"]
    assert late["median"] is late["speedup"] is None and late["reached"][1] is None
    assert found["rival"]["speedup"]["seconds"] == [1, 1, 1]
    assert summary(curves, ["fast, once"], 1)["rival"]["speedup"] is None  # nobody to compare with
    assert "| 1 of 2 | –     | –" in table(found)


def test_the_table_has_a_row_for_each_way():
    curves = {"TRL": [curve([0, 1], 30), curve([0, 1], 50)], "ours": [curve([0, 1], 5), curve([0, 1], 20)]}
    header, _, trl, ours = table(summary(curves, ["TRL"], 1)).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (header, trl, ours)]
    assert cells[0][:3] == ["way", "seeds", "steps"]
    assert cells[1] == ["TRL", "2 of 2", "2.0", "40.0 (30.0 … 50.0)", "20.0 (15.0 … 25.0)"] + (
        ["1.00 (1.00 … 1.00)"] * 2 + ["0.900"]
    )
    assert cells[2][3:6] == ["12.5 (5.0 … 20.0)", "6.2 (2.5 … 10.0)", "3.20 (2.50 … 6.00)"]


def test_curves_are_drawn(tmp_path, plots):
    draw({"ours": [curve([0, 1]), curve([0, 2])], "TRL": [curve([0, 3])]}, 1.0, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000


# ---- the race


class Runner:
    """A worker whose steps take `seconds`; notes its steps in `asked`."""

    def __init__(self, name, seconds, asked, **facts):
        self.name, self.seconds, self.asked, self.steps = name, seconds, asked, 0
        self.facts = {"parameters": 10, "trained": 2, "versions": {"torch": "2"}, **facts}

    def step(self):
        self.asked.append(self.name)
        self.steps += 1
        return {"seconds": self.seconds, "cpu_seconds": self.seconds / 2}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def judged(worker):
    return {"reward": worker.steps, "obedience": 1.0}


BASE = {"reward": 0.0, "obedience": 1.0}


def run_race(target, max_steps, **facts):
    asked = []
    workers = {Side("a", "trl", 2): Runner("a", 3, asked), Side("b", "ours", 3): Runner("b", 1, asked, **facts)}
    return race(workers, judged, BASE, target, max_steps), asked


def test_the_one_with_the_least_seconds_is_the_next(capsys):
    curves, asked = run_race(target=6, max_steps=99)
    assert "".join(asked) == "aa" + "bbb" + "bbb" + "aa" + "aa"  # at 6 seconds each, a is the first of the two
    assert [point["seconds"] for point in curves["a"]] == [0, 6, 12, 18]
    assert [point["cpu_seconds"] for point in curves["b"]] == [0, 1.5, 3]
    assert [point["steps"] for point in curves["b"]] == [0, 3, 6]
    assert "b: step 6, 6.0 s, 3.0 CPU s, reward 6.000, obedience 1.000" in capsys.readouterr().out


def test_nobody_trains_longer_than_allowed():
    curves, asked = run_race(target=99, max_steps=5)
    assert sorted(asked) == ["a"] * 5 + ["b"] * 5
    assert [point["steps"] for point in curves["a"]] == [0, 2, 4, 5]


@pytest.mark.parametrize("fact", ["parameters", "trained", "versions"])
def test_unlike_sides_do_not_race(fact):
    with pytest.raises(WorkerError, match=f"{fact} differ: .* in 'a', 11 in 'b'"):
        run_race(6, 9, **{fact: 11})
    check_alike({"a": {"parameters": 1, "trained": 1, "versions": 1, "attention": "x"}})


# ---- the command


@pytest.fixture
def stand_ins(monkeypatch):
    """The command with stand-ins for workers and referee; returns what workers were started with."""
    started = []

    class Fake(Runner):
        def __init__(self, python, module, settings):
            started.append((str(python), module, settings))
            super().__init__(module, 1.0 if "trl" in module else 0.1, [])

        def save(self, folder):
            (Path(folder) / "steps").write_text(str(self.steps))

    class FakeReferee:
        def __init__(self, config):
            assert config.task == "evaluate" and config.num_eval_images == 48 and config.num_inference_steps == 20
            assert config.eval_reward_fn == OBEDIENCE

        def __call__(self, folder):
            return {"reward": 34.0 + (int((folder / "steps").read_text()) if folder else 0), "obedience": 0.5}

    monkeypatch.setattr(time_to_reward, "Worker", Fake)
    monkeypatch.setattr(time_to_reward, "Referee", FakeReferee)
    monkeypatch.setattr(time_to_reward, "trl_python", lambda folder: "their python")
    return started


def test_the_command_compares_writes_and_draws(stand_ins, monkeypatch, tmp_path, capsys):
    files = {"--json": tmp_path / "out.json", "--figure": tmp_path / "out.svg"}
    words = [str(word) for pair in files.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["time_to_reward.py", "--seeds", "5", "6", *words])
    time_to_reward.main()
    printed = capsys.readouterr().out
    assert all(f"| {side.name} " in printed for side in SIDES) and "reward of 36.5; trl==0.23.1" in printed
    sides = json.loads(files["--json"].read_text())["sides"]
    assert list(sides) == [side.name for side in SIDES]
    for side in SIDES:
        times = sides[side.name]["speedup"]["seconds"]
        assert times == pytest.approx([10 if side.of == "ours" else 1] * 3)
        assert [len(c) for c in sides[side.name]["curves"]] == [len(range(0, 3, side.every)) + 1] * 2
    assert [settings["seed"] for *_, settings in stand_ins] == [5] * len(SIDES) + [6] * len(SIDES)
    for (python, module, settings), side in zip(stand_ins, SIDES, strict=False):
        assert (python == "their python") == ("trl" in module) == ("trl" in side.of) == ("problem" in settings)
        assert settings.get("overrides", {}) == side.overrides and settings.get("preset", "") == side.preset
    assert files["--figure"].exists()


def test_a_target_that_the_base_model_has_is_refused(stand_ins, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["time_to_reward.py", "--target", "34"])
    with pytest.raises(SystemExit, match=r"--target = 34\.0 must be above the base model's 34\.000"):
        time_to_reward.main()


def test_our_fields_exist_and_theirs_say_the_same():
    c = get_config("quickstart_fast")
    theirs = time_to_reward.FAST_IN_TRL
    assert theirs["sample_num_steps"] == c.train.num_inference_steps
    assert c.estimator == "full" and theirs["truncated_backprop_timestep"] == 0
    given = [side.overrides for side in time_to_reward.SIDES if side.of == "trl, ours"]
    assert len(given) > 1 and all(overrides.items() >= theirs.items() for overrides in given)
    rates = [overrides["train_learning_rate"] for overrides in given]
    assert c.train.learning_rate == max(rates)  # which is ours in the first step, and falls afterwards
    assert c.lora_initialization == "gaussian" and c.lora_alpha is None  # as TRL's


# ---- both sides and the referee on a random-weight model


STAND_IN = """
    from pathlib import Path
    from scripts.bench.worker import serve
    def build(settings):
        count = []
        def step():
            count.append(1)
            return len(count)
        return step, {}, lambda folder: Path(folder, "saved").write_text(str(len(count)))
    if __name__ == "__main__":
        serve(build)
"""


def test_a_worker_saves_where_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "a folder"
    folder.mkdir()
    with Worker(sys.executable, "stand_in", {}) as worker:
        worker.step()
        worker.save(folder)
        assert (folder / "saved").read_text() == "1"
        assert worker.step()["reward"] == 2


@pytest.fixture
def toy_presets(toy_config, monkeypatch):
    """Presets are the toy ones wherever our side asks for them, with large steps."""
    make = lambda name: toy_config(name, num_inference_steps=3, train__learning_rate=0.1)  # noqa: E731
    monkeypatch.setattr("scripts.bench.ours_tiny_worker.get_config", make)
    return toy_config


def test_the_referee_judges_what_our_side_saved(toy_presets, tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_reward, "OBEDIENCE", "tests.helpers.toy_rewards:contrast")
    settings = {"seed": 3, "log_dir": str(tmp_path), "preset": "quickstart"}
    step, facts, save = build_ours(settings)
    assert facts["parameters"] > facts["trained"] > 0
    referee = Referee(toy_presets(task="evaluate"))
    base = referee(None)
    assert set(base) == {"reward", "obedience", "tests.helpers.toy_rewards:redness"}
    save(str(tmp_path / "lora"))
    assert referee(tmp_path / "lora") == base  # B is zero
    step()
    save(str(tmp_path / "lora"))
    trained = referee(tmp_path / "lora")
    assert trained["reward"] != base["reward"] and trained["obedience"] != base["obedience"]
    assert referee(None) == base


def test_our_side_has_its_own_seed_and_fields(toy_presets, tmp_path, monkeypatch):
    made = []
    trainer = SimpleNamespace(run=SimpleNamespace(model=SimpleNamespace(denoiser=None)), step=lambda: {"reward": 7})
    monkeypatch.setattr("scripts.bench.ours_tiny_worker.AlignPropTrainer", lambda c: made.append(c) or trainer)
    monkeypatch.setattr("scripts.bench.ours_tiny_worker.facts_of", lambda denoiser: {})
    step, *_ = build_ours({"seed": 3, "log_dir": "some", "preset": "quickstart_fast"})
    assert step() == 7
    assert (made[0].seed, made[0].log_dir, made[0].estimator) == (3, "some", "full")
    assert (made[0].train.sampler, made[0].train.num_inference_steps) == ("UniPCMultistep", 3)


@pytest.fixture
def trl(monkeypatch):
    """Stand-ins for TRL; returns what was made with them."""
    made = {}

    class Pipeline:
        def __init__(self, name, use_lora):
            from diffusers import UNet2DConditionModel

            assert use_lora
            self.unet = UNet2DConditionModel.from_pretrained(f"{name}/unet")

        def set_progress_bar_config(self, disable):
            made["quiet"] = disable

        def save_checkpoint(self, models, weights, folder):
            from diffusers import StableDiffusionPipeline
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(models[0]))
            StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)

    class Config(SimpleNamespace):
        truncated_backprop_rand, sample_num_steps, train_learning_rate = True, 50, 1e-3

    class Trainer:
        def __init__(self, config, reward_function, prompt_function, pipeline):
            made.update(config=config, pipeline=pipeline, prompts=[])
            self.reward, self.prompt = reward_function, prompt_function
            add_lora(pipeline.unet, 4, 4.0, ("to_q", "to_k", "to_v", "to_out.0"), seed=1)

        def step(self, epoch, global_step):
            prompts, metadata = zip(*(self.prompt() for _ in range(2)), strict=True)
            made["prompts"] += prompts
            images = torch.zeros(2, 3, 8, 8)
            images[0, 0] = len(made["prompts"]) / 10
            made["scores"] = self.reward(images.requires_grad_(), prompts, metadata)[0]

    module = ModuleType("trl")
    module.AlignPropConfig, module.AlignPropTrainer = Config, Trainer
    module.DefaultDDPOStableDiffusionPipeline = Pipeline
    monkeypatch.setitem(sys.modules, "trl", module)
    monkeypatch.delitem(sys.modules, "scripts.bench.trl_tiny_worker", raising=False)
    return made


def start_trl(toy_config, tmp_path, seed=3, **overrides):
    from scripts.bench.trl_tiny_worker import build

    prompts = tmp_path / "their prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(10)))
    problem = problem_of(toy_config(num_inference_steps=3)) | {"prompt_file": str(prompts)}
    return build({"seed": seed, "problem": problem, "overrides": overrides})


def test_their_side_gets_our_problem_and_its_own_defaults(trl, toy_config, tmp_path):
    step, facts, _ = start_trl(toy_config, tmp_path)
    config = trl["config"]
    assert (config.seed, config.sample_num_steps, config.sample_guidance_scale) == (3, 3, 3.0)
    assert (config.train_batch_size, config.sample_eta, config.mixed_precision) == (4, 0.0, "no")
    assert config.truncated_rand_backprop_minmax == (0, 3) and config.train_learning_rate == 1e-3
    assert trl["quiet"] and facts["parameters"] > facts["trained"] > 0
    first = step()
    assert trl["scores"].requires_grad and first == pytest.approx(trl["scores"].mean().item())
    assert step() > first  # of this step's pictures alone


def test_overrides_change_their_side(trl, toy_config, tmp_path):
    fast = {"sample_num_steps": 2, "truncated_backprop_rand": False, "truncated_backprop_timestep": 0}
    start_trl(toy_config, tmp_path, **fast)
    assert {name: getattr(trl["config"], name) for name in fast} == fast
    assert not hasattr(trl["config"], "truncated_rand_backprop_minmax")


def test_their_prompts_are_drawn_by_the_seed(trl, toy_config, tmp_path):
    drawn = []
    for seed in (3, 3, 4):
        step, *_ = start_trl(toy_config, tmp_path, seed=seed)
        for _ in range(5):
            step()
        drawn.append(trl["prompts"])
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 3


def test_the_referee_judges_what_their_side_saved(trl, toy_config, tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_reward, "OBEDIENCE", "tests.helpers.toy_rewards:contrast")
    *_, save = start_trl(toy_config, tmp_path)
    unet = trl["pipeline"].unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save(str(tmp_path / "theirs"))
    saved, own = read_lora(tmp_path / "theirs"), get_lora(unet)
    assert saved.scale == own.scale == 1 and saved.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in saved.tensors.items())
    referee = Referee(toy_config(task="evaluate"))
    assert referee(tmp_path / "theirs") != referee(None)
