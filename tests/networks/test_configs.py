"""Bundled facts against the published sizes of the models, and where facts are looked for."""

import inspect
import json
import shutil

import diffusers
import pytest
import torch
import transformers

from alignprop.models.configs import BUNDLED, bundled_config, find_config, find_tower_config, folder_config
from alignprop.models.skeleton import build_module
from alignprop.settings.errors import ConfigError

FILES = sorted(path.stem for path in BUNDLED.glob("*.json"))
CLIP_L, CLIP_L_PROJECTED, CLIP_G, T5_XXL = 123_060_480, 123_650_304, 694_659_840, 4_762_310_656
QWEN3_4B = 4_022_468_096
PARAMETERS = {  # denoiser, VAE, text encoders
    "sd15": (859_520_964, 83_653_863, [CLIP_L]),
    "sd21": (865_910_724, 83_653_863, [340_387_840]),
    "sdxl": (2_567_463_684, 83_653_863, [CLIP_L, CLIP_G]),
    "sdxl_turbo": (2_567_463_684, 83_653_863, [CLIP_L, CLIP_G]),
    "sd35_medium": (2_243_171_520, 83_819_683, [CLIP_L_PROJECTED, CLIP_G, T5_XXL]),
    "flux1_dev": (11_901_408_320, 83_819_683, [CLIP_L, T5_XXL]),
    "flux1_schnell": (11_891_178_560, 83_819_683, [CLIP_L, T5_XXL]),
    "flux2_klein_4b": (3_875_544_576, 84_046_115, [QWEN3_4B]),
    "z_image": (6_154_908_736, 83_819_683, [QWEN3_4B]),
}
TOWERS = {  # vision, text
    "clip_vit_l_14": (303_179_776, CLIP_L),
    "clip_vit_l_14_336": (303_507_456, CLIP_L),
    "clip_vit_h_14": (630_766_080, 352_984_064),
    "siglip_base": (92_884_224, 110_271_744),  # with scale and bias 203,155,970
    "siglip_so400m": (428_225_600, 449_734_896),  # 877,960,498
    "siglip2_base": (92_884_224, 282_303_744),
    "siglip2_so400m": (428_225_600, 707_782_896),
    "imagereward": (303_301_632, 141_977_088),  # ViT-L/16 without its classes; BERT with cross-attention, no pooler
    "hpsv3": (675_759_104, 7_070_619_136 - (152_064 - 151_658) * 3584),  # Qwen2-VL 7B with a smaller vocabulary
    "qwen2_5_vl_7b": (676_550_144, 7_070_619_136),  # with the layer of words 8,292,166,656
    "qwen2_5_vl_3b": (668_684_288, 3_085_938_688),  # 3,754,622,976, as the layer of words is the embedding
}
IMAGE_TOWERS = {
    "dinov2_small": 22_056_576, "dinov2_base": 86_580_480, "dinov2_large": 304_368_640,
    "mask2former_swin_small": 68_741_083,  # of its default, with 80 classes
    # FlanT5 without the output layer, which transformers ties here; with it 2,849,757,184 and 11,135,332,352.
    "clip_flant5_xl": 2_849_757_184 - 32_128 * 2048, "clip_flant5_xxl": 11_135_332_352 - 32_128 * 4096,
    "llava_15_7b": 7_063_427_072, "llava_15_13b": 13_351_494_656,
}  # fmt: skip


def read(stem):
    return json.loads((BUNDLED / f"{stem}.json").read_text())


def count(module):
    return sum(p.numel() for p in module.parameters())


# ---- the bundled files


@pytest.mark.parametrize("stem", PARAMETERS)
def test_models_have_the_published_numbers_of_parameters(stem):
    facts = read(stem)
    denoiser, vae, *encoders = (
        count(build_module(part, torch.bfloat16, "meta"))
        for part in (facts["denoiser"], facts["vae"], *facts["text_encoders"])
    )
    assert (denoiser, vae, encoders) == PARAMETERS[stem]


@pytest.mark.parametrize("stem", TOWERS)
def test_towers_have_the_published_numbers_of_parameters(stem):
    model = build_module(read(stem)["model"], torch.bfloat16, "meta")
    model = getattr(model, "model", model)
    parts = ("visual", "language_model") if hasattr(model, "visual") else ("vision_model", "text_model")
    parts = ("vision_model", "text_encoder") if stem == "imagereward" else parts
    vision, text = (getattr(model, part) for part in parts)
    assert (count(vision), count(text)) == TOWERS[stem]


@pytest.mark.parametrize("stem", IMAGE_TOWERS)
def test_image_towers_have_the_published_numbers_of_parameters(stem):
    assert count(build_module(read(stem)["model"], torch.bfloat16, "meta")) == IMAGE_TOWERS[stem]


def test_sd35_has_its_table_of_positions():
    facts = read("sd35_medium")["denoiser"]
    assert build_module(facts, torch.bfloat16, "meta").pos_embed.pos_embed.numel() == 384 * 384 * 1536


def test_every_file_is_one_of_these():
    assert sorted(FILES) == sorted([*PARAMETERS, *TOWERS, *IMAGE_TOWERS])
    names = [name.lower() for stem in FILES for name in read(stem)["hub_names"]]
    assert len(names) == len(set(names))


def parts(facts):
    """(what is written of a part, the defaults of its class) for every part."""
    if "model" in facts:
        written = facts["model"]
        assert written.pop("num_labels", 80) == 80  # which a config writes as a table of labels
        written.pop("model_type", None)  # which a configuration's own class leaves out
        for name in [name for name in written if name.startswith("mm_")]:  # CLIP-FlanT5's, which transformers lacks
            del written[name]
        config = getattr(transformers, written.pop("_class_name")).config_class()
        names = [name for name in ("text_config", "vision_config") if name in written]
        towers = [(written.pop(name), getattr(config, name).to_dict()) for name in names]
        return [(written, config.to_dict()), *towers]
    named = [facts["denoiser"], facts["vae"], facts["scheduler"], *facts["text_encoders"]]
    return [(part, defaults_of(part.pop("_class_name"))) for part in named]


def defaults_of(name):
    if not hasattr(diffusers, name):
        return getattr(transformers, name).config_class().to_dict()
    defaults = {k: p.default for k, p in inspect.signature(getattr(diffusers, name)).parameters.items()}
    if name == "EulerDiscreteScheduler":  # as in the released file: for a DDIM chain from the same configuration
        defaults["set_alpha_to_one"] = None
    return defaults


@pytest.mark.parametrize("stem", FILES)
def test_only_what_differs_from_the_classes_defaults_is_written(stem):
    for part, defaults in parts(read(stem)):
        assert part.keys() <= defaults.keys()
        same = [k for k, v in part.items() if json.dumps(defaults.get(k)) == json.dumps(v)]
        assert not same, f"{stem}: {same}"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
        ("STABILITYAI/Stable-Diffusion-XL-base-1.0", "sdxl"),
        ("black-forest-labs/FLUX.1-dev", "flux1_dev"),
        ("openai/clip-vit-large-patch14", "clip_vit_l_14"),
        ("yuvalkirstain/PickScore_v1", "clip_vit_h_14"),
    ],
)
def test_facts_are_found_by_hub_name(name, stem):
    assert bundled_config(name) == read(stem)


def test_other_names_have_no_bundled_facts():
    assert bundled_config("nobody/nothing") is None and bundled_config("sd15") is None


# ---- folders


def test_a_folder_says_what_its_pipeline_is_made_of(pipeline_folder):
    facts = folder_config(pipeline_folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    assert facts["family"] == "sd" and len(facts["text_encoders"]) == 1
    classes = [facts["denoiser"], facts["vae"], facts["scheduler"], *facts["text_encoders"]]
    real = [pipeline.unet, pipeline.vae, pipeline.scheduler, pipeline.text_encoder]
    assert [part["_class_name"] for part in classes] == [type(part).__name__ for part in real]
    for part, module in zip(classes, real, strict=True):
        if isinstance(module, torch.nn.Module):
            built = build_module(part, torch.float32, "meta").state_dict()
            assert {k: v.shape for k, v in built.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert find_config(str(pipeline_folder)) == facts


def index_of(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.fixture
def folder(pipeline_folder, tmp_path):
    copy = tmp_path / "pipeline"
    for path in pipeline_folder.rglob("*.json"):
        (copy / path.relative_to(pipeline_folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(pipeline_folder))
    return copy


def test_encoders_come_in_the_pipelines_order_without_those_that_are_left_out(folder):
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_3")
    clip = ["transformers", "CLIPTextModelWithProjection"]
    index_of(folder, _class_name="StableDiffusion3Pipeline", text_encoder_2=[None, None], text_encoder_3=clip)
    shutil.move(folder / "unet", folder / "transformer")
    index_of(folder, transformer=["diffusers", "SD3Transformer2DModel"])
    facts = folder_config(folder)
    assert facts["family"] == "sd3" and facts["denoiser"]["_class_name"] == "SD3Transformer2DModel"
    names = [part["_class_name"] for part in facts["text_encoders"]]
    assert names == ["CLIPTextModel", "CLIPTextModelWithProjection"]


def damage(folder, how):
    if how == "another pipeline":
        index_of(folder, _class_name="KandinskyPipeline")
    elif how == "no vae in the index":
        index = json.loads((folder / "model_index.json").read_text())
        del index["vae"]
        (folder / "model_index.json").write_text(json.dumps(index))
    elif how == "no file":
        (folder / "vae" / "config.json").unlink()
    elif how == "half a file":
        (folder / "unet" / "config.json").write_text('{"sample_size": ')
    elif how == "a list":
        (folder / "scheduler" / "scheduler_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another pipeline", "is a 'KandinskyPipeline', not one of StableDiffusionPipeline, "),
        ("no vae in the index", "model_index.json' names no vae"),
        ("no file", "vae' has no config.json"),
        ("half a file", "config.json' is damaged"),
        ("a list", "expected a JSON object"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(folder, how, message):
    damage(folder, how)
    with pytest.raises(ConfigError, match=message) as caught:
        find_config(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# ---- where facts are looked for


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hugging Face cache, and a function that puts a folder's JSON files into it under a hub name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name, revision="main"):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(f"commit_of_{revision}")
        shutil.copytree(folder, repository / "snapshots" / f"commit_of_{revision}")

    return put


def test_a_folder_comes_before_bundled_facts_and_these_before_the_cache(folder, cache, tmp_path, monkeypatch):
    name = "runwayml/stable-diffusion-v1-5"
    monkeypatch.chdir(tmp_path)
    cache(folder, name)
    assert find_config(name) == read("sd15")
    shutil.copytree(folder, tmp_path / name)
    assert find_config(name) == folder_config(folder)


def test_the_cache_is_read_at_the_revision(folder, cache):
    cache(folder, "some/model")
    index_of(folder, _class_name="StableDiffusionXLPipeline")
    cache(folder, "some/model", "newer")
    assert find_config("some/model")["family"] == "sd"
    assert find_config("some/model", revision="newer")["family"] == "sdxl"


@pytest.mark.parametrize("name", ["some/model", "no/such/folder", "../x", "openai/clip-vit-large-patch14"])
def test_nothing_found_says_what_is_bundled(name, cache):
    with pytest.raises(ConfigError, match=f"^pretrained.model = {name!r}: no such folder, ") as caught:
        find_config(name)
    assert "\n" not in str(caught.value)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in str(caught.value) and "laion" not in str(caught.value)


def test_a_clip_is_found_in_the_same_places(cache, tmp_path, monkeypatch):
    assert find_tower_config("openai/CLIP-vit-large-patch14", "clip.model") == read("clip_vit_l_14")
    tiny = BUNDLED.parent / "tiny" / "clip"
    facts = find_tower_config(str(tiny), "clip.model")
    built = build_module(facts["model"], torch.float32, "meta")
    assert count(built) == count(transformers.CLIPModel.from_pretrained(tiny))
    cache(tiny, "some/clip")
    assert find_tower_config("some/clip", "clip.model") == facts
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "openai" / "clip-vit-large-patch14")
    assert find_tower_config("openai/clip-vit-large-patch14", "clip.model") == facts


def test_other_towers_are_found_by_their_family(tmp_path):
    name = "google/siglip-base-patch16-224"
    assert find_tower_config(name, "siglip.model", "siglip") == read("siglip_base")
    with pytest.raises(ConfigError, match=r"^clip\.model = 'google/siglip.*': no such folder, .*laion"):
        find_tower_config(name, "clip.model")
    with pytest.raises(ConfigError, match=r"expected 'siglip'"):
        find_tower_config(str(BUNDLED.parent / "tiny" / "clip"), "siglip.model", "siglip")
    transformers.SiglipConfig().save_pretrained(tmp_path)
    facts = find_tower_config(str(tmp_path), "siglip.model", "siglip")
    assert count(build_module(facts["model"], torch.float32, "meta")) == sum(TOWERS["siglip_base"]) + 2


def test_what_is_no_clip_is_refused(cache, pipeline_folder):
    with pytest.raises(ConfigError, match=r"^aesthetic\.clip = 'some/clip': no such folder, .*laion"):
        find_tower_config("some/clip", "aesthetic.clip")
    with pytest.raises(ConfigError, match=r"^clip\.model = 'runwayml/stable-diffusion-v1-5': no such folder"):
        find_tower_config("runwayml/stable-diffusion-v1-5", "clip.model")
    folder = str(pipeline_folder / "text_encoder")
    with pytest.raises(ConfigError, match="is a 'clip_text_model' model, expected 'clip'"):
        find_tower_config(folder, "clip.model")
