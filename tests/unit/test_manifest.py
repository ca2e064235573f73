import json

import pytest
import torch

from alignprop.models.sd import StableDiffusion
from alignprop.runs.manifest import MANIFEST, STATE_FILE, base_model, check_base, damage_of, write_manifest
from alignprop.settings.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "denoiser").mkdir()
    (tmp_path / STATE_FILE).write_bytes(b"state")
    (tmp_path / "denoiser" / "weights").write_bytes(b"weights")
    write_manifest(tmp_path, {"name": "a", "weights": [0.5]})
    return tmp_path


def test_a_whole_checkpoint(checkpoint):
    assert damage_of(checkpoint) == ""
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {STATE_FILE: 5, "denoiser/weights": 7}


@pytest.mark.parametrize(("harm", "message"), [
    (lambda c: (c / STATE_FILE).unlink(), "training_state.pt is missing"),
    (lambda c: (c / "denoiser" / "weights").write_bytes(b"weight"), "denoiser/weights has 6 bytes instead of 7"),
    (lambda c: (c / "denoiser" / "weights").write_bytes(b"weighty"), "denoiser/weights does not have the SHA-256"),
    (lambda c: (c / MANIFEST).unlink(), "manifest.json is missing"),
    (lambda c: (c / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    (lambda c: (c / MANIFEST).write_text("{}"), "manifest.json cannot be read"),
    (lambda c: (c / MANIFEST).write_text("[]"), "manifest.json cannot be read"),
    *(
        (lambda c, word=word: (c / MANIFEST).write_text((c / MANIFEST).read_text().replace(word, "odd")),
         "manifest.json cannot be read")
        for word in ("bytes", "sha256", "base_model", "weights\":")
    ),
    (lambda c: (c / STATE_FILE).unlink() or (c / STATE_FILE).mkdir(), "training_state.pt has"),
])  # fmt: skip
def test_damage_is_named(checkpoint, harm, message):
    harm(checkpoint)
    assert damage_of(checkpoint).startswith(message)


def test_weights_from_elsewhere_are_taken_as_they_are(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert damage_of(tmp_path) == ""
    check_base(tmp_path, {"name": "a", "weights": [1.0]})


def test_another_base_model_is_refused_by_both_names(pipeline_folder, tmp_path):
    load = lambda dtype=torch.float32: StableDiffusion.load(str(pipeline_folder), dtype=dtype).denoiser  # noqa: E731
    write_manifest(tmp_path, base_model("a", load()))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_base(tmp_path, base_model("copy of a", load(dtype)))
    other = load()
    for parameter in other.parameters():
        parameter.mul_(1.03)  # as like as two fine-tunings of one model
    with pytest.raises(ConfigError, match=r"resume_from_2 = .*pretrained.model = 'a', but this run loads 'b'"):
        check_base(tmp_path, base_model("b", other), "resume_from_2")
