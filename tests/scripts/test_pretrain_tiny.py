"""The training script of the tiny model, with a tiny budget: every stage, its files, and going on after a kill."""

import contextlib
import json
import types

import pytest
import torch
from safetensors.torch import load_file

from scripts import pretrain_tiny
from scripts.tiny import aesthetic, clip, decoder, evaluate, judge, training, unet, vae


def pretrain(folder, *more):
    pretrain_tiny.main(["--work", str(folder / "work"), "--out", str(folder / "out"), "--steps_scale", "1e-4", *more])


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        for stage in (judge, clip, vae, unet):
            patch.setattr(stage, "BATCH_SIZE", 8)
        for count in ("REMADE", "DRAWN", "CROWDS"):
            patch.setattr(decoder, count, 2)
        patch.setattr(evaluate, "STEPS", 3)
        # Convolutions in bfloat16 take many times as long on a CPU without instructions for it. The stages `judge` and
        # `clip` keep it.
        for stage in (vae, unet, decoder):
            patch.setattr(stage, "bfloat16", contextlib.nullcontext)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_batches):
    folder = tmp_path_factory.mktemp("tiny")
    pretrain(folder)
    return folder


def test_every_part_is_written_and_loads(finished):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel

    out = finished / "out"
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == (
        torch.float16
    )
    model = CLIPModel.from_pretrained(out / "clip")
    text = pipeline.text_encoder.state_dict()
    assert text.keys() == model.text_model.state_dict().keys()
    assert all(torch.equal(text[k], v) for k, v in model.text_model.state_dict().items())
    assert json.loads((out / "clip" / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.5, 0.5]
    assert len((out / "prompts_heldout.txt").read_text().splitlines()) == 108


def test_the_evaluation_states_every_figure(finished):
    figures = json.loads((finished / "out" / "evaluation.json").read_text())
    assert figures["train"]["pictures"] == figures["heldout"]["pictures"] == 2
    assert {"count", "colour", "shape", "background", "all_four"} <= figures["train"].keys()
    assert set(figures["clip"]["text_gap"]) == {"count", "colour", "shape", "background"}
    assert (finished / "out" / "samples.png").stat().st_size > 1000


def test_the_head_has_the_known_files_layout(finished):
    state = load_file(finished / "out" / "aesthetic.safetensors")
    shapes = {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")}
    assert shapes == {
        "layers.0.weight": (1024, 128), "layers.2.weight": (128, 1024), "layers.4.weight": (64, 128),
        "layers.6.weight": (16, 64), "layers.7.weight": (1, 16),
    }  # fmt: skip


def test_finished_stages_are_skipped(finished, capsys):
    before = (finished / "out" / "evaluation.json").stat().st_mtime_ns
    pretrain(finished)
    assert capsys.readouterr().out.count("skipped") == len(pretrain_tiny.STAGES)
    assert (finished / "out" / "evaluation.json").stat().st_mtime_ns == before


def test_a_killed_stage_goes_on_to_the_same_weights(finished, monkeypatch):
    expected = load_file(finished / "work" / "unet.safetensors")
    for name in ("unet.done", "unet.safetensors", "unet_state.pt"):
        (finished / "work" / name).unlink(missing_ok=True)
    monkeypatch.setattr(training, "SAVE_MINUTES", 0.0)
    honest, calls = unet.optimizer_step, []

    def killed(loss, optimizer):
        calls.append(loss)
        if len(calls) == 3:
            raise KeyboardInterrupt
        honest(loss, optimizer)

    monkeypatch.setattr(unet, "optimizer_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(finished, "--stages", "unet")
    assert not (finished / "work" / "unet.safetensors").exists()
    monkeypatch.setattr(unet, "optimizer_step", lambda *a: (calls.append(a[0]), honest(*a)))
    pretrain(finished, "--stages", "unet")
    assert len(calls) == 3 + 2  # two steps were saved, the third was lost, four in all
    resumed = load_file(finished / "work" / "unet.safetensors")
    assert all(torch.equal(resumed[k], v) for k, v in expected.items())


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_guidance_on_the_trained_target_is_the_effective_guidance(strength):
    alphas = unet.make_scheduler().alphas_cumprod
    calls = []

    def ideal(noisy, timesteps, states):
        """What a denoiser of all-zero latents predicts: half of the velocity without a caption."""
        calls.append(len(noisy))
        signal, sigma = (a.sqrt()[:, None, None, None] for a in (alphas[timesteps], 1 - alphas[timesteps]))
        velocity = noisy * signal / sigma
        plain = 0.5 * velocity
        guided = plain + 3 * strength * (velocity - plain)  # what guidance 3 shall sample
        captioned = states[:, :1, :1, None] > 0
        return types.SimpleNamespace(sample=torch.where(captioned, plain + (guided - plain) / 3, plain))

    states, empty = torch.ones(16, 1, 1), torch.zeros(1, 1)
    clean, weakened = torch.zeros(16, 4, 16, 16), torch.full((16,), strength)
    assert unet.v_loss(ideal, clean, states, alphas, weakened, empty) < 1e-8
    assert len(calls) == (1 if strength == 1 else 2)
    assert unet.v_loss(ideal, clean, 0 * states, alphas, weakened, empty) > 1e-2


def test_sampling_begins_at_pure_noise():
    scheduler = unet.make_scheduler()
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] < 1e-6


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain(tmp_path, "--stages", "scenes,clipp")
    assert "'clipp' is not one of scenes, judge" in capsys.readouterr().err


def test_a_loop_ends_by_time_and_has_annealed_by_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    loop = training.TrainingLoop("x", tmp_path / "s.pt", optimizer, {"layer": layer}, 10**6, max_minutes=1, warmup=1)
    rates = []
    for _ in loop:
        rates.append(optimizer.param_groups[0]["lr"])
        now[0] += 0.6
    assert len(rates) == 100
    assert rates[0] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.505, abs=0.01)
    assert rates[-1] < 0.015


def test_word_swaps_change_one_word_and_targets_know_the_styles():
    torch.manual_seed(0)
    contents = torch.tensor([[0, 1, 2, 3]] * 200)
    swapped = clip.swap_one_word(contents)
    assert ((swapped != contents).sum(1) == 1).all()
    assert (swapped < torch.tensor(clip.CONTENT_SIZES)).all()
    styles = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 1.0, 1.0]] * 50)
    endings, fits = clip._style_endings(styles)
    assert fits.diagonal().all()
    vivid, faded = endings == 1, endings == 5
    assert fits[0, vivid].all()
    assert not fits[0, faded].any()
    assert not fits[1, vivid].any()


def test_the_heads_rating_is_in_units_of_the_rating(finished):
    head = aesthetic.AestheticHead(128)
    head.load_state_dict(load_file(finished / "out" / "aesthetic.safetensors"))
    embeds = torch.nn.functional.normalize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    assert 2 < head.float().eval()(embeds).mean() < 8
