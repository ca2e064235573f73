"""A new run that starts from a LoRA that is there: its first pictures, its ranks, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignprop.lora import kohya
from alignprop.lora.adapters import get_adapter
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import LORA_FILE, read_lora
from alignprop.models.sd import StableDiffusion
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.settings.errors import ConfigError
from alignprop.tasks import evaluate
from alignprop.trainer import AlignPropTrainer
from tests.helpers.fake_hub import Repository, logged_in
from tests.helpers.single_file import make_pipeline
from tests.helpers.training import rows, train
from tests.runs.test_export import random_lora

TRAINED = {}  # the checkpoint that all tests begin with


@pytest.fixture
def finished(toy_config, tmp_path, tmp_path_factory):
    """A copy of the newest checkpoint of a run."""
    if not TRAINED:
        logs = tmp_path_factory.mktemp("finished")
        run = train(toy_config(num_epochs=1, train__learning_rate=0.05, log_dir=str(logs))).run.folder
        TRAINED["checkpoint"] = checkpoints_of(run)[-1]
    return Path(shutil.copytree(TRAINED["checkpoint"], tmp_path / "finished"))


def same_deltas(found: LoraWeights, expected: LoraWeights, modules=None, exactly=False):
    for module in modules or expected.modules:
        torch.testing.assert_close(found.delta(module), expected.delta(module), rtol=0, atol=0 if exactly else 1e-6)
        assert expected.delta(module).any()


def starting(toy_config, lora, **fields):
    return AlignPropTrainer(toy_config(**{"run_name": "new", "init_lora": str(lora), "num_epochs": 1, **fields}))


def test_a_new_run_starts_where_the_finished_one_ended(toy_config, finished, capsys):
    options = {"reward_fn": "tests.helpers.toy_rewards:contrast", "eval_base_distance": True}
    trainer = train(toy_config(run_name="new", init_lora=str(finished), num_epochs=1, **options))
    ended = toy_config(run_name="alone", resume_from=str(finished), task="evaluate", **options)
    alone = json.loads((evaluate(ended) / "summary.json").read_text())
    first = next(row for row in rows(trainer, "eval") if row["step"] == 0)
    assert first["reward"] == pytest.approx(alone["reward"]["mean"], abs=1e-6)
    assert first["base_distance"] == pytest.approx(alone["base_distance"], rel=1e-4) and alone["base_distance"] > 0
    assert rows(trainer, "train")[0]["step"] == 1 and trainer.global_step == 2
    out = capsys.readouterr().out
    assert f"starting from {str(finished)!r}: rank 4 in 24 of the 24 layers that are trained with lora_rank = 4" in out


def test_it_starts_at_the_same_weights_to_the_bit(toy_config, finished):
    trainer = starting(toy_config, finished)
    same_deltas(get_adapter(trainer.run.model), read_lora(finished), exactly=True)
    ema = starting(toy_config, finished, train__ema_decay=0.9).weights.ema
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, trainer.weights.parameters, strict=True))


def test_further_ranks_change_nothing_at_first_and_learn(toy_config, finished, capsys):
    trainer, start = starting(toy_config, finished, lora_rank=6, lora_alpha=3.0), read_lora(finished)
    same_deltas(get_adapter(trainer.run.model), start)
    assert "rank 4 in 24 of the 24 layers that are trained with lora_rank = 6" in capsys.readouterr().out
    before = {name: p.detach().clone() for name, p in zip(range(99), trainer.weights.parameters, strict=False)}
    trainer.train()
    ups = [(p, before[i]) for i, p in enumerate(trainer.weights.parameters) if p.shape[1] == 6]
    assert ups and all((p != old)[:, 4:].any() for p, old in ups)


def test_the_initialization_is_that_of_the_field_where_the_lora_has_no_weights(toy_config, finished, capsys):
    plain, gaussian = (
        starting(toy_config, finished, lora_rank=64, lora_initialization=name).weights.parameters[0][4:]
        for name in ("kaiming", "gaussian")
    )
    assert plain.abs().max() <= plain.shape[1] ** -0.5 and plain.std() > 0.1
    assert gaussian.std().item() == pytest.approx(1 / 64, rel=0.1)
    assert "is not used" not in capsys.readouterr().out
    starting(toy_config, finished, lora_initialization="gaussian")
    assert "lora_initialization = 'gaussian' is not used: init_lora has every weight" in capsys.readouterr().out


def test_a_file_of_another_tool_and_of_fewer_layers_will_do(toy_config, pipeline_folder, tmp_path):
    model = StableDiffusion.load(str(pipeline_folder))
    expected = random_lora(model.denoiser, ("to_q",), rank=2, scale=3.0)
    save_file(kohya.pack(expected.tensors, expected.scale, model)[0], tmp_path / "theirs.safetensors")
    found = get_adapter(starting(toy_config, tmp_path / "theirs.safetensors").run.model)
    same_deltas(found, expected, expected.modules)
    assert all(not found.delta(module).any() for module in found.modules if module not in expected.modules)


def test_a_run_that_continues_does_not_start_again(toy_config, finished, tmp_path, capsys):
    fields = dict(run_name="new", init_lora=str(finished), resume_from="latest")
    train(toy_config(num_epochs=1, **fields))
    assert "is not used" not in capsys.readouterr().out
    trainer = train(toy_config(num_epochs=2, **fields))
    assert f"init_lora = {str(finished)!r} is not used: the run continues from a checkpoint" in capsys.readouterr().out
    whole = train(toy_config(num_epochs=2, **{**fields, "run_name": "whole"}))
    assert all(torch.equal(a, b) for a, b in zip(trainer.weights.parameters, whole.weights.parameters, strict=True))


@pytest.mark.parametrize(("fields", "message"), [
    ({"lora_rank": 2}, "^init_lora has rank 4, and lora_rank = 2 must be at least that"),
    ({"lora_target_modules": ("to_k",)}, r"18 of its 24 layers .*lora_target_modules=to_k,.*,to_v gives them one"),
    ({"init_lora": "latest"}, "^init_lora = 'latest' must name a LoRA"),
    ({"init_lora": "nowhere"}, "^init_lora = 'nowhere' does not exist"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(toy_config, finished, fields, message):
    with pytest.raises(ConfigError, match=message):
        starting(toy_config, finished, **fields)


def test_another_base_model_is_refused(toy_config, finished, tmp_path):
    other = make_pipeline(tmp_path / "other", channels=(16, 32), layers_per_block=1, text_width=16, seed=1)
    with pytest.raises(ConfigError, match=r"^init_lora = .* was trained on pretrained.model = "):
        starting(toy_config, finished, pretrained__model=str(other))


def test_text_encoders_and_whole_weights_are_refused(toy_config, tmp_path):
    encoders = train(toy_config(run_name="both", num_epochs=1, train_text_encoder=True)).run.folder
    with pytest.raises(ConfigError, match=r"^init_lora has a LoRA for the text_encoder, .* train_text_encoder = False"):
        starting(toy_config, encoders)
    same_deltas(get_adapter(starting(toy_config, encoders, train_text_encoder=True).run.model), read_lora(
        sorted((encoders / "checkpoints").glob("checkpoint_*"))[-1]), exactly=True)  # fmt: skip
    whole = train(toy_config(run_name="whole", num_epochs=1, use_lora=False)).run.folder
    with pytest.raises(ConfigError, match=r"^init_lora = .* has full weights \(in denoiser/\) and no LoRA"):
        starting(toy_config, whole)


def test_without_training_state_the_way_is_named(toy_config, finished):
    (finished / "training_state.pt").unlink()
    (finished / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no training_state.pt.*give it as init_lora"):
        AlignPropTrainer(toy_config(resume_from=str(finished)))


# ---- from the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with logged_in("me", "hf_token", monkeypatch, tmp_path) as hub:
        yield hub


@pytest.mark.parametrize(("files", "name"), [
    ((LORA_FILE,), "you/style"),
    (("my_style.safetensors", "README.md"), "you/style"),
    (("a/one.safetensors", "a/two.safetensors"), "you/style/a/two.safetensors"),
    (("adapter_model.safetensors", "adapter_config.json"), "you/style"),
])  # fmt: skip
def test_a_lora_of_the_hub_is_fetched(toy_config, finished, hub, files, name):
    lora = (finished / LORA_FILE).read_bytes()
    settings = json.dumps({"r": 4, "lora_alpha": 4}).encode()
    contents = {file: settings if file.endswith(".json") else lora for file in files}
    hub.repositories["you/style"] = Repository(private=False, files=contents)
    same_deltas(get_adapter(starting(toy_config, name).run.model), read_lora(finished), exactly=True)


@pytest.mark.parametrize(("files", "message"), [
    (("one.safetensors", "two.safetensors"), r"several files, name one as 'you/style/one.safetensors': one.*, two"),
    (("README.md",), "'you/style' is on the hub and has no LoRA"),
    (None, "'you/style' is no local file or folder, and could not be loaded from the hub .*; give a LoRA file"),
])  # fmt: skip
def test_a_repository_without_one_lora_is_refused(toy_config, hub, files, message):
    if files:
        hub.repositories["you/style"] = Repository(private=False, files=dict.fromkeys(files, b"x"))
    with pytest.raises(ConfigError, match=message):
        starting(toy_config, "you/style")


def test_a_published_lora_is_evaluated_by_its_name(toy_config, finished, hub):
    hub.repositories["you/style"] = Repository(private=False, files={LORA_FILE: (finished / LORA_FILE).read_bytes()})
    one = evaluate(toy_config("tiny_evaluate", run_name="hub", resume_from="you/style"))
    other = evaluate(toy_config("tiny_evaluate", run_name="here", resume_from=str(finished)))
    assert (one / "scores.csv").read_text() == (other / "scores.csv").read_text()
