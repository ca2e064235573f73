"""scripts/bench/cost.py: the reference against real tensors and against every step of a chain, and its arithmetic."""

import json
import sys

import pytest
import torch

from alignprop.lora.factors import trainable_parameters
from alignprop.memory.accounting import Account
from alignprop.memory.forecast import GIB, forecast
from alignprop.memory.planner import skeletons
from alignprop.models.configs import folder_config
from alignprop.models.skeleton import random_model
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import resolve
from config.align_prop import TINY
from rewards import as_reward
from scripts.bench import cost
from scripts.bench.cost import THEIRS, Row, Theirs, table, their_step
from tests.helpers.tiny_families import TINY as FAMILIES
from tests.helpers.toy_rewards import redness


@pytest.fixture
def config():
    c = cost.configuration(str(TINY / "pipeline"), 2, 1)
    c.lora_rank = 32  # so that gradients weigh something beside a small model
    return resolve(c, 1)


@pytest.fixture
def facts(pipeline_folder):
    return {"sd": folder_config(pipeline_folder), "sdxl": FAMILIES["sdxl"]}


def step(facts, config, device, samples, steps, active, model=None):
    model = model or random_model(facts, torch.float32, device)
    with torch.device(device):
        idle = torch.nn.Linear(256, 384)
    return their_step(model, as_reward(redness).to(device), [idle], config, samples, steps, active)


# ---- theirs


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_their_step_costs_the_same_on_meta_as_in_reality(facts, config, family):
    real, planned = (step(facts[family], config, device, 2, 3, 2) for device in ("cpu", "meta"))
    assert planned.peaks == real.peaks and planned.flops == real.flops
    assert real.flops["backward"] > 2 * real.flops["denoise"] / 3 > 0


SHALLOW = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [8], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"], "mid_block_type": None,
    "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip


def test_a_few_steps_say_what_all_of_them_cost(facts, config):
    shallow = {**facts["sd"], "denoiser": SHALLOW}
    theirs = Theirs(lambda *n: step(shallow, config, "meta", 1, *n))
    for steps, active in ((9, 1), (9, 2), (9, 8), (20, 20)):
        real = step(shallow, config, "meta", 1, steps, active)
        assert theirs.flops(steps, active) == sum(real.flops.values())
        assert theirs.peaks(steps, active) == real.peaks
        longer = theirs.peaks(steps + 1, active)
        assert longer["denoise"] - real.peaks["denoise"] == 4 * 4 * 8 * 8, "the latents of every step are kept"


def test_they_call_the_network_once_for_each_step_and_once_more_for_each_with_gradient(facts, config):
    model, calls = random_model(facts["sd"], torch.float32, "cpu"), []
    model.denoiser.register_forward_pre_hook(lambda module, args: calls.append((len(args[0]), torch.is_grad_enabled())))
    step(None, config, "cpu", 2, steps=5, active=2, model=model)
    assert calls == [(4, True)] * 7  # both branches of guidance at once, always with a graph
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trainable_parameters(model.denoiser).values())


def test_whatever_lies_on_the_device_counts(facts, config):
    model = random_model(facts["sd"], torch.float32, "meta")
    bare = their_step(model, as_reward(redness), [], config, 1, 2, 2)
    assert step(facts["sd"], config, "meta", 1, 2, 2).peak - bare.peak == 4 * 257 * 384
    trained = list(trainable_parameters(model.denoiser).values())
    model.denoiser.zero_grad()
    with Account("meta") as account:
        account.track(model.denoiser, model.decoder, *model.text_encoders)
        without_moments = account.bytes
    assert bare.peaks["encode"] >= without_moments + 2 * sum(p.nbytes for p in trained), "AdamW's moments"
    half = cost.text_half(config)
    with Account("meta") as account:
        account.track(half)
    assert account.bytes == pytest.approx(123.65e6 * 2, rel=0.01), "CLIP ViT-L's text tower in bfloat16"


# ---- both


def test_rows_have_the_planners_figures_and_what_encoding_costs(monkeypatch, config):
    monkeypatch.setattr(cost, "ACTIVE", (1, 3))
    monkeypatch.setattr(cost, "configuration", small(cost.configuration))
    done = {}
    found = list(cost.rows("tiny", str(TINY / "pipeline"), 2, done, ways=(THEIRS, "fast")))
    assert [(row.model, row.batch, row.way, row.active) for row in found] == [
        ("tiny", 2, way, k) for way in (THEIRS, "fast") for k in (1, 3)
    ]
    theirs, ours = found[:2], found[2:]
    for row, k in zip(ours, (1, 3), strict=True):
        c = resolve(cost.configuration(str(TINY / "pipeline"), 2, k), 1)
        planned = forecast(skeletons(c), c, "fast", POLICIES["fast"], 2, done)
        assert (row.peak, row.phase) == (planned.peak, planned.phase)
        assert 0 < row.flops - 2 * planned.flops < 2e-3 * row.flops
    assert all(a.peak > b.peak for a, b in zip(theirs, ours, strict=True))
    for a, b in zip(theirs, ours, strict=True):  # the same calls, but for a checkpoint's last convolution
        assert a.flops == pytest.approx(b.flops, rel=1e-3)


def small(configuration):
    """The same with the bundled CLIP, and few steps."""

    def change(*args):
        c = configuration(*args)
        active = c.num_inference_steps - c.trunc_backprop_timestep
        c.aesthetic.clip, c.num_inference_steps, c.trunc_backprop_timestep = str(TINY / "clip"), 5, 5 - active
        return c

    return change


def test_the_figures_are_of_a_run_with_the_preset(config):
    c = resolve(cost.configuration("stable-diffusion-v1-5/stable-diffusion-v1-5", 4, 10), 1)
    assert (c.num_inference_steps, c.trunc_backprop_timestep, c.estimator) == (50, 40, "truncated")
    assert (c.mixed_precision, c.aesthetic.dtype, c.lora_rank, c.guidance_scale) == ("bf16", "bfloat16", 4, 7.5)
    assert (c.per_gpu_capacity, c.train.gradient_accumulation_steps, c.train.optimizer) == (4, 1, "adamw")


def test_ratios_are_to_theirs_with_the_same_model_batch_and_steps():
    found = [
        Row("a", 4, THEIRS, 1, 8 * GIB, "backward", 2e12), Row("a", 4, THEIRS, 50, 8 * GIB, "backward", 4e12),
        Row("a", 1, THEIRS, 1, 5 * GIB, "backward", 1e12), Row("a", 4, "fast", 50, 2 * GIB, "decode", 5e12),
        Row("a", 1, "fast", 1, 2 * GIB, "sweep", 9e11), Row("b", 4, THEIRS, 50, GIB, "backward", 1e12),
    ]  # fmt: skip
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(found).splitlines()]
    assert lines[0] == ["model", "batch", "way", "K", "peak GiB", "×", "where", "TFLOP", "×"]
    assert lines[5] == ["a", "4", "fast", "50", "2.00", "0.250", "decode", "5.0", "1.250"]
    assert lines[6] == ["a", "1", "fast", "1", "2.00", "0.400", "sweep", "0.9", "0.900"]
    assert len({len(line) for line in table(found).splitlines()}) == 1


# ---- the command


@pytest.fixture
def asked(monkeypatch):
    """(model, batch) of the cases that were computed, by stand-ins."""
    found = []

    def rows(model, name, batch, done):
        found.append((model, batch))
        yield from (Row(model, batch, way, 1, GIB, "sweep", 1e12) for way in (THEIRS, "fast"))

    monkeypatch.setattr(cost, "rows", rows)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [("sd15", 4), ("sd15", 1), ("sdxl", 1)]),
        (["--models", "sdxl"], [("sdxl", 1)]),
        (["--quick"], [("sd15", 1)]),
    ],
)
def test_the_command_prints_a_table_and_writes_every_figure(asked, monkeypatch, tmp_path, capsys, options, expected):
    monkeypatch.setattr(sys, "argv", ["cost.py", *options, "--json", str(tmp_path / "out.json")])
    cost.main()
    assert asked == expected
    printed = capsys.readouterr().out
    assert "The peak counts" in printed and printed.count("| theirs |") == len(expected)
    content = json.loads((tmp_path / "out.json").read_text())
    assert [(row["model"], row["batch"], row["way"]) for row in content] == [
        (*case, way) for case in expected for way in (THEIRS, "fast")
    ]


def test_an_unknown_model_is_refused(asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", "--models", "sd15,sd16"])
    with pytest.raises(SystemExit):
        cost.main()
    assert "--models = sd16 is not one of sd15, sdxl" in capsys.readouterr().err and not asked
