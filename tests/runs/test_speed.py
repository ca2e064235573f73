import pytest
import torch

from alignprop.engine.speed import compile_blocks, use_channels_last
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from alignprop.trainer import AlignPropTrainer
from tests.networks.test_lean import assert_close, frozen, lean_copy, run, unet


def test_channels_last_changes_the_layout_alone(pipeline_folder, toy_config):
    model = StableDiffusion.load(str(pipeline_folder))
    use_channels_last(model)
    kernels = [p for p in (*model.denoiser.parameters(), *model.decoder.parameters()) if p.dim() == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    rows = [AlignPropTrainer(toy_config(channels_last=flag, run_name=str(flag))).step() for flag in (False, True)]
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
    assert rows[1]["reward"] == pytest.approx(rows[0]["reward"], rel=1e-4, abs=1e-6)


def test_compiled_blocks_train_alike_and_are_compiled_once(toy_config, monkeypatch):
    """Traced in the first step, with and without gradient; another step, with other truncations, traces nothing."""
    monkeypatch.setattr("alignprop.loop.compile_blocks", lambda denoiser: compile_blocks(denoiser, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(per_gpu_capacity=1, estimator="randomized")
    plain = AlignPropTrainer(toy_config(run_name="plain", **options))
    compiled = AlignPropTrainer(toy_config(run_name="compiled", compile=True, **options))
    rows, graphs = [], []
    for _ in range(3):
        rows.append([trainer.step() for trainer in (plain, compiled)])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1
    for ours, theirs in rows:
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
        assert theirs["reward"] == pytest.approx(ours["reward"], rel=1e-4, abs=1e-6)


def test_a_denoiser_without_repeated_blocks_is_refused():
    with pytest.raises(ConfigError, match="compile = True: Linear has no repeated blocks"):
        compile_blocks(torch.nn.Linear(1, 1))


def test_compiled_blocks_of_lean_layers():
    network, x, call = frozen(unet)
    expected, changed = run(network, x, call), lean_copy(network)
    compile_blocks(changed, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        assert_close(run(changed, x, call, count=False), expected, output=1e-13)  # counting would prevent compiling
    assert counters["stats"]["unique_graphs"] == 2  # one for each width
    assert not counters["graph_break"]
