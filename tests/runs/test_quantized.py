"""Runs whose frozen weights are packed, or come from the host layer by layer."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from alignprop.engine.activations import KeptOnHost
from alignprop.engine.sharding import shard
from alignprop.engine.speed import compile_blocks
from alignprop.lora.adapters import add_adapter, get_adapter
from alignprop.lora.files import LORA_FILE, read_lora, save_lora
from alignprop.lora.frozen import merge_frozen
from alignprop.memory.planner import forecast, skeletons
from alignprop.method import gradient
from alignprop.models import formats, packed, products
from alignprop.models.formats import FORMATS
from alignprop.models.packed import Packed, PackedConv2d, PackedLinear, pack, packable
from alignprop.models.products import NarrowLinear
from alignprop.models.sd import StableDiffusion
from alignprop.publish.export import export_lora
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES
from alignprop.settings.resolve import resolve
from alignprop.trainer import AlignPropTrainer
from alignprop.weights import load_denoiser
from config.align_prop import TINY
from tests.helpers.tiny_pipelines import make_family
from tests.helpers.training import train, weights
from tests.runs.test_forecast import real_cost

ALL = {f"pretrained__{name}": "int8" for name in ("quantize", "quantize_text_encoders")}


@pytest.fixture
def narrow(monkeypatch):
    """The layers of the smallest models are packed as well."""
    monkeypatch.setattr(packed, "NARROWEST", 8)


def packed_layers(network):
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, Packed)}


def networks_of(trainer):
    model = trainer.run.model
    return model.denoiser, model.decoder, *model.text_encoders


def assert_equal_weights(ours, theirs):
    assert all(map(torch.equal, weights(ours), weights(theirs)))


# ---- formats


def test_a_forecast_counts_the_bytes_of_a_format(toy_config):
    """Bytes within 5 %, on the bundled model with its reward, all networks packed."""
    name = "nf4"  # which has the most tensors; the others were compared by hand
    config = toy_config(
        pretrained__model=str(TINY / "pipeline"), reward_fn="aesthetic", eval_reward_fn="", estimator="full",
        num_inference_steps=2, per_gpu_capacity=1, train__total_batch_size=1, train__total_samples_per_epoch=1,
        memory_policy="balanced", pretrained__quantize=name, pretrained__quantize_text_encoders=name,
        quantize_rewards=name,
    )  # fmt: skip
    c = resolve(config, 1)
    ours = forecast(skeletons(c), c, "balanced", POLICIES["balanced"], 1)
    trainer = train(config)
    run = trainer.run
    for network in (run.model.denoiser, *run.model.text_encoders, run.reward):
        assert packed_layers(network)
    assert not packed_layers(run.model.decoder)
    real, flops = real_cost(trainer)
    assert ours.peak == pytest.approx(real, rel=0.05)
    assert ours.flops == pytest.approx(flops, rel=0.01)


def test_the_fields_pack_the_networks_that_they_name(toy_config, narrow):
    trainer = train(toy_config(pretrained__quantize="int4", num_epochs=1))
    layers = packed_layers(trainer.run.model.denoiser).values()
    assert {type(layer) for layer in layers} == {PackedLinear, PackedConv2d}
    assert not any(packed_layers(encoder) for encoder in trainer.run.model.text_encoders)
    assert all(p.dtype == torch.float32 for p in trainer.weights.parameters)


def test_a_resumed_run_is_the_uninterrupted_one(toy_config, narrow):
    options = dict(**ALL, run_name="whole", save_freq=1)
    whole = train(toy_config(**options))
    train(toy_config(**options | {"run_name": "parts", "num_epochs": 1}))
    parts = train(toy_config(**options | {"run_name": "parts", "resume_from": "latest"}))
    assert_equal_weights(parts, whole)


def test_a_checkpoint_goes_on_with_another_format_of_its_base(toy_config, narrow):
    train(toy_config(**ALL, run_name="a", num_epochs=1))
    trainer = train(toy_config(run_name="a", resume_from="latest"))  # without quantisation
    assert not packed_layers(trainer.run.model.denoiser)


def test_an_export_merges_into_the_weights_that_were_not_quantised(toy_config, pipeline_folder, narrow, tmp_path):
    trainer = train(toy_config(pretrained__quantize="int4", train__learning_rate=0.1))
    checkpoint = max(trainer.run.folder.glob("checkpoints/*"))
    export_lora(checkpoint, tmp_path / "merged", "merged", base=str(pipeline_folder))
    lora = read_lora(checkpoint / LORA_FILE if (checkpoint / LORA_FILE).exists() else checkpoint)
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(pipeline_folder / file), load_file(tmp_path / "merged" / file)
    for module in lora.modules:
        expected = before[f"{module}.weight"] + lora.delta(module)
        torch.testing.assert_close(after[f"{module}.weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_tower_that_two_judges_share_is_packed_once(toy_config):
    options = dict(reward_fn="clip", clip__model=str(TINY / "clip"), num_epochs=1, pretrained__quantize="int8")
    trainer = AlignPropTrainer(toy_config(quantize_rewards="int8", num_eval_prompts=2, **options))
    judges = trainer.run.judges
    assert judges.tower in [*judges.reward.modules()] and packed_layers(judges.tower)


def test_frozen_loras_are_not_lost_on_quantised_files(pipeline_folder, tmp_path):
    model = StableDiffusion.load(str(pipeline_folder))
    add_adapter(model, 2, 2.0, ["to_q"], seed=0)
    save_lora(model, get_adapter(model), tmp_path)
    model = StableDiffusion.load(str(pipeline_folder))
    layers = [m for name, m in model.denoiser.named_modules() if name.endswith("to_q")]
    pack(layers, FORMATS["int8"])
    with pytest.raises(
        ConfigError, match=r"^pretrained\.loras: .* cannot be merged into weights whose files are quant"
    ):
        merge_frozen(model, [(tmp_path, 1.0)])


def test_whole_weights_are_not_loaded_into_packed_ones(pipeline_folder, tmp_path):
    denoiser = StableDiffusion.load(str(pipeline_folder)).denoiser
    denoiser.save_pretrained(tmp_path)
    pack(packable(denoiser), FORMATS["int8"])
    with pytest.raises(ConfigError, match=r"has full weights, which need pretrained\.quantize = ''"):
        load_denoiser(denoiser, tmp_path)


def test_packed_weights_are_not_spread(pipeline_folder):
    denoiser = StableDiffusion.load(str(pipeline_folder)).denoiser
    pack(packable(denoiser), FORMATS["int8"])
    with pytest.raises(ConfigError, match="FSDP2 cannot spread quantised weights"):
        shard(None, denoiser, None)


def test_packed_weights_are_not_compiled(toy_config, pipeline_folder):
    with pytest.raises(ConfigError, match=r"^compile = True needs pretrained\.quantize = '', which is 'int8'"):
        train(toy_config(pretrained__quantize="int8", compile=True))
    denoiser = StableDiffusion.load(str(pipeline_folder)).denoiser
    pack(packable(denoiser), FORMATS["int8"])  # as from a file
    with pytest.raises(ConfigError, match=r"^compile = True: the denoiser is quantised"):
        compile_blocks(denoiser)


def test_an_adapter_in_float32_does_not_switch_autocast_on(tmp_path, toy_config, narrow):
    """FLUX.2's layers have no bias, so that the first parameter of a packed network is the adapter's."""
    folder = make_family(tmp_path / "flux2", "flux2")
    options = dict(pretrained__model=str(folder), mixed_precision="bf16", pretrained__quantize="int8", resolution=32)
    trainer = AlignPropTrainer(toy_config(**options))
    assert next(trainer.run.model.denoiser.parameters()).dtype == torch.float32
    assert isinstance(trainer.run._autocast(), nullcontext)


def test_networks_without_wide_layers_are_one_line(toy_config):
    with pytest.raises(ConfigError, match=r"^quantize_rewards = 'int8' has nothing to pack"):
        train(toy_config(quantize_rewards="int8"))


def test_a_format_names_the_package_that_it_needs(toy_config, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(ConfigError, match=r"pretrained\.quantize = 'nf4' needs the package bitsandbytes: pip install"):
        train(toy_config(pretrained__quantize="nf4"))


def test_trained_weights_are_not_packed(toy_config):
    with pytest.raises(ConfigError, match=r"pretrained\.quantize = 'int8' needs use_lora = True"):
        train(toy_config(pretrained__quantize="int8", use_lora=False))


# ---- products in 8 bits


def test_a_run_multiplies_in_8_bits_in_the_rollout_and_in_the_sweep(toy_config, narrow, monkeypatch):
    monkeypatch.setattr(products, "MULTIPLE", 8)
    options = dict(pretrained__quantize="int8", num_epochs=1, estimator="full")
    plain = train(toy_config(run_name="a", memory_policy="lean", **options))
    with_grad, multiply = [], products._multiply
    monkeypatch.setattr(
        products, "_multiply", lambda left, *rest: with_grad.append(left.dtype) or multiply(left, *rest)
    )
    options["pretrained__quantize_products"] = True
    trainer = train(toy_config(run_name="b", memory_policy="lean", **options))
    kinds = {type(layer) for layer in packed_layers(trainer.run.model.denoiser).values()}
    assert kinds == {NarrowLinear, PackedConv2d} and len(with_grad) > 100
    ours, theirs = (torch.cat([w.flatten() for w in weights(t)]) for t in (trainer, plain))
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


# ---- weights that stream


@pytest.mark.parametrize("quantized", [{}, ALL], ids=["plain", "int8"])
def test_streaming_changes_no_bit_of_a_run(toy_config, deeper_pipeline, narrow, quantized):
    """In the smallest pipeline, some weights of the mapped file are at odd addresses.

    A CPU rounds their product with a single vector, the time, differently from that of a copy.
    """
    options = dict(pretrained__model=deeper_pipeline, train_text_encoder=True, kl_coeff=0.5, **quantized)
    expected = train(toy_config(memory_policy="smallest", run_name="a", **options))
    trainer = train(toy_config(memory_policy="streaming", run_name="b", **options))
    assert_equal_weights(trainer, expected)
    for network in networks_of(trainer):
        layers = packed_layers(network)
        assert layers and all(layer.host for layer in layers.values())
    assert trainer.run.residency.streamed > sum(t.nbytes for n in layers.values() for t in n.host.values())


def test_activations_on_the_host_change_no_bit_of_a_run(toy_config, monkeypatch):
    """A CPU takes them for those on the device, so that the copies are switched on by hand."""
    expected = train(toy_config(memory_policy="balanced", run_name="a"))
    copied, to_host = [], KeptOnHost._to_host
    monkeypatch.setattr(KeptOnHost, "_to_host", staticmethod(lambda t: copied.append(t) or to_host(t)))
    where = []
    monkeypatch.setattr(gradient, "decode_activations_on", lambda *args: where.append(args) or KeptOnHost())
    config = toy_config(memory_policy="balanced", memory__decode_activations="host", run_name="b")
    assert_equal_weights(train(config), expected)
    assert copied and where[0] == ("host", torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_lora": False}, r"memory\.residency = 'stream' needs use_lora = True"),
        ({"compile": True}, r"memory\.residency = 'stream' needs compile = False"),
        ({"memory__keep_steps": 1}, r"memory\.keep_steps = 1 must be 0 where memory\.residency = 'stream'"),
    ],
)  # fmt: skip
def test_what_streaming_cannot_do_is_one_line(toy_config, fields, message):
    with pytest.raises(ConfigError, match=message):
        train(toy_config(memory__residency="stream", **fields))
