"""scripts/bench/step_time.py: its arithmetic, its protocol with stand-ins, and our side of it; without TRL."""

import json
import os
import sys
import textwrap
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest
import torch

from alignprop.lora.factors import add_lora
from scripts.bench import step_time
from scripts.bench.ours_worker import build as build_ours
from scripts.bench.step_time import Case, check_alike, halves, measure, summary, table, trl_python
from scripts.bench.worker import Worker, WorkerError, blueness, noise_source, start_lora


def side(seconds, rewards=None, peaks=(100.0, 150.0), **facts):
    """What `measure` returns of one side; processor seconds are half of the others."""
    rewards = rewards or [0.5] * len(seconds)
    steps = [{"seconds": s, "cpu_seconds": s / 2, "reward": r} for s, r in zip(seconds, rewards, strict=True)]
    steps = [{**step, "peak_mib": peaks[1]} for step in steps]
    alike = {"parameters": 10, "trained": 2, "attention": "Plain", "versions": {"torch": "2"}}
    return {**alike, "peak_mib": peaks[0], "steps": steps, **facts}


# ---- arithmetic


def test_ratios_are_of_medians_and_of_pairs_without_the_first_step():
    sides = {"trl": side([90, 1, 2, 4, 10, 3]), "ours": side([1, 2, 1, 2, 40, 3])}
    times = summary(sides)["seconds"]
    assert times == {"trl": 3, "ours": 2, "ratio": 2 / 3, "range": [0.5, 4]}
    assert summary(sides)["cpu_seconds"] == {"trl": 1.5, "ours": 1, "ratio": 2 / 3, "range": [0.5, 4]}


def test_memory_is_before_the_first_and_after_the_last_step_and_rewards_are_of_all():
    sides = {"trl": side([1, 1], [1.0, 3.0], peaks=(5, 7)), "ours": side([1, 1], [2.0, 4.0], peaks=(6, 8))}
    found = summary(sides)
    assert found["mib"] == {"trl": [5, 7], "ours": [6, 8]}
    assert found["rewards"] == {"trl": [1, 3], "ours": [2, 4]}


@pytest.mark.parametrize(("values", "expected"), [([1, 3, 5, 9], [2, 7]), ([1, 3, 8], [2, 5.5]), ([4], [4, 4])])
def test_halves(values, expected):
    assert halves(values) == expected


def test_the_table_has_a_row_for_each_case_and_even_columns():
    results = {
        "short": summary({"trl": side([1, 2.0, 2.0]), "ours": side([1, 1.0, 1.5], peaks=(1, 12345))}),
        "a longer name": summary({"trl": side([1, 1.0], [0, -0.25]), "ours": side([1, 0.5])}),
    }
    header, rule, *rows = table(results).splitlines()
    assert len(rows) == 2 and len({len(line) for line in (header, rule, *rows)}) == 1
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert cells[:4] == ["short", "2.000", "1.250", "0.625 (0.50 … 0.75)"]
    assert cells[5:] == ["100 → 150", "1 → 12345", "+0.5000 → +0.5000", "+0.5000 → +0.5000"]
    assert "+0.0000 → -0.2500" in rows[1]


@pytest.mark.parametrize("fact", ["parameters", "trained", "versions"])
def test_sides_with_another_model_or_other_packages_are_refused(fact):
    check_alike({"trl": side([1]), "ours": side([1], attention="Other")})
    with pytest.raises(WorkerError, match=f"{fact} differ"):
        check_alike({"trl": side([1]), "ours": side([1], **{fact: 11})})


def test_sides_that_draw_other_pictures_are_refused():
    check_alike({"trl": side([1, 1], [0.5, 1]), "ours": side([1, 1], [0.50001, 2])})
    with pytest.raises(WorkerError, match=r"before the first update differ: 0\.5 in TRL's worker, 0\.51"):
        check_alike({"trl": side([1], [0.5]), "ours": side([1], [0.51])})


# ---- the protocol


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a worker module with this `build` and starts it with these settings."""

    def start(build: str, **settings):
        body = textwrap.dedent(build)
        source = f"from scripts.bench.worker import serve\n{body}\nif __name__ == '__main__':\n    serve(build)\n"
        (tmp_path / "stand_in.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Worker(sys.executable, "stand_in", settings)

    return start


COUNTING = """
    def build(settings):
        print("a library greets", flush=True)
        count = [settings["start"]]
        def step():
            print("and chats", flush=True)
            count[0] += 1
            block = bytearray(settings["mib"] << 20)
            block[::4096] = b"x" * len(block[::4096])
            return count[0]
        return step, {"colour": "blue"}
"""


def test_a_worker_makes_a_step_each_time_it_is_asked(stand_in):
    with stand_in(COUNTING, start=40, mib=64) as worker:
        assert worker.facts["colour"] == "blue"
        first, second = worker.step(), worker.step()
    assert (first["reward"], second["reward"]) == (41, 42)
    assert first["cpu_seconds"] > 0 and first["seconds"] > 0
    assert worker.facts["peak_mib"] < 60  # its own, and not what this process held when it started the other
    assert 62 < first["peak_mib"] - worker.facts["peak_mib"] < 80  # Linux counts some pages late
    assert second["peak_mib"] < first["peak_mib"] + 32  # the most so far, and not a sum


def test_seconds_are_of_the_wall_and_of_the_processor(stand_in):
    with stand_in("import time\nbuild = lambda settings: (lambda: time.sleep(0.3) or 1, {})") as worker:
        answer = worker.step()
    assert answer["seconds"] >= 0.3 > answer["cpu_seconds"]


def test_a_worker_that_fails_says_what_it_said(stand_in):
    with pytest.raises(WorkerError, match=r"(?s)stand_in ended with exit status 1:.*no such pipeline"):
        stand_in("def build(settings):\n    raise OSError('no such pipeline')")


def test_so_does_one_that_fails_in_a_step(stand_in):
    with stand_in("build = lambda settings: (lambda: 1 // settings['zero'], {})", zero=0) as worker:
        for _ in range(2):  # then it is gone
            with pytest.raises(WorkerError, match="ZeroDivisionError"):
                worker.step()


def test_no_worker_outlives_its_block(stand_in):
    with stand_in("import os\nbuild = lambda settings: (lambda: 1, {'pid': os.getpid()})") as worker:
        os.kill(worker.facts["pid"], 0)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.facts["pid"], 0)


def test_nor_one_that_was_interrupted_while_loading():
    started = []

    class Interrupted(Worker):
        def _answer(self):
            started.append(self._process)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(sys.executable, "timeit", {})
    assert started[0].poll() is not None


# ---- measuring


class FakeWorker:
    """Notes who was asked, in which order."""

    asked, closed, settings = [], [], {}

    def __init__(self, python, module, settings):
        self.name = module.rpartition(".")[2].partition("_")[0]
        self.settings[self.name] = (python, settings)
        self.facts = {k: v for k, v in side([]).items() if k != "steps"}

    def step(self):
        self.asked.append(self.name)
        return {"seconds": 1, "cpu_seconds": 1, "reward": 0.5, "peak_mib": 1}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed.append(self.name)


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(step_time, "Worker", FakeWorker)
    monkeypatch.setattr(step_time, "trl_python", lambda folder: "their python")
    monkeypatch.setattr(step_time, "make_problem", lambda: None)
    for name, empty in (("asked", []), ("closed", []), ("settings", {})):
        monkeypatch.setattr(FakeWorker, name, empty)


def test_sides_step_in_turn_and_neither_is_always_the_first(fake_workers):
    sides = measure(Case("some", 7, {"memory.keep_steps": 2}), 3, "their python")
    assert FakeWorker.asked == ["ours", "trl", "trl", "ours"] * 2
    assert len(sides["trl"]["steps"]) == len(sides["ours"]["steps"]) == 4
    common = {"problem": step_time.PROBLEM, "first_step": 7}
    assert FakeWorker.settings["trl"] == ("their python", common)
    assert FakeWorker.settings["ours"] == (sys.executable, {**common, "overrides": {"memory.keep_steps": 2}})
    assert sorted(FakeWorker.closed) == ["ours", "trl"]


def test_unlike_sides_are_found_after_one_pair(fake_workers, monkeypatch):
    init = FakeWorker.__init__

    def more_weights(self, python, module, settings):
        init(self, python, module, settings)
        self.facts["trained"] += self.name == "ours"

    monkeypatch.setattr(FakeWorker, "__init__", more_weights)
    with pytest.raises(WorkerError, match="trained differ: 2 in TRL's worker, 3 in ours"):
        measure(Case("some", 7), 5, "their python")
    assert len(FakeWorker.asked) == 2 and len(FakeWorker.closed) == 2


def test_the_command_prints_a_table_and_writes_every_measurement(fake_workers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--pairs", "5", "--json", str(tmp_path / "out.json")])
    step_time.main()
    printed = capsys.readouterr().out
    assert all(f"| {case.name}" in printed for case in step_time.CASES) and "trl==0.23.1" in printed
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert list(cases) == [case.name for case in step_time.CASES]
    for case in cases.values():
        assert case["summary"]["seconds"]["ratio"] == 1 and len(case["ours"]["steps"]) == 6


def test_too_few_pairs_are_refused(fake_workers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--pairs", "4"])
    with pytest.raises(SystemExit):
        step_time.main()
    assert "--pairs = 4 must be 5 or more" in capsys.readouterr().err


# ---- what is measured with


def installer(fails_at=None):
    """A stand-in for subprocess.run, and the commands that it was asked for."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if "venv" in command:
            os.makedirs(command[-1], exist_ok=True)
        failed = len(commands) - 1 == fails_at
        return SimpleNamespace(returncode=int(failed), stdout="collecting\n", stderr="no such version\n")

    return run, commands


def test_the_environment_is_made_once_with_our_versions(tmp_path):
    run, commands = installer()
    python = trl_python(tmp_path / "venv", run)
    assert python == trl_python(tmp_path / "venv", run) == tmp_path / "venv" / "bin" / "python"
    make, install = commands
    assert make[1:] == ["-m", "venv", str(tmp_path / "venv")]
    assert install[0] == str(python) and "trl==0.23.1" in install and "diffusers" in install
    assert install[install.index("--constraint") + 1].endswith("requirements.txt")


def test_it_is_made_again_where_other_versions_are_wanted(tmp_path, monkeypatch):
    run, commands = installer()
    trl_python(tmp_path / "venv", run)
    monkeypatch.setattr(step_time, "TRL", "trl==0.23.0")
    trl_python(tmp_path / "venv", run)
    assert len(commands) == 4 and "trl==0.23.0" in commands[-1]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_failed_installation_is_told_and_tried_again(tmp_path, fails_at):
    run, _ = installer(fails_at)
    with pytest.raises(SystemExit, match=r"(?s)failed:\ncollecting\nno such version"):
        trl_python(tmp_path / "venv", run)
    run, commands = installer()
    trl_python(tmp_path / "venv", run)
    assert len(commands) == 2


def test_the_problem_has_the_size_that_is_claimed(tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    monkeypatch.setitem(step_time.PROBLEM, "pipeline", str(tmp_path / "pipeline"))
    monkeypatch.setitem(step_time.PROBLEM, "prompt_file", str(tmp_path / "prompts.txt"))
    step_time.make_problem()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(3.15e6, rel=2e-3)
    assert unet.config.sample_size == 16
    assert (tmp_path / "prompts.txt").read_text() == step_time.PROBLEM["prompt"]


# ---- what both sides do alike


def test_noise_is_the_same_on_both_sides_and_new_in_every_step():
    denoiser = SimpleNamespace(config=SimpleNamespace(sample_size=8, in_channels=4))
    ours, theirs = noise_source(denoiser), noise_source(denoiser)
    first, second = ours(3), ours(3)
    assert first.shape == (3, 4, 8, 8) and not torch.equal(first, second)
    assert torch.equal(first, theirs(3)) and torch.equal(second, theirs(3))


def test_a_lora_starts_alike_whatever_the_order_of_its_layers():
    names = ["a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B", "c"]
    adapters = []
    for order in (names, names[::-1]):
        module = torch.nn.Module()
        for name in order:
            module.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.zeros(40, 50)))
        start_lora(module, rank=4)
        adapters.append(dict(module.named_parameters()))
    for name, parameter in adapters[0].items():
        assert torch.equal(parameter, adapters[1][name])
        assert parameter.std().item() == pytest.approx(0.25 if "lora_A" in name else 0, rel=0.1)
    assert not torch.equal(adapters[0]["a_lora_A"], adapters[0]["b_lora_A"])


def test_the_reward_is_blue_minus_red():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    scores = blueness(images)
    assert torch.allclose(scores, images[:, 2].mean(dim=(1, 2)) - images[:, 0].mean(dim=(1, 2)))
    scores.sum().backward()
    assert images.grad[:, 2].gt(0).all() and images.grad[:, 0].lt(0).all() and images.grad[:, 1].eq(0).all()


@pytest.fixture
def problem(pipeline_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    changed = {"pipeline": str(pipeline_folder), "prompt_file": str(tmp_path / "prompts.txt"), "prompt": "a cat"}
    return {**step_time.PROBLEM, **changed, "log_dir": str(tmp_path), "num_steps": 3, "batch_size": 2}


@pytest.fixture
def trainers(monkeypatch):
    """Those that our side makes."""
    from alignprop.trainer import AlignPropTrainer

    made = []

    def make(*args, **kwargs):
        made.append(AlignPropTrainer(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("scripts.bench.ours_worker.AlignPropTrainer", make)
    return made


def test_our_side_trains_on_the_problem(problem, trainers):
    rewards, weights = [], []
    for first_step, overrides in ((2, {}), (0, {}), (0, {"memory.keep_steps": 3})):
        step, facts = build_ours({"problem": problem, "first_step": first_step, "overrides": overrides})
        rewards.append([step(), step()])
        weights.append(torch.cat([p.detach().flatten() for p in trainers[-1].weights.parameters]))
        c = trainers[-1].config
        assert (c.train.total_batch_size, c.train.steps_per_epoch, c.guidance_scale) == (2, 1, 5.0)
        assert trainers[-1].run.choice.memory.keep_steps == overrides.get("memory.keep_steps", 0)
    assert facts["trained"] == len(weights[0]) and facts["parameters"] > facts["trained"] > 0
    assert facts["versions"]["torch"] == version("torch") and "AttnProcessor" in facts["attention"]
    last, full, kept = rewards
    assert last[0] == full[0] == kept[0] and last[0] != last[1]  # the same pictures before the first update
    assert torch.allclose(weights[1], weights[2], atol=1e-6) and not torch.allclose(weights[0], weights[1], atol=1e-6)


def test_our_side_uses_the_common_noise_and_lora(problem, trainers):
    build_ours({"problem": problem, "first_step": 2, "overrides": {}})
    model = trainers[0].run.model
    adapted = {name: p.clone() for name, p in model.denoiser.named_parameters() if "lora" in name}
    start_lora(model.denoiser, problem["lora_rank"])
    assert all(torch.equal(p, adapted[name]) for name, p in model.denoiser.named_parameters() if "lora" in name)
    expected = noise_source(model.denoiser)(2)
    assert torch.equal(model.init_latents([None, None]), expected)


# ---- TRL's side, with stand-ins for TRL


def test_their_side_gets_the_same_problem(problem, monkeypatch):
    made = {}

    class Pipeline:
        def __init__(self, name, use_lora):
            from diffusers import UNet2DConditionModel

            assert use_lora and name == problem["pipeline"]
            self.unet, self.sd_pipeline = UNet2DConditionModel.from_pretrained(f"{name}/unet"), SimpleNamespace()

        def set_progress_bar_config(self, disable):
            made["quiet"] = disable

    class Trainer:
        def __init__(self, config, reward_function, prompt_function, pipeline):
            made.update(config=config, pipeline=pipeline)
            self.reward, self.prompt, self.blue = reward_function, prompt_function, 0.0
            add_lora(pipeline.unet, 4, 4.0, ("to_q", "to_k"), seed=1)

        def step(self, epoch, global_step):
            assert self.prompt() == ("a cat", {})
            self.blue += 0.5
            images = torch.zeros(2, 3, 4, 4)
            images[0, 2] = self.blue
            scores, _ = self.reward(images, ["a cat"] * 2, [{}, {}])
            assert scores.tolist() == [self.blue, 0]

    trl = ModuleType("trl")
    trl.AlignPropConfig, trl.AlignPropTrainer = SimpleNamespace, Trainer
    trl.DefaultDDPOStableDiffusionPipeline = Pipeline
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.delitem(sys.modules, "scripts.bench.trl_worker", raising=False)
    from scripts.bench.trl_worker import build

    step, facts = build({"problem": problem, "first_step": 2})
    assert [step(), step()] == [0.25, 0.5] and made["quiet"]
    config, unet = made["config"], made["pipeline"].unet
    assert config.truncated_backprop_timestep == 2 and config.truncated_backprop_rand is False
    assert (config.train_batch_size, config.sample_num_steps, config.sample_eta) == (2, 3, problem["eta"])
    assert torch.equal(made["pipeline"].sd_pipeline.prepare_latents(2, 4, "ignored"), noise_source(unet)(2))
    assert facts["parameters"] == sum(p.numel() for p in unet.parameters()) > facts["trained"] > 0
    adapter = {name: p.clone() for name, p in unet.named_parameters() if "lora" in name}
    start_lora(unet, problem["lora_rank"])
    assert all(torch.equal(p, adapter[name]) for name, p in unet.named_parameters() if "lora" in name)
