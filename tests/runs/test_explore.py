"""The page that compares pictures: what it draws, what it says, and that only this machine reaches it."""

import sys
import threading

import pytest
import torch

from alignprop.evaluation.looks import LOOKS
from alignprop.settings.errors import ConfigError
from alignprop.settings.resolve import resolve
from alignprop.settings.warnings import warnings_for
from alignprop.tasks import build_mixture, evaluate, evaluate_soup
from alignprop.tasks import explore as module
from alignprop.tasks.explore import LOOPBACK, Explorer, explore, make_page, score_table
from tests.helpers.training import save_random_lora

PROMPT = "two red circles on a white background"


@pytest.fixture
def loras(pipeline_folder, tmp_path):
    return [save_random_lora(pipeline_folder, tmp_path / name, i) for i, name in enumerate(("first", "second"), 1)]


def explorer_of(config):
    return Explorer(*build_mixture(config))


def drawn(explorer, share, guidance=3.0, seed=0):
    return {title: explorer.draw(PROMPT, lora, guidance, seed)[0] for title, lora in explorer.variants(share).items()}


def test_the_base_both_checkpoints_and_their_mixture_are_drawn_with_one_noise(toy_config, loras):
    explorer = explorer_of(toy_config("tiny_explore", resume_from=loras[0], resume_from_2=loras[1]))
    half, ends = drawn(explorer, 0.5), (drawn(explorer, 0.0), drawn(explorer, 1.0))
    assert list(half) == ["base model", "resume_from_2", "resume_from", "mixture"]
    pictures = list(half.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert torch.equal(ends[0]["mixture"], half["resume_from_2"])
    assert torch.equal(ends[1]["mixture"], half["resume_from"])
    assert torch.equal(ends[1]["base model"], half["base model"])  # whatever was drawn before


def test_without_a_second_checkpoint_the_mixture_is_with_the_base(toy_config, loras):
    explorer = explorer_of(toy_config("tiny_explore", resume_from=loras[0]))
    shown = drawn(explorer, 0.0)
    assert list(shown) == ["base model", "resume_from", "mixture"]
    assert torch.equal(shown["mixture"], shown["base model"])


def test_without_a_checkpoint_guidance_and_seed_of_the_base_are_compared(toy_config):
    explorer = explorer_of(toy_config("tiny_explore"))
    ((title, picture),) = drawn(explorer, 0.5).items()
    assert title == "base model"
    assert not torch.equal(picture, drawn(explorer, 0.5, guidance=1.0)[title])
    assert not torch.equal(picture, drawn(explorer, 0.5, seed=1)[title])
    assert torch.equal(picture, drawn(explorer, 0.5)[title])


def first_scores(folder):
    """Of the first picture of an evaluation: its prompt, and its score under each reward."""
    names, row = (line.split(",") for line in (folder / "scores.csv").read_text().splitlines()[:2])
    scores = dict(zip(names[3:], map(float, row[3:]), strict=True))
    return row[1], {name: score for name, score in scores.items() if name not in LOOKS}


def test_a_picture_and_its_scores_are_those_of_an_evaluation(toy_config, loras):
    prompt, expected = first_scores(evaluate(toy_config("tiny_evaluate", run_name="x", resume_from=loras[0])))
    explorer = explorer_of(toy_config("tiny_explore", resume_from=loras[0]))
    c = explorer.run.config
    assert explorer.draw(prompt, explorer.first, c.guidance_scale, c.seed)[1] == pytest.approx(expected, rel=1e-5)


def test_a_mixture_is_that_of_the_soup_task(toy_config, loras):
    folder = evaluate_soup(toy_config("tiny_soup", run_name="soup", resume_from=loras[0], mixing_coef_1=(0.25,)))
    prompt, expected = first_scores(folder / "c_0.25")
    explorer = explorer_of(toy_config("tiny_explore", resume_from=loras[0]))
    c, mixture = explorer.run.config, explorer.variants(0.25)["mixture"]
    assert explorer.draw(prompt, mixture, c.guidance_scale, c.seed)[1] == pytest.approx(expected, rel=1e-5)


def test_the_page_is_for_this_machine_alone(toy_config, monkeypatch):
    asked = {}

    class Page:
        def launch(self, **options):
            asked.update(options)
            return None, "http://here", None

        def block_thread(self):
            asked["waited"] = True

    monkeypatch.setitem(sys.modules, "gradio", object())
    monkeypatch.setattr(module, "make_page", lambda explorer: Page())
    explore(toy_config("tiny_explore"))
    assert asked["server_name"] == LOOPBACK == "127.0.0.1"
    assert asked["share"] is False and asked["waited"]


def test_without_gradio_one_line_says_what_to_install(toy_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match="pip install gradio"):
        explore(toy_config("tiny_explore"))


def test_the_page_answers(toy_config, loras):
    import gradio  # takes seconds

    page = make_page(explorer_of(toy_config("tiny_explore", resume_from=loras[0])))
    (function,) = [f.fn for f in page.fns.values() if f.fn.__name__ == "show"]
    pictures, table = function(PROMPT, 3.0, 0, 0.5)
    assert [title for _, title in pictures] == ["base model", "resume_from", "mixture"]
    assert table.startswith("|  | base model | resume_from | mixture |") and "redness" in table
    with pytest.raises(gradio.Error, match="prompt"):
        function("  ", 3.0, 0, 0.5)


def test_the_scores_are_a_table():
    rows = [("base model", {"clip": 0.5, "hps": 0.25}), ("mixture", {"clip": 1.0, "hps": 0.0})]
    assert score_table(rows).splitlines() == [
        "|  | base model | mixture |", "| --- | --- | --- |", "| clip | 0.500 | 1.000 |", "| hps | 0.250 | 0.000 |",
    ]  # fmt: skip


def test_fields_of_evaluations_have_no_effect_here(toy_config):
    c = resolve(toy_config("tiny_explore"), 1)
    (line,) = warnings_for(c, ["num_eval_images"])
    assert "explore" in line


def test_a_picture_that_is_being_drawn_is_finished_before_the_process_ends(toy_config, monkeypatch):
    pages, ended = [], threading.Event()

    class Page:
        def launch(self, **options):
            return None, "http://here", None

        def block_thread(self):
            pages[0].drawing.acquire()  # as a thread of the page's does
            threading.Timer(0.3, lambda: (ended.set(), pages[0].drawing.release())).start()

    monkeypatch.setattr(module, "make_page", lambda explorer: pages.append(explorer) or Page())
    explore(toy_config("tiny_explore"))
    assert ended.is_set()


def test_drawing_holds_the_lock(toy_config, monkeypatch):
    explorer, held = explorer_of(toy_config("tiny_explore")), []
    decode = explorer.run.model.decode
    monkeypatch.setattr(explorer.run.model, "decode", lambda x: held.append(explorer.drawing.locked()) or decode(x))
    explorer.draw(PROMPT, None, 3.0, 0)
    assert held == [True] and not explorer.drawing.locked()
