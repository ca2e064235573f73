"""The number of processes and the micro-batch size change no result; a process that dies takes the others along.

In float32 the micro-batch size does change the kernel that a batch gets. AdamW's first steps divide each gradient by
its own size, which turns differences of 6e-7 in the gradient into 2e-5 in B. In float64 nothing is left.
"""

import csv
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alignprop.build import build_run
from alignprop.lora.adapters import trained_parameters
from alignprop.lora.files import LORA_FILE
from alignprop.models.sd import StableDiffusion
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.resolve import flatten
from alignprop.tasks import evaluate
from alignprop.trainer import AlignPropTrainer
from tests.cli.test_main import flags, run_main
from tests.helpers import warm

# 3 optimizer steps of 8 samples; the 5 evaluation pictures do not divide evenly. The reward kills
# the second process at its 9th micro-batch, which only the run of two processes reaches, in its second epoch.
SMALL = {
    "train__total_batch_size": 8, "train__total_samples_per_epoch": 24, "train__learning_rate": 1e-3, "num_epochs": 1,
    "num_eval_images": 5, "max_vis_images": 5, "eval_base_distance": True,
    "reward_fn": "tests.helpers.toy_rewards:KilledInTheSecondProcess",
}  # fmt: skip


def difference(ours, theirs, part=""):
    """‖ours - theirs‖ / ‖theirs‖ over all tensors whose name contains `part`."""
    assert ours.keys() == theirs.keys()
    one, two = (torch.cat([w[name].flatten() for name in sorted(w) if part in name]) for w in (ours, theirs))
    return ((one - two).norm() / two.norm()).item()


def assert_rows_agree(ours, theirs):
    assert ours.keys() == theirs.keys() and ours["kind"] == theirs["kind"]
    aside = ("kind", "seconds", "cpu_seconds", "adjoint_norm")
    told = [{name: value for name, value in flatten(row).items() if name not in aside} for row in (ours, theirs)]
    assert told[0] == pytest.approx(told[1], rel=1e-5, abs=1e-7)
    norms = [[-1.0 if n is None else n for n in row.get("adjoint_norm", [])] for row in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)  # they are written with 4 digits


def assert_pictures_agree(folder, other):
    """The same files, and no pixel more than one level of 255 apart."""
    names = sorted(path.name for path in folder.glob("*.png"))
    assert names and names == sorted(path.name for path in other.glob("*.png"))
    for name in names:
        one, two = (np.asarray(Image.open(place / name), dtype=int) for place in (folder, other))
        assert one.shape == two.shape and abs(one - two).max() <= 1, name


class InDouble(StableDiffusion):
    def init_latents(self, generators):
        return super().init_latents(generators).double()


@pytest.fixture
def in_double(toy_config, pipeline_folder):
    """The LoRA, all of it float64, after 3 steps with micro-batches of so many samples."""

    def train(size):
        config = toy_config(run_name=f"double{size}", per_gpu_capacity=size, **SMALL)
        trainer = AlignPropTrainer(config, model=InDouble.load(str(pipeline_folder), dtype=torch.float64))
        for parameter in trainer.weights.parameters:
            parameter.data = parameter.data.double()
        for _ in range(3):
            trainer.step()
        return trained_parameters(trainer.run.model)

    return train


def test_in_double_precision_micro_batches_agree_to_the_last_digits(in_double):
    whole = in_double(8)
    assert all(tensor.dtype == torch.float64 and tensor.any() for tensor in whole.values())
    for size in (1, 2, 4):
        parts = in_double(size)
        # Tensor by tensor, so that a large one hides no small one.
        assert max(difference({"": parts[name]}, {"": whole[name]}) for name in whole) < 1e-12, size


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_with_chunks_of_a_fixed_size_the_micro_batch_changes_no_bit(toy_config, train_text_encoder):
    """Each kernel gets the same samples whatever the capacity, and sums over them are rounded once."""
    loras = []
    for capacity in (8, 4, 2):
        fields = SMALL | {"memory__sweep_chunk": 2, "memory__decode_chunk": 1, "train_text_encoder": train_text_encoder}
        trainer = AlignPropTrainer(toy_config(run_name=f"c{capacity}", per_gpu_capacity=capacity, **fields))
        for _ in range(3):
            trainer.step()
        loras.append(torch.cat([p.detach().flatten() for p in trainer.weights.parameters]))
    assert loras[0].any() and torch.equal(loras[0], loras[1]) and torch.equal(loras[0], loras[2])


@pytest.fixture
def by_one(toy_config):
    """A training run of this process alone, in one micro-batch or more."""

    def train(size=8, **fields):
        trainer = AlignPropTrainer(toy_config(run_name=f"one{size}", per_gpu_capacity=size, **SMALL, **fields))
        trainer.train()
        return trainer.run.folder

    return train


def assert_trained_alike(folder, other):
    """The same up to step 3, its evaluation included."""
    loras = [load_file(place / "checkpoints" / "checkpoint_3" / LORA_FILE) for place in (folder, other)]
    assert difference(*loras) < 1e-6 and difference(*loras, "lora_B") < 1e-4
    rows = [list(map(json.loads, (place / "metrics.jsonl").read_text().splitlines()))[:5] for place in (folder, other)]
    assert [row["kind"] for row in rows[0]] == ["eval", "train", "train", "train", "eval"]
    for ours, theirs in zip(*rows, strict=True):
        assert_rows_agree(ours, theirs)
    assert_pictures_agree(folder / "samples", other / "samples")


def test_two_processes_train_like_one_until_one_dies_and_ends_the_other(toy_config, by_one):
    """A LoRA of the text encoder too."""
    fields = {"train_text_encoder": True}
    started = time.monotonic()
    config = toy_config(run_name="two", per_gpu_capacity=2, eval_freq=1, **{**SMALL, "num_epochs": 50}, **fields)
    done = run_main(*flags(config), processes=2)
    assert time.monotonic() - started < 90
    assert done.returncode != 0 and "lost contact with another process" in done.stderr
    one = by_one(**fields)
    folder = one.with_name("two")
    assert json.loads((folder / "config.json").read_text())["train"]["gradient_accumulation_steps"] == 2
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint_3"]
    assert_trained_alike(folder, one)
    # With the same micro-batches there is only the order of sums, and they are taken in float64.
    files = [place / "checkpoints" / "checkpoint_3" / LORA_FILE for place in (folder, by_one(2, **fields))]
    assert difference(*map(load_file, files)) == 0
    # One process goes on where two were, and ends where it would have ended alone.
    ends = []
    for name in ("two", "alone"):
        options = {**SMALL, **fields, "run_name": name, "num_epochs": 2, "per_gpu_capacity": 2}
        trainer = AlignPropTrainer(toy_config(resume_from="latest", **options))
        assert trainer.global_step == (3 if name == "two" else 0)
        trainer.train()
        ends.append(load_file(trainer.run.folder / "checkpoints" / "checkpoint_6" / LORA_FILE))
    assert difference(*ends) == 0


def test_two_processes_evaluate_like_one(toy_config):
    options = dict(num_eval_images=5, max_vis_images=5)
    one = evaluate(toy_config("tiny_evaluate", run_name="e1", per_gpu_capacity=5, **options))
    config = toy_config("tiny_evaluate", run_name="e2", **options)
    done = warm.call("main.py", *flags(config, "tiny_evaluate"), processes=2)
    assert done.returncode == 0, done.stderr
    two = one.parents[2] / "e2" / "eval" / one.name
    assert len(list((two / "images").iterdir())) == 5
    assert_pictures_agree(two / "images", one / "images")
    assert_pictures_agree(two, one)
    scores = [list(csv.DictReader((folder / "scores.csv").read_text().splitlines())) for folder in (one, two)]
    for ours, theirs in zip(*scores, strict=True):
        assert [ours.pop(name) for name in ("image", "prompt")] == [theirs.pop(name) for name in ("image", "prompt")]
        assert [float(v) for v in ours.values()] == pytest.approx([float(v) for v in theirs.values()], rel=1e-5)


def test_each_picture_is_made_by_one_process(toy_config, monkeypatch):
    run = build_run(toy_config(num_eval_images=7, max_vis_images=7))
    for processes in (1, 2, 3, 8):
        gathered, made = [], []
        monkeypatch.setattr(
            "alignprop.evaluation.evaluate.gather_object", lambda found, all=gathered: all.extend(found) or all
        )
        for index in range(processes):
            run.evaluator.accelerator = SimpleNamespace(
                num_processes=processes, process_index=index, is_main_process=False
            )
            evaluation = run.evaluator(on_image=lambda j, image, made=made: made.append(j))
        assert sorted(made) == list(range(7)), processes
        assert len(evaluation.images) == len(evaluation.rewards) == 7
