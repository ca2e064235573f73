"""Which memory policy is chosen, by forecasts that are made up; real ones are tested in runs/test_forecast.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from alignprop.evaluation.judges import Judges
from alignprop.memory import gpus, planner
from alignprop.memory.gpus import GPUS, LAUNCH, SHARE, Gpu, seconds_per_sample
from alignprop.memory.planner import GIB, Forecast, candidates, choose_policy, fastest_for, table
from alignprop.models.sd import StableDiffusion
from alignprop.settings.command_line import KNOWN_GPUS
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import resolve
from alignprop.tasks import plan
from rewards import as_reward, build_reward


def of_size(gib):
    def forecast(parts, config, policy, memory, capacity, done):
        return Forecast(policy, capacity, {"sweep": gib(policy, capacity) * GIB}, 1e12)

    return forecast


@pytest.fixture
def accelerator():
    return SimpleNamespace(
        device=torch.device("cuda"), num_processes=1, distributed_type=DistributedType.NO
    )  # nothing is done with the device but to look at its name


REWARD = Judges(build_reward("tests.helpers.toy_rewards:redness"))
SIZES = {"roomy": 90.0, "fast": 20.0, "lean": 12.0, "balanced": 8.0, "small": 5.0, "smallest": 3.0, "streaming": 1.0}


@pytest.mark.parametrize(("gpu", "chosen"), [
    (100, "roomy"), (24, "fast"), (21, "lean"), (12, "balanced"), (6.3, "small"), (4.5, "smallest"), (2, "streaming"),
    (1, "streaming"),
])  # fmt: skip
def test_the_fastest_that_fits_is_chosen(toy_config, accelerator, monkeypatch, gpu, chosen):
    monkeypatch.setattr(planner, "forecast", of_size(lambda policy, capacity: SIZES[policy]))
    monkeypatch.setattr(planner, "gpu_bytes", lambda: gpu * GIB)
    said = []
    assert choose_policy(resolve(toy_config(), 1), None, REWARD, accelerator, said.append)[::2] == (chosen, 2)
    assert chosen in said[-1].splitlines()[-1]


def test_the_largest_capacity_that_fits_and_divides_the_batch(toy_config, accelerator, monkeypatch):
    monkeypatch.setattr(planner, "gpu_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(planner, "forecast", of_size(lambda policy, capacity: 2 * capacity))
    config = resolve(toy_config(per_gpu_capacity="auto", memory_policy="fast", train__total_batch_size=8), 1)
    assert choose_policy(config, None, REWARD, accelerator, lambda text: None)[::2] == ("fast", 4)
    assert [n for _, _, n in candidates(config, 2, ("fast",))] == [4, 2, 1]
    assert [n for _, _, n in candidates(config, 2, ("roomy",))] == [4]


def test_without_a_gpu_there_is_nothing_to_plan(toy_config, accelerator, monkeypatch):
    monkeypatch.setattr(planner, "forecast", lambda *arguments: pytest.fail("planned"))
    accelerator.device = torch.device("cpu")
    assert choose_policy(resolve(toy_config(), 1), None, REWARD, accelerator, None)[::2] == ("fast", 2)
    accelerator.distributed_type = DistributedType.FSDP
    assert choose_policy(resolve(toy_config(), 1), None, REWARD, accelerator, None)[::2] == ("balanced", 2)


def test_a_users_own_reward_is_not_called_without_data(toy_config, accelerator, monkeypatch, pipeline_folder):
    """It may look at values, which there are none of, or keep tensors of its own, which would lose theirs."""
    model, said = StableDiffusion.load(str(pipeline_folder)), []

    def reward(images, prompts, metadata):
        pytest.fail("called")

    monkeypatch.setattr(planner, "gpu_bytes", lambda: 10 * GIB)
    config = resolve(toy_config(), 1)
    assert choose_policy(config, model, Judges(as_reward(reward)), accelerator, said.append)[::2] == ("roomy", 2)
    assert "fits" in said[-1]


def test_a_model_that_cannot_be_planned_still_runs(toy_config, accelerator, monkeypatch):
    monkeypatch.setattr(planner, "gpu_bytes", lambda: 10 * GIB)
    said = []
    assert choose_policy(resolve(toy_config(), 1), object(), REWARD, accelerator, said.append)[::2] == ("balanced", 2)
    assert "could not be forecast (AttributeError" in said[-1]


def test_evaluating_needs_no_trained_adapter(toy_config, accelerator):
    accelerator.device = torch.device("cpu")
    config = resolve(toy_config("tiny_evaluate", memory_policy="small", use_lora=False), 1)
    assert choose_policy(config, None, REWARD, accelerator, None)[::2] == ("small", 2)


def test_what_a_person_sets_is_in_every_candidate(toy_config):
    config = resolve(toy_config(memory__sweep_chunk=3, memory__lean=True), 1)
    found = candidates(config, 1)
    assert [name for name, _, _ in found] == list(POLICIES)
    assert all(memory == replace(POLICIES[n], sweep_chunk=3, lean=True) for n, memory, _ in found)


def test_policies_that_move_modules_are_not_for_whole_denoisers_nor_for_kept_graphs(toy_config):
    whole = candidates(resolve(toy_config(use_lora=False), 1), 1)
    assert [n for n, _, _ in whole] == ["roomy", "fast", "lean", "balanced"]
    assert [n for n, _, _ in candidates(resolve(toy_config(memory__keep_steps=1), 1), 1)][-1] == "balanced"
    assert [n for n, _, _ in candidates(resolve(toy_config(), 1), 1)][-1] == "streaming"
    assert [n for n, _, _ in candidates(resolve(toy_config(compile=True), 1), 1)][-1] == "smallest"


def test_fitting_leaves_room_for_what_is_not_counted():
    small = Forecast("x", 1, {"encode": GIB, "sweep": 10 * GIB}, 1.0)
    assert (small.peak, small.phase) == (10 * GIB, "sweep")
    assert small.fits(11.7 * GIB) and not small.fits(11.5 * GIB)


def test_the_table_has_a_line_for_each():
    forecasts = [Forecast("small", 2, {"decode": 3 * GIB}, 2e12), Forecast("fast", 4, {"sweep": 9 * GIB}, 1e12)]
    lines = table(forecasts, 8, 4.5 * GIB).splitlines()[1:]
    assert [line.split()[:6] for line in lines] == [
        ["small", "2", "3.00", "decode", "2", "16"], ["fast", "4", "9.00", "sweep", "1", "8"],
    ]  # fmt: skip
    assert lines[0].endswith("  fits") and lines[1].endswith("does not fit")


def test_the_table_has_what_moves_and_the_seconds_on_a_named_gpu():
    f = Forecast("streaming", 1, {"decode": GIB}, 1e12, operators=1e5, moved=GIB, streamed=2 * GIB)
    head, line = table([f], 8, None, GPUS["4090"]).splitlines()
    assert head.split()[-2:] == ["moved/sample", "s/sample"]
    assert line.split()[-2:] == ["3", f"{seconds_per_sample(f, GPUS['4090']):.3g}"]
    assert table([f], 8, None).splitlines()[0].split()[-1] == "moved/sample"


def test_a_step_waits_for_the_slowest_of_host_matrix_units_and_bus():
    gpu = Gpu(gib=8.0, flops=1e12, bus=1e9)
    step = Forecast("x", 1, {"sweep": GIB}, flops=6e11, operators=1e4, moved=1e8, streamed=5e8)
    assert seconds_per_sample(step, gpu) == pytest.approx(6e11 / (SHARE * 1e12) + 0.1)
    assert seconds_per_sample(replace(step, operators=1e6), gpu) == pytest.approx(1e6 * LAUNCH + 0.1)
    assert seconds_per_sample(replace(step, streamed=5e9), gpu) == pytest.approx(5.0 + 0.1)


def test_a_gpu_is_measured_by_the_fastest_of_some_trials(monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25, 30.0, 31.0, 40.0, 41.0, 50.0, 51.0] * 2)
    monkeypatch.setattr(gpus.time, "perf_counter", lambda: next(clock))
    found = gpus.measure(torch.device("cpu"), 8.0, torch.float32, side=64, copied=1000)
    assert found == Gpu(8.0, 2 * 64**3 / 0.25, 1000 / 0.25)


def test_the_measured_pace_is_that_of_the_device():
    found = gpus.measure(torch.device("cpu"), 8.0, torch.float32, side=256, copied=10**6)
    assert 1e7 < found.flops < 1e13 and 1e7 < found.bus < 1e12


def test_the_plan_measures_the_gpu_of_this_machine_only_if_no_other_is_named(toy_config, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(plan, "gpu_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(plan, "measure", lambda *args: measured.append(args) or Gpu(8.0, 1e12, 2e9))
    config = toy_config(memory_policy="lean")
    plan.compare_policies(config)
    said = capsys.readouterr().out
    assert measured == [(torch.device("cuda"), 8.0, torch.float32)]
    assert "This GPU, measured: 1 TFLOP/s in float32, 2 GB/s from the host" in said
    assert "s/sample" in said and "The fastest that fits 8 GiB" in said
    plan.compare_policies(config, gpu_memory=6)
    plan.compare_policies(config, gpu="4090")
    assert len(measured) == 1


def test_the_command_line_knows_the_gpus():
    assert tuple(GPUS) == KNOWN_GPUS


def test_the_fastest_policy_for_each_size_of_a_gpu():
    forecasts = [Forecast(p, 2, {"sweep": size * GIB}, 1.0) for p, size in (("fast", 20), ("small", 7), ("x", 6))]
    assert fastest_for(forecasts, (4, 8, 24, 80)) == (
        "The fastest by the GiB of a GPU: 4: none, 8: x, 24: fast, 80: fast"
    )
    forecasts.append(Forecast("x", 1, {"sweep": 2 * GIB}, 1.0))
    assert fastest_for(forecasts, (4, 8)) == "The fastest by the GiB of a GPU: 4: x with 1, 8: x with 2"
