"""Naming, summing and checking rewards; none of these needs a model."""

import sys
import textwrap

import numpy as np
import pytest
import torch

import rewards
from rewards import build_reward, check_rewards, parse_spec, registry, require_differentiable
from rewards.base import Reward
from tests.helpers.refusals import error_of

MODULE = """
    import torch
    from rewards.base import Reward

    def brightness(images, prompts, metadata=None):
        return images.mean(dim=(1, 2, 3))

    def letters(images, prompts, metadata=None):
        return torch.tensor([float(len(prompt)) for prompt in prompts])
    letters.differentiable = False

    def bonus(images, prompts, metadata=None):
        return images.mean(dim=(1, 2, 3)) + torch.tensor([row["bonus"] for row in metadata])

    def column(images, prompts, metadata=None):
        return images.mean(dim=(1, 2, 3)).unsqueeze(1)

    def plain_list(images, prompts, metadata=None):
        return [0.0] * len(prompts)

    def whole(images, prompts, metadata=None):
        return torch.ones(len(prompts), dtype=torch.long)

    def detached(images, prompts, metadata=None):
        return images.detach().mean(dim=(1, 2, 3))

    class Scaled(torch.nn.Module):
        def __init__(self, factor=3.0):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(factor))
            self.dropout = torch.nn.Dropout(0.9)
        def forward(self, images, prompts, metadata=None):
            return self.factor * self.dropout(images.mean(dim=(1, 2, 3)))

    class OnlyWeights(Scaled):
        def forward(self, images, prompts, metadata=None):
            return self.factor * torch.ones(len(images))

    class Ours(Reward):
        differentiable = False
        def score(self, images, prompts, metadata):
            return images[:, 0, 0, 0]

    class NeedsArgument:
        def __init__(self, size):
            pass

    instance = Scaled(5.0)
    number = 3
"""


@pytest.fixture(autouse=True)
def own_rewards(tmp_path, monkeypatch):
    """A person's module in the directory where the run is started."""
    package = tmp_path / "my_pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "my_broken.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "my_crash.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "bb", "ccc", "dddd"]


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("hps", {"hps": 1.0}),
        ("hps:1.0,aesthetic:0.1", {"hps": 1.0, "aesthetic": 0.1}),
        (" hps : 2 , clip:-1e-1", {"hps": 2.0, "clip": -0.1}),
        ("my_package.my_module:callable", {"my_package.my_module:callable": 1.0}),
        ("my_module:score:0.5,hps", {"my_module:score": 0.5, "hps": 1.0}),
    ],
)
def test_spec_is_parsed(spec, terms):
    assert parse_spec(spec) == terms


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hpss", ["'hpss'", "allowed: aesthetic, ", "did you mean 'hps'"]),
        ("astetic:0.5", ["did you mean 'aesthetic'"]),
        ("", ["package.module:callable"]),
        ("hps,,clip", ["package.module:callable"]),
        ("hps:one", ["'hps:one'"]),
        ("hps:1:2", ["'hps:1:2'"]),
        ("hps:nan", ["finite"]),
        ("hps:inf", ["finite"]),
        ("clip,clip:2", ["'clip' twice"]),
        ("my module:score", ["'my module:score'"]),
    ],
)
def test_bad_spec_is_one_line(spec, parts):
    message = error_of(parse_spec, spec)
    for part in [repr(spec), *parts]:
        assert part in message


def test_unknown_option_names_the_nearest():
    message = error_of(build_reward, "hps", {"hps": {"versoin": "v2.1"}})
    assert "hps.versoin" in message and "did you mean 'version'" in message


@pytest.mark.parametrize(
    ("name", "option"), [(name, option.name) for name in registry.REWARDS for option in registry.options_of(name)]
)
def test_every_option_refuses_what_it_cannot_be(name, option):
    group = registry.options_name(name)
    message = error_of(build_reward, name, {group: {option: {}}})
    assert message.startswith(f"{group}.{option} = {{}} must be ")


@pytest.mark.parametrize(
    ("name", "option", "value", "wanted"),
    [
        ("jpeg_proxy", "quality", 101, "a whole number from 1 to 100"),
        ("jpeg_compressibility", "quality", True, "a whole number from 1 to 100"),
        ("colour", "target", (0, 255, 0), "3 numbers from 0 to 1, separated by commas"),
        ("colour", "target", (0.1, float("nan"), 0), "3 numbers from 0 to 1, separated by commas"),
        ("count_hard", "threshold", 1, "None or a finite number greater than 0 and less than 1"),
        ("hps", "version", 2.1, "one of 'v2.0', 'v2.1'; did you mean 'v2.1'?"),
        ("hps", "version", "v2.2", "one of 'v2.0', 'v2.1'; did you mean 'v2.1'?"),
        ("process:python::hps", "dtype", "int3", "one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(name, option, value, wanted):
    group = registry.options_name(name.rpartition("::")[2])
    message = error_of(build_reward, name, {group: {option: value}})
    assert message == f"{group}.{option} = {value!r} must be {wanted}"


def test_numbers_of_numpy_are_taken(images):
    plain, other = (
        build_reward("jpeg_compressibility,colour", {"jpeg": {"quality": quality}, "colour": {"target": target}})
        for quality, target in ((50, (0.1, 0.9, 0.5)), (np.int64(50), [np.float64(0.1), np.float32(0.9), 0.5]))
    )
    torch.testing.assert_close(other(images, [""] * len(images)), plain(images, [""] * len(images)))


def test_a_path_may_be_given_as_a_path(tmp_path):
    absent = tmp_path / "absent.pt"
    message = error_of(build_reward, "hps", {"hps": {"checkpoint": absent}})
    assert message == f"hps.checkpoint={str(absent)!r} does not exist or is not a file"


@pytest.mark.parametrize("kind", ["brightness", "Scaled", "instance"])
def test_custom_function_class_and_instance(kind, images):
    factor = {"brightness": 1.0, "Scaled": 3.0, "instance": 5.0}[kind]
    reward = build_reward(f"my_pack.mine:{kind}:0.5")
    assert reward.differentiable and reward.name == f"my_pack.mine:{kind}:0.5"
    torch.testing.assert_close(reward(images, PROMPTS), 0.5 * factor * images.mean(dim=(1, 2, 3)))
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_custom_module_stays_in_evaluation_mode(images):
    reward = build_reward("my_pack.mine:Scaled")
    reward.train()  # what preparing a training run does to every module; the dropout of .9 must stay off
    torch.testing.assert_close(reward(images, PROMPTS), 3 * images.mean(dim=(1, 2, 3)))


def test_custom_reward_gets_metadata(images):
    metadata = [{"bonus": float(i)} for i in range(4)]
    scores = build_reward("my_pack.mine:bonus")(images, PROMPTS, metadata)
    torch.testing.assert_close(scores, images.mean(dim=(1, 2, 3)) + torch.arange(4.0))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("my_absent.module:f", ["ModuleNotFoundError", "my_absent"]),
        ("my_broken:f", ["ModuleNotFoundError", "a_package_nobody_has"]),
        ("my_crash:f", ["RuntimeError: first line"]),
        ("my_pack.mine:brightnes", ["did you mean 'brightness'"]),
        ("my_pack.mine:NeedsArgument", ["NeedsArgument() without arguments", "size"]),
        ("my_pack.mine:number", ["int", "cannot be called"]),
    ],
)
def test_bad_custom_reward_is_one_line(spec, parts):
    message = error_of(build_reward, spec)
    for part in [spec, *parts]:
        assert part in message


def test_sum_is_weighted_and_terms_are_reported(images):
    reward = build_reward("my_pack.mine:brightness:2,my_pack.mine:letters:-0.5")
    terms = reward.score_terms(images, PROMPTS)
    assert list(reward.terms) == ["my_pack.mine:brightness", "my_pack.mine:letters"]
    assert all(isinstance(term, Reward) for term in reward.terms.values())
    assert terms["my_pack.mine:letters"].tolist() == [1, 2, 3, 4]
    expected = 2 * images.mean(dim=(1, 2, 3)) - 0.5 * torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    torch.testing.assert_close(reward.combine(terms), expected)


# Weighted, the two terms are 2·brightness = 1 and, of prompts of 1 … 4 letters, 0.5 … 2.
COMBINED = {"sum": [1.5, 2.0, 2.5, 3.0], "mean": [0.75, 1.0, 1.25, 1.5], "min": [0.5, 1.0, 1.0, 1.0]}


@pytest.mark.parametrize(("combination", "expected"), COMBINED.items())
def test_terms_are_combined_after_their_weights(images, combination, expected):
    reward = build_reward("my_pack.mine:brightness:2,my_pack.mine:letters:0.5")
    reward.combination = combination
    images = torch.full_like(images, 0.5)
    assert reward(images, PROMPTS).tolist() == pytest.approx(expected)
    # Further scores, of rewards that are not among its terms, do not count.
    others = {"other": torch.full((4,), -9.0)}
    torch.testing.assert_close(reward.combine(reward.score_terms(images, PROMPTS) | others), torch.tensor(expected))


def test_the_gradient_of_the_smallest_is_its_terms_alone():
    reward = build_reward("my_pack.mine:brightness:2,my_pack.mine:bonus:3")
    reward.combination = "min"
    scores = {"my_pack.mine:brightness": torch.tensor([0.1, 0.9]), "my_pack.mine:bonus": torch.tensor([0.5, 0.5])}
    scores = {name: score.requires_grad_() for name, score in scores.items()}
    first, second = torch.autograd.grad(reward.combine(scores).sum(), list(scores.values()))
    assert first.tolist() == [2.0, 0.0] and second.tolist() == [0.0, 3.0]


def test_terms_move_with_the_reward():
    reward = build_reward("my_pack.mine:Scaled", device="meta")
    assert {parameter.device.type for parameter in reward.parameters()} == {"meta"}


def test_sum_with_a_non_differentiable_term_is_not_differentiable():
    reward = build_reward("my_pack.mine:brightness,my_pack.mine:letters")
    assert not reward.differentiable
    message = error_of(require_differentiable, reward)
    assert "my_pack.mine:letters" in message and "differentiable=False" in message
    require_differentiable(build_reward("my_pack.mine:brightness"))
    assert not build_reward("my_pack.mine:Ours").differentiable


def test_a_term_without_gradient_is_found_inside_a_sum(images):
    reward = build_reward("my_pack.mine:brightness,my_pack.mine:detached")
    message = error_of(reward, images.requires_grad_(), PROMPTS)
    assert "'my_pack.mine:detached'" in message and "autograd" in message
    with torch.no_grad():
        assert reward(images, PROMPTS).shape == (4,)  # an evaluation wants no gradient


@pytest.mark.parametrize(
    ("kind", "part"),
    [("column", "shape [4, 1], expected [4]"), ("plain_list", "returned list"), ("whole", "torch.int64")],
)
def test_wrong_scores_are_refused(kind, part, images):
    message = error_of(build_reward(f"my_pack.mine:{kind}"), images, PROMPTS)
    assert part in message and f"my_pack.mine:{kind}" in message


def test_one_prompt_per_image(images):
    with pytest.raises(ValueError, match="4 images but 3 prompts"):
        build_reward("my_pack.mine:brightness")(images, PROMPTS[:3])


def test_check_accepts_good_scores(images):
    reward = build_reward("my_pack.mine:brightness")
    check_rewards(reward(images, PROMPTS), images, reward, needs_gradient=False)
    images.requires_grad_()  # a leaf, and the result of an operation
    check_rewards(reward(images, PROMPTS), images, reward, needs_gradient=True)
    decoded = images * 0.5
    check_rewards(reward(decoded, PROMPTS), decoded, reward, needs_gradient=True)
    check_rewards(decoded[:, 0, 0, 0], decoded, reward, needs_gradient=True)


@pytest.mark.parametrize(
    ("scores", "part"),
    [
        ([1.0, 2.0, 3.0, 4.0], "returned list"),
        (torch.zeros(4, 1), "shape [4, 1], expected [4]"),
        (torch.zeros(()), "shape [], expected [4]"),
        (torch.tensor([0.0, float("nan"), 1.0, -float("inf")]), "sample 1: nan, sample 3: -inf"),
    ],
)
def test_check_refuses_bad_scores(scores, part, images):
    def my_score():
        pass

    message = error_of(check_rewards, scores, images, my_score, needs_gradient=False)
    assert part in message and "'my_score'" in message


def test_check_refuses_scores_without_the_images_gradient(images):
    images.requires_grad_()
    reward = build_reward("my_pack.mine:OnlyWeights")
    weight = torch.ones(4, requires_grad=True)
    for scores in (torch.zeros(4), weight, weight * 2, (images.detach() * weight[0]).mean(dim=(1, 2, 3))):
        message = error_of(check_rewards, scores, images, reward, needs_gradient=True)
        assert "my_pack.mine:OnlyWeights" in message and "gradient" in message
        check_rewards(scores, images, reward, needs_gradient=False)


def test_check_refuses_a_non_differentiable_reward(images):
    reward = build_reward("my_pack.mine:letters")
    scores = reward(images, PROMPTS)
    check_rewards(scores, images, reward, needs_gradient=False)
    assert "differentiable=False" in error_of(check_rewards, scores, images, reward, needs_gradient=True)


def test_custom_reward_runs_in_float32_under_autocast():
    weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))

    class Matmul(Reward):
        def score(self, images, prompts, metadata):
            assert images.dtype == torch.float32
            return (images @ weight).mean(dim=(1, 2, 3))

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (images @ weight.bfloat16()).dtype == torch.bfloat16
        scores = Matmul()(images, ["", ""])
    assert torch.equal(scores, (images.float() @ weight).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("name", rewards.REWARDS)
def test_a_row_of_the_registry_is_a_reward_whose_options_have_help(name):
    assert issubclass(rewards.reward_class(name), Reward)
    assert all(option.help.endswith(".") for option in rewards.options_of(name))


SOURCE = """
class Toy(Reward):
    \'\'\'A reward.

    Args:
        strength: How much.
        ends: Between which.
    \'\'\'

    def __init__(self, {arguments}):
        pass
"""


@pytest.fixture
def options_of(tmp_path, monkeypatch):
    """Called with the arguments of a constructor: the options of a reward that is written so."""
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    monkeypatch.setitem(registry.REWARDS, "toy", registry.Entry("toy", "Toy"))

    def options(arguments: str) -> tuple[registry.Option, ...]:
        (tmp_path / "toy.py").write_text(SOURCE.format(arguments=arguments))
        return registry.options_of.__wrapped__("toy")  # without what it remembers

    return options


def test_options_are_read_from_a_constructor(options_of):
    assert options_of('strength: Annotated[float, (0, 1), "exclusive"] | None = None, *, ends: int = -3') == (
        registry.Option("strength", None, "How much.", float, limits=(0, 1), exclusive=True, optional=True),
        registry.Option("ends", -3, "Between which.", int),
    )


@pytest.mark.parametrize(("name", "rest"), [
    ("strength", ": float"), ("strength", "=1.0"), ("strength", ": complex = 1"), ("strength", ": int = N"),
    ("helpless", ": int = 1"),
])  # fmt: skip
def test_an_option_that_does_not_say_all_is_told_where_it_stands(options_of, name, rest):
    with pytest.raises(TypeError, match=rf"^Toy\({name}\) needs a default .* annotation .* help under 'Args:'"):
        options_of(name + rest)
