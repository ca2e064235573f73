"""Judges that ask a vision-language model: what is asked and read, models here and behind an endpoint, answers kept."""

import hashlib
import inspect
import re
import threading

import pytest
import torch
from PIL import Image

from alignprop.models.configs import find_tower_config
from rewards import build_reward, options_of, reward_class
from rewards.pictures import to_pictures
from rewards.skeleton import skeleton_reward, without_custom
from rewards.vlm import load_vlm
from rewards.vlm_judge import TEMPLATES, UnifiedReward, VlmJudge
from tests.helpers.refusals import error_of
from tests.helpers.reward_files import make_clip
from tests.helpers.vlm_files import make_tokenizer, make_vlm
from tests.helpers.vlm_server import VlmServer, completion, picture_of, question_of

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    return str(make_vlm(tmp_path_factory.mktemp("sevens"), "7"))


@pytest.fixture(scope="module")
def random_vlm(tmp_path_factory):
    return str(make_vlm(tmp_path_factory.mktemp("random")))


def pictures(number, height=40, width=50, seed=0):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def judge(name, server, **options):
    return build_reward(name, {name: {"endpoint": server.url, "model": "m", **options}})


def reader(cls, **values):
    """A judge without a model, to read answers with."""
    made = cls.__new__(cls)
    torch.nn.Module.__init__(made)
    made.lowest, made.highest = values.get("lowest", 1.0), values.get("highest", 10.0)
    return made


# ---- reading answers


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("8", 8), ("8.", 8), (" 7.5\n", 7.5), ("Score: 8/10", 8), ("8 out of 10.", 8), ("I'd say 9 / 10!", 9),
        ("10", 10), ("10/10", 10), ("I give it 3", 3), ("1.0", 1),
        ("", None), ("great", None), ("0", None), ("11", None), ("-3", None), ("8 or 9", None), ("8-9", None),
        ("Two dogs: 2. Score: 8", None), ("8/5", None), ("1.2.3", None), ("8/100", None), ("nan", None), ("1e1", None),
    ],
)  # fmt: skip
def test_an_answer_has_exactly_one_number_of_the_scale(answer, score):
    assert reader(VlmJudge).read(answer) == score


def test_the_scale_may_be_of_fractions():
    small = reader(VlmJudge, lowest=0.0, highest=1.0)
    assert (small.read("0.25/1"), small.read("0"), small.read("1.5")) == (0.25, 0, None)
    assert reader(VlmJudge, lowest=-1.0, highest=1.0).read("-0.5") == -0.5


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 0.8), ("dog (animal): 1\n3 legs: 0\nFinal Score:3.75", 0.75), ("Final Score:\n5", 1),
        ("Final Score: 2.", 0.4), ("Final Score: 5.0 of 5", 1),
        ("4", None), ("Final Score: 6", None), ("Final Score: 45", None), ("Final Score: 5.5", None), ("", None),
        ("Final Score: 0", None), ("Final Score: four", None), ("Final Score: 3.7.1", None),
    ],
)  # fmt: skip
def test_unifiedreward_reads_its_final_score_over_five(answer, score):
    assert reader(UnifiedReward).read(answer) == score


def test_unifiedreward_reads_what_the_published_pattern_reads():
    published = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
    for number in ("1", "2.5", "3.1415", "4.0", "5", "1.0"):
        for text in (f"Final Score: {number}", f"cat: 1\nFinal Score:{number}\n", f"Final Score:\n\n{number} / 5"):
            assert reader(UnifiedReward).read(text) == float(published.search(text)[1]) / 5


# ---- asking


def test_the_question_has_the_prompt_and_the_scale():
    with VlmServer("4") as server:
        question = 'From {lowest} to {highest}: {prompt}? As {"score": 3}, { } or {}.'
        reward = judge("vlm_judge", server, question=question, lowest=0.5, highest=5.0)
        assert reward(pictures(1), ["a {highest} cat"]).tolist() == [4]
        assert question_of(server.requests[0][2]) == 'From 0.5 to 5: a {highest} cat? As {"score": 3}, { } or {}.'


# SHA-256 of the texts in the authors' scripts, without the "<image>" of LLaVA's format in front of the short one.
PUBLISHED = {
    "elements": "f56f919ce3bc6aab3c173a5f836defe195e17e9614753e8b4c3dc2405bd4975b",
    "short": "bb5823f33a1fda4cd47b46ae294de8e275cd84e0acf25929426dcd9685f9ec49",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_unifiedreward_asks_as_it_was_trained(name):
    with VlmServer("Final Score: 4") as server:
        assert judge("unifiedreward", server, template=name)(pictures(1), ["a cat"]).tolist() == pytest.approx([0.8])
    text = question_of(server.requests[0][2])
    assert text.endswith("[a cat]")
    assert hashlib.sha256(text.replace("[a cat]", "[{prompt}]").encode()).hexdigest() == PUBLISHED[name]


def test_each_picture_is_judged_for_its_own_prompt_several_at_once():
    images, prompts = pictures(6), [f"prompt {i}" for i in range(6)]
    with VlmServer(lambda n, body: completion(question_of(body)[-1]), seconds=0.2) as server:
        reward = judge("vlm_judge", server, lowest=0.0, at_once=3, question="{prompt}")
        scores = reward(images, prompts)
    assert scores.tolist() == [0, 1, 2, 3, 4, 5] and scores.dtype == torch.float32
    assert server.most == 3
    sent = {question_of(body): picture_of(body).tobytes() for _, _, body in server.requests}
    assert sent == {prompt: p.tobytes() for prompt, p in zip(prompts, to_pictures(images), strict=True)}


def test_an_error_ends_the_questions_that_are_not_asked_yet():
    with VlmServer(lambda n, body: (400, {}, b"no"), seconds=0.05) as server:
        assert "answered 400" in error_of(judge("vlm_judge", server, at_once=2), pictures(40), ["a"] * 40)
        assert len(server.requests) < 20


def test_it_has_no_gradient():
    with VlmServer("4") as server:
        reward = judge("vlm_judge", server)
        assert not reward.differentiable and not reward(pictures(1).requires_grad_(), ["a"]).requires_grad


# ---- answers without a number


@pytest.mark.parametrize(("name", "good", "score"), [("vlm_judge", "8", 8), ("unifiedreward", "Final Score: 4", 0.8)])
def test_a_model_without_a_number_is_reminded_once(name, good, score):
    with VlmServer(lambda number, body: completion("What a cat!" if number == 0 else good)) as server:
        assert judge(name, server)(pictures(1), ["a cat"]).tolist() == pytest.approx([score])
    first, second = (question_of(body) for _, _, body in server.requests)
    reminder = second.removeprefix(first)
    assert reminder.startswith("\n") and "from 1 to " in reminder and "{" not in reminder


def test_a_model_that_never_gives_a_number_is_one_line():
    with VlmServer("I cannot\njudge pictures. " + "Sorry. " * 50) as server:
        message = error_of(judge("vlm_judge", server), pictures(1), ["a cat"])
        assert len(server.requests) == 2
    assert "vlm_judge: the model answers 'I cannot judge pictures. Sorry." in message and "'a cat'" in message
    assert "from 1 to 10" in message and "vlm_judge.missing" in message and len(message) < 400


def test_or_it_gets_the_score_of_missing_answers():
    with VlmServer(lambda number, body: completion("8" if "a dog" in question_of(body) else "?")) as server:
        assert judge("vlm_judge", server, missing=-1.0)(pictures(2), ["a cat", "a dog"]).tolist() == [-1, 8]


@pytest.mark.parametrize("answer", ["<think>3 dogs,\n2 cats</think>\n8", "**8**", "*Score:* **8/10**"])
def test_thoughts_and_bold_type_do_not_matter(answer):
    with VlmServer(answer) as server:
        assert judge("vlm_judge", server)(pictures(1), ["a"]).tolist() == [8]
    with VlmServer("dog: 1\n**Final Score:** 4") as server:
        assert judge("unifiedreward", server)(pictures(1), ["a"]).tolist() == pytest.approx([0.8])


# ---- answers that are kept


def test_the_same_question_about_the_same_picture_is_asked_once(tmp_path):
    images, prompts = pictures(3), ["a", "b", "c"]
    folder = tmp_path / "deep" / "answers"
    with VlmServer("4") as server:
        expected = judge("vlm_judge", server, cache_dir=str(folder))(images, prompts)
        assert len(server.requests) == 3
        again = judge("vlm_judge", server, cache_dir=str(folder))  # another run
        assert torch.equal(again(images, prompts), expected) and len(server.requests) == 3
        again(images[:1], ["another prompt"])
        again(images[:1] * 0.5, prompts[:1])
        again(images[:1].mT.contiguous(), prompts[:1])
        judge("vlm_judge", server, cache_dir=str(folder), model="n")(images[:1], prompts[:1])
        judge("vlm_judge", server, cache_dir=str(folder), max_tokens=9)(images[:1], prompts[:1])
        assert len(server.requests) == 8 and len(list(folder.iterdir())) == 8
        judge("vlm_judge", server)(images, prompts)
        assert len(server.requests) == 11


def test_an_answer_without_a_number_is_not_kept(tmp_path):
    with VlmServer(lambda number, body: completion("?" if number < 3 else "5")) as server:
        reward = judge("vlm_judge", server, cache_dir=str(tmp_path))
        error_of(reward, pictures(1), ["a"])
        assert not list(tmp_path.iterdir())
        assert reward(pictures(1), ["a"]).tolist() == [5]
        assert reward(pictures(1), ["a"]).tolist() == [5] and len(server.requests) == 5


def test_kept_answers_do_not_hold_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with VlmServer("4") as server:
        judge("vlm_judge", server, cache_dir=str(tmp_path), api_key_variable="MY_KEY")(pictures(1), ["a"])
    (file,) = tmp_path.iterdir()
    assert file.read_text() == "4" and "sk-secret" not in file.name


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with VlmServer("4") as server:
        assert "vlm_judge.cache_dir=" in error_of(judge, "vlm_judge", server, cache_dir=str(tmp_path / "file" / "x"))


# ---- a model that runs here


def test_the_answer_is_that_of_transformers(random_vlm):
    """The chat's tokens and the pixels are put together here without a processor."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    vlm, tokenizer = load_vlm(random_vlm, None, "float32", 12, "m"), make_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_vlm)
    answers = []
    for picture in to_pictures(pictures(3, 60, 90)):
        seen = Qwen2VLImageProcessorPil.from_pretrained(random_vlm)(picture, return_tensors="pt")
        places = "<|image_pad|>" * (seen.image_grid_thw.prod().item() // 4)
        text = f"<|im_start|>user\n<|vision_start|>{places}<|vision_end|>How good?<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(text, return_tensors="pt").input_ids
        kinds = (tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=kinds, **seen, do_sample=False,
            temperature=None, top_k=None, max_new_tokens=12,
        )  # fmt: skip
        answers.append(tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True))
        assert vlm.answer(picture, "How good?") == answers[-1]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_models_number_is_the_score(sevens, dtype):
    reward = build_reward("vlm_judge", {"vlm_judge": {"model": sevens, "dtype": dtype}})
    assert reward(pictures(3, 70, 90), ["a", "b", "c" * 40]).tolist() == [7, 7, 7]
    assert {p.dtype for p in reward.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in reward.parameters())


def test_unifiedreward_runs_here_as_well(sevens):
    message = error_of(build_reward("unifiedreward", {"unifiedreward": {"model": sevens}}), pictures(1), ["a"])
    assert "the model answers '7'" in message and "from 1 to 5" in message


def test_a_local_models_answers_are_kept(sevens, tmp_path, monkeypatch):
    options = {"vlm_judge": {"model": sevens, "cache_dir": str(tmp_path)}}
    expected = build_reward("vlm_judge", options)(pictures(2), ["a", "b"])
    monkeypatch.setattr("rewards.vlm.LocalVlm.answer", None)
    assert torch.equal(build_reward("vlm_judge", options)(pictures(2), ["a", "b"]), expected)


def test_a_local_model_is_asked_in_the_calling_thread(sevens, monkeypatch):
    threads = set()
    monkeypatch.setattr("rewards.vlm.LocalVlm.answer", lambda *_: threads.add(threading.current_thread()) or "7")
    build_reward("vlm_judge", {"vlm_judge": {"model": sevens}})(pictures(3), ["a"] * 3)
    assert threads == {threading.current_thread()}


def test_models_that_are_missing_or_of_another_kind_are_one_line(tmp_path):
    for model in ("nobody/absent-model", str(tmp_path / "absent")):
        message = error_of(build_reward, "vlm_judge", {"vlm_judge": {"model": model}})
        assert "vlm_judge.model=" in message and "no such folder here" in message
    clip = str(make_clip(tmp_path / "clip"))
    message = error_of(build_reward, "unifiedreward", {"unifiedreward": {"model": clip}})
    assert message.startswith(f"unifiedreward.model={clip!r}")


def test_a_model_without_its_processor_is_one_line(tmp_path):
    folder = make_vlm(tmp_path / "vlm")
    (folder / "preprocessor_config.json").unlink()
    message = error_of(build_reward, "vlm_judge", {"vlm_judge": {"model": str(folder)}})
    assert f"vlm_judge.model={str(folder)!r} has no usable processor" in message


# ---- options and plans


def test_a_question_or_a_scale_that_cannot_be_is_one_line():
    with VlmServer("4") as server:
        message = error_of(judge, "vlm_judge", server, question="Rate {promt}")
        assert "vlm_judge.question has {promt}" in message and "did you mean 'prompt'" in message
        message = error_of(judge, "vlm_judge", server, lowest=5.0, highest=5.0)
        assert message == "vlm_judge.lowest=5.0 is not below vlm_judge.highest=5.0"


def test_the_two_judges_share_their_options():
    own = {"vlm_judge": {"question", "lowest", "highest"}, "unifiedreward": {"template"}}
    shared = [{o.name: o for o in options_of(name) if o.name not in own[name]} for name in own]
    differs = {"model", "max_tokens"}
    assert shared[0].keys() == shared[1].keys() and differs < shared[0].keys()
    assert all(shared[0][name] == shared[1][name] for name in shared[0].keys() - differs)
    templates = next(o for o in options_of("unifiedreward") if o.name == "template")
    assert templates.choices == tuple(TEMPLATES)


def facts(*which):
    return {k: v for k, v in find_tower_config(*which)["model"].items() if k != "_class_name"}


def options(name, **values):
    defaults = inspect.signature(reward_class(name).__init__).parameters
    return {name: {k: p.default for k, p in defaults.items() if k != "self"} | values}


@pytest.mark.parametrize("name", ["vlm_judge", "unifiedreward"])
def test_a_plan_counts_the_weights_of_the_default_model(name):
    reward = skeleton_reward(name, options(name), facts)
    assert sum(p.numel() for p in reward.parameters()) == 8_292_166_656
    assert {(p.device.type, p.dtype) for p in reward.parameters()} == {("meta", torch.bfloat16)}
    images = torch.zeros(2, 3, 64, 64, device="meta", requires_grad=True)
    assert torch.autograd.grad(reward(images, ["a", "b"]).sum(), images)[0].shape == images.shape


def test_planned_bytes_are_those_that_are_loaded(sevens):
    given = options("vlm_judge", model=sevens)
    planned, real = skeleton_reward("vlm_judge", given, facts), build_reward("vlm_judge", given)
    sizes = lambda reward: {k: (p.shape, p.dtype) for k, p in reward.named_parameters()}  # noqa: E731
    assert sizes(planned) == sizes(real)
    assert sizes(without_custom(real)) == sizes(real)


def test_a_plan_of_an_endpoint_needs_no_model():
    reward = skeleton_reward("vlm_judge", options("vlm_judge", endpoint="http://127.0.0.1/v1", model="x"), facts)
    assert not list(reward.parameters())
    assert reward(torch.zeros(2, 3, 8, 8, device="meta"), ["a", "b"]).shape == (2,)


def test_a_plan_of_what_is_no_image_text_model_is_one_line(tmp_path):
    clip = str(make_clip(tmp_path / "clip"))
    message = error_of(skeleton_reward, "vlm_judge", options("vlm_judge", model=clip), facts)
    assert message.startswith(f"vlm_judge.model={clip!r} is no image-text model")


def test_the_picture_is_sent_as_eight_bits():
    with VlmServer("4") as server:
        judge("vlm_judge", server)(torch.full((1, 3, 6, 9), 0.5), ["a"])
    sent = picture_of(server.requests[0][2])
    assert sent.size == (9, 6) and sent.tobytes() == Image.new("RGB", (9, 6), (128,) * 3).tobytes()
