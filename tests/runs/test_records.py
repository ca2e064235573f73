import json
import re
import threading
import time

import pytest
import torch

from alignprop.evaluation.evaluate import Evaluator
from alignprop.evaluation.pictures import save_grid
from alignprop.lora.files import LORA_FILE
from alignprop.runs.checkpoint import checkpoints_of, write_checkpoint
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from tests.helpers.training import rows, train


def test_a_run_folder_is_complete(toy_config, plots):
    trainer = train(toy_config(run_name="r", eval_freq=1))
    folder = trainer.run.folder
    for name in ("config.json", "metrics.jsonl", "curves.png", "before_after.png", "samples/step_000000.png",
                 "samples/step_000004.png", f"checkpoints/checkpoint_4/{LORA_FILE}"):  # fmt: skip
        assert (folder / name).is_file(), name
    assert [r["step"] for r in rows(trainer, "train")] == [1, 2, 3, 4]
    assert [r["step"] for r in rows(trainer, "eval")] == [0, 2, 4]
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["gradient_accumulation_steps"] == 2 and "torch" in config["versions"]


@pytest.fixture
def slow_pictures(monkeypatch):
    """Drawing takes longer than the toy steps that go on meanwhile."""
    monkeypatch.setattr("alignprop.runs.records.save_grid", lambda *args: (time.sleep(0.3), save_grid(*args)))


def test_training_goes_on_while_an_evaluation_is_written(toy_config, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr("alignprop.runs.records.save_grid", lambda *args: (go.wait(60), save_grid(*args)))
    trainer = AlignPropTrainer(toy_config(run_name="r"))
    trainer.run.open_folder(0)
    trainer.evaluate()
    trainer.run.prune_checkpoints()
    row = trainer.step()
    assert rows(trainer) == []
    go.set()
    trainer.run.log(row)
    assert [(r["kind"], r["step"]) for r in rows(trainer)] == [("eval", 0), ("train", 1)]
    assert (trainer.run.folder / "samples" / "step_000000.png").exists()


@pytest.mark.usefixtures("slow_pictures")
def test_a_checkpoint_is_never_ahead_of_the_rows(toy_config, monkeypatch):
    found = {}

    def write(folder, step, *args):
        written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[step] = [(row["kind"], row["step"]) for row in written]
        return write_checkpoint(folder, step, *args)

    monkeypatch.setattr("alignprop.loop.write_checkpoint", write)
    train(toy_config(eval_freq=1, train__total_samples_per_epoch=4))
    assert found == {
        1: [("eval", 0), ("train", 1)],
        2: [("eval", 0), ("train", 1), ("eval", 1), ("train", 2)],
    }


@pytest.mark.usefixtures("slow_pictures")
def test_the_end_of_a_run_waits_for_its_pictures(toy_config, capsys):
    trainer = train(toy_config(num_epochs=1, eval_base_distance=True))
    assert [r["step"] for r in rows(trainer, "eval")] == [0, 2]
    assert (trainer.run.folder / "before_after.png").exists()
    told = capsys.readouterr().out
    assert "step 0 → step 2" in told and "before_after.png" in told
    measure = rows(trainer, "eval")[-1]["base_distance"]
    assert re.search(rf"base_distance +0\.000 → +{measure:.1e}\n", told)


@pytest.mark.usefixtures("slow_pictures")
def test_nobody_else_gets_the_folder_before_everything_is_written(toy_config):
    trainer = AlignPropTrainer(toy_config())
    trainer.run.open_folder(0)
    trainer.evaluate()
    assert rows(trainer) == []
    trainer.run.records.close()
    assert [r["step"] for r in rows(trainer)] == [0]


@pytest.mark.usefixtures("slow_pictures")
def test_the_best_checkpoint_is_the_one_with_the_highest_held_out_reward(toy_config, monkeypatch):
    scores = iter([0.0, 0.1, 0.5, 0.3])  # evaluations at the steps 0, 2, 4, 6
    evaluate = Evaluator.__call__

    def with_score(self, **options):
        evaluation = evaluate(self, **options)
        evaluation.terms["tests.helpers.toy_rewards:redness"][:] = next(scores)
        return evaluation

    monkeypatch.setattr(Evaluator, "__call__", with_score)
    trainer = train(toy_config(num_epochs=3, eval_freq=1, num_checkpoint_limit=1))
    names = [path.name for path in checkpoints_of(trainer.run.folder)]
    assert names == ["checkpoint_4", "checkpoint_6"]
    assert (trainer.run.folder / "checkpoints" / "best").resolve().name == "checkpoint_4"


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(toy_config, monkeypatch):
    save = torch.save

    def full(state, path):
        if state.get("global_step", 0) > 2 if isinstance(state, dict) else False:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"checkpoint of step 4 could not be written.*No space left on device"):
        train(toy_config(run_name="r"))
    monkeypatch.undo()
    again = AlignPropTrainer(toy_config(run_name="r", resume_from="latest"))
    assert again.global_step == 2


def test_a_full_disk_under_a_picture_ends_the_run_which_then_goes_on_as_if_nothing_had_been(toy_config, monkeypatch):
    options = dict(num_epochs=3, eval_freq=1)
    expected = rows(train(toy_config(run_name="whole", **options)))

    def full(images, labels, path):
        if path.name == "step_000004.png":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save_grid(images, labels, path)

    parts = AlignPropTrainer(toy_config(run_name="r", **options))
    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"No space left on device: .*step_000004"):
        patched.setattr("alignprop.runs.records.save_grid", full)
        parts.train()
    parts.run.records.close()
    parts = AlignPropTrainer(toy_config(run_name="r", resume_from="latest", **options))
    assert parts.global_step == 4 and rows(parts)[-1]["kind"] == "train"
    parts.train()
    assert rows(parts) == expected


def test_a_folder_in_which_another_process_trains_is_left_alone(toy_config):
    first = AlignPropTrainer(toy_config(run_name="r"))
    first.run.open_folder(0)
    first.evaluate()
    assert first.run.is_evaluated(0)
    before = rows(first)
    with pytest.raises(ConfigError, match=r"run_name = 'r': another process is training in "):
        train(toy_config(run_name="r"))
    assert rows(first) == before


def test_resuming_with_another_evaluation_goes_on(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    picture = first.run.folder / "before_after.png"
    drawn = picture.read_bytes()
    again = train(toy_config(resume_from=str(first.run.folder), num_eval_images=1, max_vis_images=1, eval_reward_fn=""))
    assert rows(again, "eval")[-1]["step"] == 4
    assert picture.read_bytes() == drawn  # one picture is not set beside two


def test_a_finished_run_says_where_it_is(toy_config, capsys):
    first = train(toy_config(run_name="r", num_epochs=1))
    train(toy_config(resume_from=str(first.run.folder), run_name="copy", num_epochs=1))
    assert "copy: checkpoints, config.json, curves.png, metrics.jsonl" in capsys.readouterr().out


def test_an_abandoned_future_is_set_aside(toy_config):
    first = train(toy_config(run_name="r", num_epochs=3, num_checkpoint_limit=0))
    assert [p.name for p in checkpoints_of(first.run.folder)] == ["checkpoint_2", "checkpoint_4", "checkpoint_6"]
    start = str(checkpoints_of(first.run.folder)[0])
    train(toy_config(resume_from=start, num_epochs=2, num_checkpoint_limit=1))
    names = sorted(p.name for p in (first.run.folder / "checkpoints").iterdir())
    assert names == ["abandoned_4", "abandoned_6", "best", "checkpoint_2", "checkpoint_4"]


def test_a_run_without_checkpoint_starts_over_under_its_name(toy_config):
    config = toy_config(run_name="r", num_epochs=1)
    broken = AlignPropTrainer(toy_config(run_name="r", num_eval_images=2))
    broken.run.open_folder(0)
    broken.evaluate()
    broken.run.records.close()
    again = train(config)
    assert [r["step"] for r in rows(again)] == [0, 1, 2, 2]
    assert rows(again) == rows(train(toy_config(run_name="fresh", num_epochs=1)))


def test_the_best_is_told_by_the_reward_of_now(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1, eval_freq=1, reward_fn="tests.helpers.toy_rewards:redness:-1"))
    best = first.run.folder / "checkpoints" / "best"
    assert best.resolve().name == "checkpoint_2"
    options = dict(num_epochs=2, eval_freq=1, reward_fn="tests.helpers.toy_rewards:spread")
    train(toy_config(run_name="r", resume_from="latest", **options))
    assert best.resolve().name == "checkpoint_4"


def test_a_run_that_another_process_made_meanwhile_is_left_alone(toy_config):
    slow = AlignPropTrainer(toy_config(run_name="r", resume_from="latest", num_epochs=1))
    done = train(toy_config(run_name="r", resume_from="latest", num_epochs=1))
    before = rows(done)
    with pytest.raises(ConfigError, match=r"run_name = 'r': while this process was loading, another one trained"):
        slow.train()
    assert rows(done) == before and [p.name for p in checkpoints_of(done.run.folder)] == ["checkpoint_2"]


def test_an_interruption_while_a_later_part_is_dropped_loses_no_row(toy_config, monkeypatch):
    config = toy_config(run_name="r", num_epochs=2, eval_freq=1)
    expected = rows(train(config))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            "alignprop.runs.checkpoint.Path.rename", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        train(toy_config(resume_from=f"{config.log_dir}/r/checkpoints/checkpoint_2", num_epochs=2, eval_freq=1))
    again = AlignPropTrainer(toy_config(run_name="r", resume_from="latest", num_epochs=2, eval_freq=1))
    assert rows(again) == expected and again.global_step == 4


def test_damaged_metrics_are_told_before_anything_is_changed(toy_config):
    first = train(toy_config(run_name="r", num_epochs=1))
    metrics, config = first.run.folder / "metrics.jsonl", first.run.folder / "config.json"
    metrics.write_text("\0" + metrics.read_text())
    before = config.read_bytes(), metrics.read_bytes()
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        train(toy_config(run_name="r", resume_from="latest", num_epochs=2))
    assert (config.read_bytes(), metrics.read_bytes()) == before


def test_pictures_of_a_dropped_future_go(toy_config):
    first = train(toy_config(run_name="r", num_epochs=3, eval_freq=1))
    checkpoint = checkpoints_of(first.run.folder)[0]
    train(toy_config(resume_from=str(checkpoint), num_epochs=2, eval_freq=2))
    grids = sorted(path.stem for path in (first.run.folder / "samples").glob("*.png"))
    assert grids == ["step_000000", "step_000002", "step_000004"]
