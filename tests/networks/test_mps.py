"""MPS: its words and the files that it is published in. Its scores are compared in test_reward_references."""

import os
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from rewards import build_reward
from rewards.files import check_weights
from rewards.mps import CONDITION, words_that_matter
from rewards.vit_h import vit_h_config
from tests.helpers.refusals import refusal
from tests.helpers.reward_files import laion_head, make_options

pytestmark = pytest.mark.usefixtures("offline")

PROMPTS = ["a red cat", "8k, 1984"]  # digits are what the condition of these weights does not see
error_of = partial(refusal, "mps")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return make_options("mps", tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="module")
def reward(options):
    return build_reward("mps", {"mps": options})


@pytest.fixture
def images():
    """Of the tower's size."""
    return torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


# ---- words


def test_words_unlike_the_condition_are_not_looked_at(reward):
    words, _ = reward.terms["mps"].tower.read([*PROMPTS, CONDITION])
    matters = words_that_matter(words[:-1], words[-1])
    assert matters[0].all() and 0 < (~matters[1]).sum() < 8


def test_a_prompt_scores_alone_as_among_others(reward, images):
    """The published code divides by the largest likeness of the batch."""
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    words = torch.tensor([[[1.0], [0.02]], [[50.0], [1.0]]])
    assert words_that_matter(words, torch.ones(1, 1)).tolist() == [[True, True], [True, True]]


def test_the_condition_is_the_published_one():
    assert CONDITION.startswith("light, color, clarity, tone,") and CONDITION.endswith(", location, word, things.")
    assert CONDITION.count(",") == 21


def test_prompts_are_padded_to_the_end(reward):
    tokens = reward.terms["mps"].tower.tokenize(["a", "long " * 99])
    assert tokens.shape == (2, 77) and tokens[1, -1] == 599 and (tokens[0, 3:] == tokens[0, -1]).all()


# ---- files


class Fake(nn.Module):
    """A module with the weights of a state dict, which torch.save pickles with the name of its class."""

    def __init__(self, state):
        super().__init__()
        own = {name: value for name, value in state.items() if "." not in name}
        for name, value in own.items():
            constant = name in ("position_ids", "inv_freq")
            self.register_buffer(name, value) if constant else self.register_parameter(name, nn.Parameter(value, False))
        for part in dict.fromkeys(name.partition(".")[0] for name in state if "." in name):
            self.add_module(part, Fake({k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{part}.")}))


@pytest.fixture
def pickled(options, tmp_path, monkeypatch):
    """A whole module of a package that is not there when it is read."""
    module = types.ModuleType("trainer.models.clip_model")
    monkeypatch.setattr(Fake, "__module__", module.__name__)
    module.Fake = Fake
    for name in ("trainer", "trainer.models", "trainer.models.clip_model"):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save(Fake(torch.load(options["checkpoint"])), tmp_path / "MPS_overall_checkpoint.pth")
    monkeypatch.undo()
    return tmp_path / "MPS_overall_checkpoint.pth"


def test_the_released_module_is_read_without_its_code(options, reward, pickled, images):
    assert "trainer" not in sys.modules
    found = build_reward("mps", {"mps": options | {"checkpoint": str(pickled)}})
    assert torch.equal(found(images, PROMPTS), reward(images, PROMPTS))


def test_a_state_dict_beside_a_foreign_object_is_read(options, reward, images, tmp_path, monkeypatch):
    module = types.ModuleType("trainer")
    module.Settings = type("Settings", (), {"__module__": "trainer"})
    monkeypatch.setitem(sys.modules, "trainer", module)
    content = {"state_dict": torch.load(options["checkpoint"]), "settings": module.Settings(), "epoch": 3}
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    found = build_reward("mps", {"mps": options | {"checkpoint": str(tmp_path / "last.ckpt")}})
    assert torch.equal(found(images, PROMPTS), reward(images, PROMPTS))


def test_safetensors_in_a_folder(options, reward, images, tmp_path):
    from safetensors.torch import save_file

    save_file(torch.load(options["checkpoint"]), tmp_path / "mps.safetensors")
    place = options | {"checkpoint_repo": str(tmp_path), "checkpoint": "mps.safetensors"}
    assert torch.equal(build_reward("mps", {"mps": place})(images, PROMPTS), reward(images, PROMPTS))


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, print])
def test_a_pickle_that_would_run_code_runs_none(function, options, tmp_path, capfd):
    command = {os.mkdir: str(tmp_path / "harm"), exec: f"open({str(tmp_path / 'harm')!r}, 'w')", print: "harm"}
    torch.save(Harmful(function, command.get(function, f"touch {tmp_path / 'harm'}")), tmp_path / "bad.pth")
    message = error_of(**options | {"checkpoint": str(tmp_path / "bad.pth")})
    assert "without running its code" in message and "state_dict()" in message
    assert not (tmp_path / "harm").exists() and "harm" not in capfd.readouterr().out


def test_full_size_weights_have_the_sizes_of_vit_h(options):
    """The vision tower here has two layers of 160; its heads are 80 wide, as ViT-H's, and the text's are 64 wide."""
    state = {k.removeprefix("model."): v for k, v in torch.load(options["checkpoint"]).items() if k[:6] == "model."}
    state = {name: weight for name, weight in state.items() if "position_ids" not in name}
    config = vit_h_config(state, "it", "its")
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (2, 2)
    assert (config.vision_config.image_size, config.text_config.hidden_act) == (56, "gelu")
    from transformers import CLIPModel

    check_weights(state, CLIPModel(config), "it", "its")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model.text_projection.weight": None}, "text_projection.weight"),
        ({"model.text_model.final_layer_norm.bias": None}, "text_model.final_layer_norm.bias"),
        ({"cross_model.layers.3.0.fn.ff.2.weight": None}, "layers.3.cross.ff.2.weight"),
        ({"cross_model.layers.4.0.fn.norm.weight": torch.ones(128)}, "layers.4.cross.norm.weight"),
        ({"cross_model.layers.0.0.fn.to_kv.weight": torch.ones(64, 128)}, "shape [64, 128], expected [128, 128]"),
        ({"head.weight": torch.ones(1)}, "unknown 'head.weight'"),
    ],
)
def test_another_layout_is_one_line(change, part, options, tmp_path):
    state = torch.load(options["checkpoint"]) | change
    torch.save({name: weight for name, weight in state.items() if weight is not None}, tmp_path / "broken.pt")
    message = error_of(**options | {"checkpoint": str(tmp_path / "broken.pt")})
    assert "mps.checkpoint=" in message and part in message


def test_missing_files_are_named(options, tmp_path):
    message = error_of()
    assert "mps.checkpoint='MPS_overall_checkpoint.pth' does not exist" in message and "Kwai-Kolors/MPS" in message
    assert "mps.processor='nobody/absent'" in error_of(**options | {"processor": "nobody/absent"})
    torch.save(laion_head(), tmp_path / "other.pth")
    assert "unknown 'layers.0.weight'" in error_of(**options | {"checkpoint": str(tmp_path / "other.pth")})
    (tmp_path / "text.pth").write_text("no")
    assert "was not loaded" in error_of(**options | {"checkpoint": str(tmp_path / "text.pth")})
