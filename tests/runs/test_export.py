"""Exported LoRAs, loaded by plain diffusers pipelines and by our own reader, and merged models against base + LoRA."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignprop.engine.seeding import generator
from alignprop.lora import kohya_names
from alignprop.lora.adapters import set_adapter
from alignprop.lora.factors import LoraWeights
from alignprop.lora.files import LORA_FILE, read_lora
from alignprop.models import FAMILIES
from alignprop.models.configs import bundled_config, folder_config
from alignprop.models.sd import StableDiffusion
from alignprop.publish import export as publishing
from alignprop.publish.verification import pipeline_around, weightless
from alignprop.runs.manifest import MANIFEST
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve, save_config
from tests.helpers import warm
from tests.helpers.single_file import _unet_key, make_pipeline
from tests.helpers.tiny_families import TINY, random_conditioning, tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "export_lora.py"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj",
    "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2",
)  # fmt: skip
JOINT = (*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "ff.net.2", "ff_context.net.0.proj", "norm1.linear")


def export_lora(*arguments, verify=True, **options):
    """With what was written read again, as most tests here want it."""
    return publishing.export_lora(*arguments, verify=verify, **options)


def write_facts(facts, folder) -> Path:
    """A pipeline's folder without weights: what `folder_config` reads the facts from."""
    family = FAMILIES[facts["family"]].pipeline
    part = "unet" if "UNet" in facts["denoiser"]["_class_name"] else "transformer"
    encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": e for i, e in enumerate(facts["text_encoders"])}
    parts = {part: facts["denoiser"], "vae": facts["vae"], "scheduler": facts["scheduler"], **encoders}
    for name, content in parts.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(content))
    index = {name: ["library", content["_class_name"]] for name, content in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family, **index}))
    return folder


def with_encoders(model, weights, targets=("q_proj", "out_proj")) -> LoraWeights:
    """The LoRA of a denoiser, and one of each text encoder that a file has a place for."""
    tensors = dict(weights.tensors)
    for part, encoder in model.lora_encoders.items():
        for name, tensor in random_lora(encoder, targets).tensors.items():
            tensors[f"{part}.text_model.{name.removeprefix('text_model.')}"] = tensor
    return LoraWeights(tensors, weights.scale)


def random_lora(denoiser, targets, rank=2, scale=0.75, size=0.3) -> LoraWeights:
    tensors = {}
    for name, layer in denoiser.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            outputs, inputs, *kernel = layer.weight.shape
            shapes = {"A": (rank, inputs, *kernel), "B": (outputs, rank, *(1 for _ in kernel))}
            for factor, shape in shapes.items():
                tensors[f"{name}.lora_{factor}.weight"] = size * torch.randn(shape, generator=generator(name, factor))
    return LoraWeights(tensors, scale)


def save_weights(weights, folder) -> Path:
    """As `Weights.write` does, without a whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = weights.rank(weights.modules[0])
    parts = {name.split(".")[0] for name in weights.modules if name.startswith("text_encoder")}
    targets = {"unet": [m for m in weights.modules if m.split(".")[0] not in parts]}
    targets |= {part: ["q_proj", "out_proj"] for part in parts}
    header = {}
    for part, modules in targets.items():
        config = {"r": rank, "lora_alpha": weights.scale * rank, "target_modules": modules}
        header |= {f"{part}.{name}": value for name, value in config.items()}
    tensors = {k if k.startswith("text_encoder") else f"unet.{k}": t for k, t in weights.tensors.items()}
    save_file(tensors, folder / LORA_FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return folder


@torch.no_grad()
def predict(model):
    latents = model.init_latents([generator("latents")])
    masks = {name: tensor for name, tensor in model.blank_conditioning(1).items() if tensor.dtype == torch.bool}
    branch = model.branches(random_conditioning(model, 1) | masks, 3.0)[-1]
    return model.predict(latents, torch.tensor(500), branch)


@torch.no_grad()
def encode(model):
    """What the last layer of each of the text encoders makes of some tokens."""
    tokens = torch.randint(0, 500, (1, 20), generator=generator("tokens"))
    states = [encoder(tokens, output_hidden_states=True).hidden_states for encoder in model.lora_encoders.values()]
    return torch.cat([hidden[-1].flatten() for hidden in states])


@pytest.fixture(scope="module")
def facts_of(pipelines):
    facts = {"sd": folder_config(pipelines["epsilon"]), **TINY}
    # diffusers' reader of kohya's single blocks knows but the released width.
    wide = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]}
    return facts | {"flux_wide": {**TINY["flux"], "denoiser": TINY["flux"]["denoiser"] | wide}}


@pytest.fixture
def lora(pipelines, tmp_path):
    """A LoRA of the random Stable Diffusion in its folder, and its factors."""
    weights = random_lora(weightless(folder_config(pipelines["epsilon"])).denoiser, ATTENTION)
    return save_weights(weights, tmp_path / "lora"), weights


# ---- round trips


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize(("family", "targets"), [
    ("sd", EVERYTHING), ("sdxl", EVERYTHING), ("sd3", JOINT), ("flux", ("attn.to_out.0", *JOINT[4:])),
])  # fmt: skip
def test_a_plain_pipeline_predicts_with_the_file_what_ours_does(facts_of, tmp_path, family, targets, form):
    facts = facts_of[family]
    ours, theirs, again = (tiny_model(facts) for _ in range(3))
    base, weights = predict(ours), with_encoders(ours, random_lora(ours.denoiser, targets))
    out, folder = tmp_path / "out.safetensors", write_facts(facts, tmp_path / "pipeline")
    check = export_lora(save_weights(weights, tmp_path / "lora"), out, form, base=str(folder))
    assert check.layers == check.checked == len(weights.modules) > 3 and check.difference <= 1e-6 < check.largest

    plain_text = encode(ours)
    set_adapter(ours, weights)
    expected, expected_text = predict(ours), encode(ours)
    assert (expected - base).abs().max() > 0.005 and (expected_text - plain_text).abs().max() > 0.05
    pipeline_around(theirs).load_lora_weights(out)
    set_adapter(again, read_lora(out, again))
    for model in (theirs, again):
        torch.testing.assert_close(predict(model), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encode(model), expected_text, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "prefixes"), [
    ("sd", ["lora_te_"]), ("sdxl", ["lora_te1_", "lora_te2_"]), ("flux", ["lora_te1_"]),
])  # fmt: skip
def test_text_encoders_have_the_names_that_other_tools_know(facts_of, tmp_path, family, prefixes):
    facts = facts_of[family]
    model = weightless(facts)
    weights = with_encoders(model, random_lora(model.denoiser, ("attn1.to_out.0", "attn.to_out.0")))
    out, base = tmp_path / "out.safetensors", write_facts(facts, tmp_path / "p")
    export_lora(save_weights(weights, tmp_path / "lora"), out, "kohya", base=str(base))
    names = {name.partition(".")[0] for name in load_file(out) if name.startswith("lora_te")}
    layers = [f"text_model_encoder_layers_{i}_self_attn_q_proj" for i in range(2)]
    assert {name for name in names if "q_proj" in name} == {prefix + layer for prefix in prefixes for layer in layers}


def test_fused_layers_of_the_released_width_come_apart_in_diffusers(facts_of, tmp_path):
    facts = facts_of["flux_wide"]
    weights = random_lora(weightless(facts).denoiser, ("attn.to_q", "proj_mlp"))
    out, base = tmp_path / "out.safetensors", write_facts(facts, tmp_path / "p")
    check = export_lora(save_weights(weights, tmp_path / "lora"), out, "kohya", base=str(base), dtype="float16")
    assert check.layers == check.checked == len(weights.modules) == 3
    fused = load_file(out)["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert fused.shape == (3 * 3072 + 12288, 4 * 2) and (fused != 0).float().mean() < 0.25


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_factors_have_the_precision_asked_for(lora, pipelines, tmp_path, dtype):
    folder, weights = lora
    out = tmp_path / "out.safetensors"
    check = export_lora(folder, out, "kohya", base=str(pipelines["epsilon"]), dtype=dtype)
    stored = load_file(out)
    assert {str(t.dtype) for k, t in stored.items() if k.endswith(".weight")} == {f"torch.{dtype}"}
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert 0 < check.difference < 2 * eps * check.largest
    found = read_lora(out, weightless(folder_config(pipelines["epsilon"])))
    largest = max((found.delta(m) - weights.delta(m)).abs().max().item() for m in weights.modules)
    assert abs(largest - check.difference) < eps * check.largest


# ---- kohya's format


def test_keys_and_header_are_kohyas(lora, pipelines, tmp_path):
    out = tmp_path / "out.safetensors"
    export_lora(lora[0], out, "kohya", base=str(pipelines["epsilon"]))
    with safe_open(out, framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= keys
    assert all(key.startswith("lora_unet_") for key in keys) and alphas == {2.0}
    assert header | {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2.0",
                     "ss_base_model_version": "sd_v1", "ss_v2": "False"} == header  # fmt: skip


@pytest.mark.parametrize(("name", "version", "v2"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd_v1", "False"),
    ("stabilityai/stable-diffusion-2-1", "sd_v2", "True"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_base_v1-0", "False"),
])  # fmt: skip
def test_the_header_names_the_base_model(name, version, v2):
    denoiser = weightless(bundled_config(name)).denoiser
    header = kohya_names.find_format(denoiser).header(denoiser)
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, v2)


def test_names_of_xl_are_the_released_checkpoints():
    denoiser = weightless(bundled_config("stabilityai/stable-diffusion-xl-base-1.0")).denoiser
    names = kohya_names.find_format(denoiser).names(denoiser)
    others = ("add_embedding", "up_blocks.0.upsamplers")  # which Stable Diffusion 1.x does not have, or elsewhere
    blocks = {n: modules[0] for n, modules in names.items() if not modules[0].startswith(others)}
    assert blocks == {_unet_key(f"{m}.weight", 2)[:-7].replace(".", "_"): m for m in blocks.values()}
    assert {
        "input_blocks_0_0", "input_blocks_3_0_op", "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_8_1_transformer_blocks_9_ff_net_2", "middle_block_1_proj_in", "middle_block_2_in_layers_2",
        "output_blocks_2_2_conv", "output_blocks_8_0_skip_connection", "label_emb_0_2", "time_embed_0", "out_2",
    } <= names.keys()  # fmt: skip
    assert sum("transformer_blocks" in name for name in names) == 10 * (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2)


def test_every_layer_has_an_alpha_of_its_own(pipelines, tmp_path):
    """As files of other trainers have: ranks and alphas that differ, and none, which is the rank."""
    model = weightless(folder_config(pipelines["epsilon"]))
    file, expected = {}, {}
    for i, module in enumerate(random_lora(model.denoiser, ("to_q", "conv1")).modules):
        single = random_lora(model.denoiser, (module,), rank=1 + i, scale=1.0)
        name, alpha = "lora_unet_" + module.replace(".", "_"), None if i == 0 else 3.0 + i
        file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"] = single.tensors.values()
        file |= {f"{name}.alpha": torch.tensor(alpha, dtype=torch.float16)} if alpha else {}
        expected[module] = single.delta(module) * (alpha / (1 + i) if alpha else 1)
    save_file(file, tmp_path / "theirs.safetensors")
    found = read_lora(tmp_path / "theirs.safetensors", model)
    assert found.modules == sorted(expected)
    for module, delta in expected.items():
        torch.testing.assert_close(found.delta(module), delta)
    # diffusers takes no notice of such alphas in attention layers, so that ours must not depend on them.
    ours = tmp_path / "ours.safetensors"
    check = export_lora(tmp_path / "theirs.safetensors", ours, "kohya", base=str(pipelines["epsilon"]))
    assert check.checked == len(expected)


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.update({"lora_te_x.alpha": torch.ones(())}), r"72 of its 73 keys .* 1 are not, .*'lora_te_x.alpha'"),
    (lambda f: f.pop(next(k for k in f if "attn1_to_q.lora_up" in k)), r"69 of its 71 keys .*attn1_to_q"),
])  # fmt: skip
def test_what_is_more_than_a_lora_of_the_denoiser_is_refused(lora, pipelines, tmp_path, change, message):
    out = tmp_path / "out.safetensors"
    export_lora(lora[0], out, "kohya", base=str(pipelines["epsilon"]))
    file = load_file(out)
    change(file)
    save_file(file, out)
    with pytest.raises(ConfigError, match=message):
        read_lora(out, weightless(folder_config(pipelines["epsilon"])))


def test_layers_that_diffusers_would_drop_are_refused_by_name(facts_of, tmp_path):
    facts = facts_of["flux"]
    weights = random_lora(weightless(facts).denoiser, ("x_embedder", "attn.to_out.0"))
    folder, base = save_weights(weights, tmp_path / "lora"), write_facts(facts, tmp_path / "p")
    with pytest.raises(ConfigError, match=r"format = 'kohya': 1 of the 2 adapted layers .*'x_embedder'; use"):
        export_lora(folder, tmp_path / "out.safetensors", "kohya", base=str(base))
    assert export_lora(folder, tmp_path / "out.safetensors", "diffusers", base=str(base)).checked == 2


# ---- merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_merged_pipelines_pictures_are_those_of_base_and_lora(tmp_path, dtype):
    base = tmp_path / "base"
    whole = make_pipeline(tmp_path / "whole", channels=(16, 32), layers_per_block=1, vae_channels=(8, 16))
    pipeline = StableDiffusionPipeline.from_pretrained(whole)
    pipeline.unet.to(dtype)
    pipeline.save_pretrained(base, max_shard_size="100KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"older")
    weights = with_encoders(StableDiffusion.load(str(base)), random_lora(pipeline.unet, (*ATTENTION, "conv1")))
    folder = save_weights(weights, tmp_path / "lora")
    check = export_lora(folder, tmp_path / "out", "merged", base=str(base))
    assert check.checked == check.layers == len(weights.modules)
    assert check.difference <= torch.finfo(dtype).eps * 4

    files = [{p.relative_to(f): p for p in f.rglob("*") if p.is_file()} for f in (base, tmp_path / "out")]
    assert files[0].keys() - files[1].keys() == {Path("unet/diffusion_pytorch_model.bin")}
    changed = {str(name) for name, path in files[1].items() if path.read_bytes() != files[0][name].read_bytes()}
    assert {name.partition("/")[0] for name in changed} == {"unet", "text_encoder"}
    assert all(name.endswith(".safetensors") for name in changed)
    unets = [name for name in changed if name.startswith("unet")]
    assert {t.dtype for name in unets for t in load_file(tmp_path / "out" / name).values()} == {dtype}

    def picture(where, lora=None):
        pipeline = StableDiffusionPipeline.from_pretrained(where)
        pipeline.load_lora_weights(lora) if lora else None
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipeline("a red cat", num_inference_steps=2, generator=noise, output_type="pt").images

    plain, with_lora, merged = picture(base), picture(base, folder), picture(tmp_path / "out")
    torch.testing.assert_close(merged, with_lora, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-3)
    assert (plain - with_lora).abs().max() > 0.05


@pytest.mark.parametrize("sharded", [{}, {"max_shard_size": "100KB"}])
def test_a_base_with_a_variant_alone_becomes_a_plain_pipeline(lora, pipelines, tmp_path, sharded):
    base, out = tmp_path / "base", tmp_path / "out"
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["epsilon"])
    pipeline.save_pretrained(base, variant="fp16", **sharded)
    assert not list(base.glob("*/diffusion_pytorch_model.safetensors"))
    assert bool(list(base.glob("unet/*.index.fp16.json"))) == bool(sharded)
    check = export_lora(lora[0], out, "merged", base=str(base), verify=True)
    assert check.checked == check.layers == len(lora[1].modules) and not list(out.glob("*/*fp16*"))
    merged, expected = StableDiffusionPipeline.from_pretrained(out).unet, pipeline.unet
    for module in lora[1].modules:
        found, before = (unet.get_submodule(module).weight for unet in (merged, expected))
        torch.testing.assert_close(found - before, lora[1].delta(module), rtol=1e-4, atol=1e-6)


def test_a_base_that_is_no_folder_comes_from_the_hub(lora, pipelines, tmp_path, monkeypatch):
    folder = pipelines["epsilon"]
    asked = []
    monkeypatch.setattr("alignprop.publish.export.find_config", lambda name, revision: folder_config(folder))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *a, **k: asked.append((a, k)) or str(folder))
    check = export_lora(lora[0], tmp_path / "out", "merged", base="some/model")
    assert asked == [(("some/model",), {"revision": None})] and check.checked == check.layers


def test_an_encoders_weights_are_found_by_their_older_names(lora, pipelines, tmp_path):
    """As released models have them, in which the layers are one level further down."""
    base = tmp_path / "base"
    shutil.copytree(pipelines["epsilon"], base)
    path = base / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    weights = with_encoders(StableDiffusion.load(str(base)), lora[1])
    check = export_lora(save_weights(weights, tmp_path / "l"), tmp_path / "out", "merged", base=str(base))
    assert check.checked == check.layers == len(weights.modules) > len(lora[1].modules)


# ---- where it comes from and goes to


def make_run(lora, folder, **pretrained):
    (folder / "checkpoints").mkdir(parents=True)
    lora.rename(folder / "checkpoints" / "checkpoint_3")
    (folder / "config.json").write_text(json.dumps({"pretrained": pretrained}))
    return folder


def test_a_run_names_its_base_model(lora, toy_config, tmp_path):
    run = make_run(lora[0], tmp_path / "run")
    save_config(resolve(toy_config(), 1), run / "config.json")
    for i, source in enumerate((run, run / "checkpoints" / "checkpoint_3" / LORA_FILE)):
        check = export_lora(source, tmp_path / f"{i}.safetensors", "kohya")
        assert check.checked == len(lora[1].modules)


def test_a_single_file_has_its_configuration_elsewhere(lora, pipelines, tmp_path):
    run = make_run(lora[0], tmp_path / "run", model="model.safetensors", config=str(pipelines["epsilon"]))
    assert export_lora(run, tmp_path / "out.safetensors", "kohya").checked
    with pytest.raises(
        ConfigError, match=r"--base must name a pipeline folder, because .* single file 'model.safetensors'"
    ):
        export_lora(run, tmp_path / "out", "merged")


def test_a_denoiser_of_its_own_is_not_merged_into_the_pipelines(lora, pipelines, tmp_path):
    base = str(pipelines["epsilon"])
    run = make_run(lora[0], tmp_path / "run", model=base, denoiser="other.gguf")
    assert export_lora(run, tmp_path / "out.safetensors", "kohya").checked
    with pytest.raises(ConfigError, match=r"--base must name a pipeline folder with the weights of .* 'other\.gguf'"):
        export_lora(run, tmp_path / "out", "merged")
    assert export_lora(run, tmp_path / "out", "merged", base=base).checked


def export(lora, pipelines, tmp_path, out="out.safetensors", form="kohya", **options):
    options = {"base": str(pipelines["epsilon"]), **options}
    return export_lora(lora[0], tmp_path / out, form, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"form": "kohia"}, "format = 'kohia' is not one of .*; did you mean 'kohya'"),
    ({"dtype": "float8"}, "dtype = 'float8' is not one of"),
    ({"form": "merged", "dtype": "float16", "out": "new"}, "dtype = 'float16' has no effect with format = 'merged'"),
    ({"out": "new"}, r"out = '.*new' must end in \.safetensors"),
    ({"out": "there.safetensors"}, "out = .* exists; --force replaces it"),
    ({"out": "folder", "form": "merged", "force": True}, "is not a pipeline folder, so it is not replaced"),
    ({"out": "folder.safetensors", "force": True}, "is a folder, and will not be replaced by a file"),
    ({"out": "there.safetensors", "form": "merged", "force": True}, "is not a pipeline folder"),
    ({"out": "nowhere/out.safetensors"}, "could not be written"),
    ({"base": ""}, "--base is needed: .* is in no run folder that names its model"),
    ({"base": "no/such"}, "base = 'no/such': .*no such folder"),
])  # fmt: skip
def test_mistakes_are_one_line_and_cost_nothing(lora, pipelines, tmp_path, options, message):
    (tmp_path / "there.safetensors").write_text("mine")
    for folder in ("folder", "folder.safetensors"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=message) as raised:
        export(lora, pipelines, tmp_path, **options)
    assert "\n" not in str(raised.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_others_may_read_an_export(lora, pipelines, tmp_path):
    (tmp_path / "new").write_text("")
    export(lora, pipelines, tmp_path)
    export(lora, pipelines, tmp_path, "out", "merged")
    modes = {file.stat().st_mode for file in [tmp_path / "out.safetensors", *(tmp_path / "out").rglob("*.safetensors")]}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_force_replaces_a_file_and_a_pipeline(lora, pipelines, tmp_path):
    export(lora, pipelines, tmp_path)
    export(lora, pipelines, tmp_path, force=True, dtype="float16")
    assert load_file(tmp_path / "out.safetensors").popitem()[1].dtype in (torch.float16, torch.float32)
    export(lora, pipelines, tmp_path, "out", "merged")
    (tmp_path / "out" / "old").write_text("")
    export(lora, pipelines, tmp_path, "out", "merged", force=True)
    assert not (tmp_path / "out" / "old").exists()


def test_the_base_is_never_overwritten(lora, tmp_path):
    base = make_pipeline(tmp_path / "base", channels=(16,), layers_per_block=1, vae_channels=(8, 16), text_width=16)
    for out in (base, base / "inside", tmp_path):
        with pytest.raises(ConfigError, match=r"must not be the base model's folder|is not a pipeline folder"):
            export_lora(lora[0], out, "merged", base=str(base), force=True)
    assert StableDiffusionPipeline.from_pretrained(base)


def test_a_run_without_a_lora_says_so(pipelines, tmp_path):
    (tmp_path / "checkpoint" / "denoiser").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has full weights \(in denoiser/\) and no LoRA"):
        export_lora(tmp_path / "checkpoint", tmp_path / "o.safetensors", "kohya", base=str(pipelines["epsilon"]))


def test_a_lora_of_another_model_is_refused(lora, facts_of, tmp_path):
    base = write_facts(facts_of["sdxl"], tmp_path / "p")
    with pytest.raises(ConfigError, match="is it from another base model"):
        export_lora(lora[0], tmp_path / "o.safetensors", "kohya", base=str(base))


# ---- reading again


def test_numbers_that_the_precision_cannot_hold_are_refused(pipelines, tmp_path):
    weights = random_lora(weightless(folder_config(pipelines["epsilon"])).denoiser, ATTENTION, size=1e-6)
    folder = save_weights(weights, tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"^dtype = 'float16' cannot hold '.*lora_(up|down).weight'; float32 can"):
        export_lora(folder, tmp_path / "o.safetensors", "kohya", base=str(pipelines["epsilon"]), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert export_lora(folder, tmp_path / "o.safetensors", "kohya", base=str(pipelines["epsilon"]), dtype="bfloat16")


def test_a_layer_that_gets_lost_is_noticed(lora, pipelines, tmp_path, monkeypatch):
    whole = StableDiffusionPipeline.load_lora_weights

    def forgetful(pipeline, path):
        whole(pipeline, {k: v for k, v in load_file(path).items() if "attn2_to_v" not in k})

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", forgetful)
    with pytest.raises(ConfigError, match=r"of 24 layers 3 would be lost and 0 change .*attn2\.to_v"):
        export(lora, pipelines, tmp_path)


def test_what_diffusers_cannot_read_is_told_in_one_line(facts_of, tmp_path):
    """Its reader of fused layers takes the released width for granted."""
    facts = facts_of["flux"]
    folder = save_weights(random_lora(weightless(facts).denoiser, ("attn.to_q",)), tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"not exported, diffusers cannot read it in this format \(AssertionError\)"):
        export_lora(folder, tmp_path / "o.safetensors", "kohya", base=str(write_facts(facts, tmp_path / "p")))


# ---- weaker, and mixed


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_scale_and_a_mixture_are_in_the_weight_changes(lora, pipelines, tmp_path, form):
    """ΔW = 0.5·(0.25·ΔW1 + 0.75·ΔW2), with another rank and other layers in the second."""
    model = weightless(folder_config(pipelines["epsilon"]))
    other = random_lora(model.denoiser, ("to_q", "ff.net.2"), rank=3, scale=0.4)
    second, options = save_weights(other, tmp_path / "second"), {"base": str(pipelines["epsilon"])}
    out = tmp_path / "o.safetensors"
    export_lora(lora[0], out, form, scale=0.5, mix_with=second, mixing_coef=0.25, **options)
    found = read_lora(out, model)
    assert set(found.modules) == {*lora[1].modules, *other.modules}
    for name in found.modules:
        parts = [share * w.delta(name) for share, w in ((0.125, lora[1]), (0.375, other)) if name in w.modules]
        torch.testing.assert_close(found.delta(name), sum(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": float("nan")}, {"mixing_coef": float("inf")}])
def test_a_scale_or_share_that_is_none_is_refused(lora, tmp_path, options):
    options = {"mix_with": lora[0]} | options
    with pytest.raises(ConfigError, match="must be finite numbers, and scale not 0"):
        export_lora(lora[0], tmp_path / "o.safetensors", "kohya", **options)


def test_two_base_models_do_not_mix(lora, pipelines, tmp_path):
    second = shutil.copytree(lora[0], tmp_path / "second")
    for folder, value in ((lora[0], 1.0), (second, 1.5)):
        base = {"name": folder.name, "weights": [value, 2.0]}
        (folder / MANIFEST).write_text(json.dumps({"base_model": base, "files": {}}))
    with pytest.raises(
        ConfigError, match=r"^mix_with = '.*' was trained on pretrained.model = 'second', and .* on 'lora'"
    ):
        options = {"base": str(pipelines["epsilon"]), "mix_with": second}
        export_lora(lora[0], tmp_path / "o.safetensors", "kohya", **options)


def test_the_second_checkpoint_is_named_by_its_option(lora, pipelines, tmp_path):
    with pytest.raises(ConfigError, match=r"^mix_with = '.*nowhere' does not exist"):
        export_lora(lora[0], tmp_path / "o.safetensors", "kohya", base=str(pipelines["epsilon"]), mix_with="nowhere")


# ---- the script


def test_the_script(lora, pipelines, tmp_path, monkeypatch):
    run = make_run(lora[0], tmp_path / "run", model=str(pipelines["epsilon"]), revision=None, config=None)
    command = [SCRIPT, run, tmp_path / "my.safetensors", "--format", "kohya", "--dtype", "bfloat16", "--verify"]
    refused = warm.call(*command, "--mixing_coef", "0.5", cwd=tmp_path)
    assert (
        refused.returncode == 1 and refused.stderr == "error: mixing_coef = 0.5 needs mix_with, a second checkpoint\n"
    )
    command += ["--scale", "0.5", "--mix_with", run]
    done = warm.call(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert f"{tmp_path / 'my.safetensors'}: 24 of 24 layers read again, largest difference of ΔW" in done.stdout
    assert len(load_file(tmp_path / "my.safetensors")) == 3 * 24
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == f"error: out = '{tmp_path}/my.safetensors' exists; --force replaces it"


@pytest.mark.parametrize("form", ["kohya", "diffusers", "merged"])
def test_what_is_written_does_not_depend_on_its_being_read_again(lora, pipelines, tmp_path, form):
    contents = []
    for verify in (False, True):
        out = tmp_path / (f"{verify}" if form == "merged" else f"{verify}.safetensors")
        check = export_lora(lora[0], out, form, base=str(pipelines["epsilon"]), verify=verify)
        assert bool(check) == verify
        files = sorted(out.rglob("*.safetensors")) if out.is_dir() else [out]
        contents.append([{name: t.numpy().tobytes() for name, t in load_file(file).items()} for file in files])
    assert contents[0] == contents[1] and contents[0]
