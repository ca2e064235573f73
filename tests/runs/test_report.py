"""report.html of a run, and the page that compares several."""

import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from alignprop.evaluation.pictures import read_grid
from alignprop.evaluation.report import page
from alignprop.evaluation.report.page import write_page
from alignprop.evaluation.report.source import read_run
from alignprop.evaluation.report.verdict import student
from alignprop.runs import records
from alignprop.runs.checkpoint import checkpoints_of, step_of
from alignprop.tasks import evaluate
from scripts import compare
from tests.helpers.training import train

HOSTILE = "<script>alert('x')</script> & \"quotes\" — 雪"


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def run_with_hostile_prompts(toy_config, tmp_path):
    prompts = tmp_path / "hostile.txt"
    prompts.write_text(f"{HOSTILE}\na dog\n", encoding="utf-8")
    options = dict(eval_prompt_fn=str(prompts), eval_reward_fn="jpeg_compressibility", max_vis_images=4)
    return train(toy_config(num_epochs=2, eval_freq=1, **options)).run.folder


def read(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return read_run(folder, rows, [step_of(path) for path in checkpoints_of(folder)])


def test_a_run_has_a_page_that_needs_nothing_else(run_with_hostile_prompts, plots):
    text = (run_with_hostile_prompts / "report.html").read_text(encoding="utf-8")
    elements = Elements(text)
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in elements.of("img"))
    assert not elements.of("link") and all("src" not in script for script in elements.of("script"))
    assert len(elements.of("script")) == 1  # the page's own; a prompt is text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert any(HOSTILE in data for data in elements.texts)
    assert len(elements.of("svg")) == 5  # the reward, the judge, two looks, the diversity
    sliders = [i for i in elements.of("input") if i["type"] == "range"]
    assert len(sliders) == 4 and HOSTILE in sliders[0]["aria-label"] + sliders[1]["aria-label"]


def test_the_page_says_what_the_files_say(run_with_hostile_prompts):
    run = read(run_with_hostile_prompts)
    assert (run.trained, run.untrained) == (["tests.helpers.toy_rewards:redness"], ["jpeg_compressibility"])
    assert [point.step for point in run.points] == [0, *run.checkpoints]
    texts = " ".join(Elements((run.folder / "report.html").read_text(encoding="utf-8")).texts)
    for row in (row for row in run.rows if row["kind"] == "eval" and row["step"] in (0, run.points[-1].step)):
        assert f"{row['rewards']['jpeg_compressibility']:.4g}" in texts
        assert f"{row['looks']['sharpness']:.4g}" in texts
    assert write_page(run).sentence in texts


def test_a_run_prints_its_verdict(toy_config, capsys):
    trainer = train(toy_config(num_epochs=1))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The trained reward")]
    assert line in (trainer.run.folder / "report.html").read_text()


def test_a_run_that_was_finished_before_says_its_verdict_again(toy_config, capsys):
    told = []
    for _ in range(2):
        train(toy_config(num_epochs=1, run_name="r", resume_from="latest"))
        told.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("The trained reward")])
    assert len(told[0]) == 1 and told[0] == told[1]


@pytest.mark.parametrize(("other", "title"), [(",tests.helpers.toy_rewards:contrast:1", "redness "), ("", "")])
def test_a_number_below_a_picture_is_named_if_it_is_not_the_whole_reward(toy_config, other, title):
    redness = "tests.helpers.toy_rewards:redness"
    folder = train(toy_config(num_epochs=1, reward_fn=redness + other)).run.folder
    label, _ = read_grid(folder / "samples" / "step_000000.png")[0]
    first = next(csv.DictReader((folder / "samples" / "step_000000.csv").open()))
    assert label == f"{first['prompt']}\n{title}{float(first[redness]):.2f}"


def test_scores_of_all_pictures_are_kept_and_those_of_lost_steps_are_not(toy_config):
    folder = train(toy_config(num_epochs=2, num_eval_images=4, max_vis_images=2)).run.folder
    files = sorted((folder / "samples").glob("step_*.csv"))
    assert [len(list(csv.DictReader(file.open()))) for file in files] == [4] * len(files)
    (folder / "samples" / "step_000099.csv").write_text("of a step that was lost")
    train(toy_config(num_epochs=3, num_eval_images=4, max_vis_images=2, resume_from=str(folder)))
    assert len(sorted((folder / "samples").glob("step_*.csv"))) == len(files) + 1


def test_evaluations_of_other_prompts_are_left_out(run_with_hostile_prompts):
    run = read(run_with_hostile_prompts)
    file = run.folder / "samples" / "step_000000.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("a dog", "a cat"), encoding="utf-8")
    assert [point.step for point in read(run.folder).points] == [point.step for point in run.points[1:]]
    assert write_page(read(run.folder)) is not None


def test_a_turned_run_names_the_checkpoint_that_is_kept(run_with_hostile_prompts):
    run = read(run_with_hostile_prompts)
    steps, last = run.checkpoints, run.points[-1].step
    verdict = page.Verdict("hacked", "It fell.", best=last - 1, turned=last)
    assert page._kept(run, verdict) == f"checkpoints/checkpoint_{steps[0]} is kept, the last one before that step."
    assert page._kept(replace(run, checkpoints=[last - 1]), verdict) == f"checkpoints/checkpoint_{last - 1} is kept."
    assert page._kept(replace(run, checkpoints=[]), verdict) == "No checkpoint of that step or before it is kept."
    at_first = page.Verdict("hacked", "It fell.", best=0, turned=last)
    assert page._kept(run, at_first) == "The base model was better than the last checkpoint."


def test_a_report_that_fails_costs_no_run(toy_config, monkeypatch, capsys):
    monkeypatch.setattr(page, "judge", lambda *args: 1 / 0)
    trainer = train(toy_config(num_epochs=1))
    assert [row["step"] for row in read(trainer.run.folder).rows if row["kind"] == "eval"] == [0, trainer.global_step]
    assert "warning: there is no report of the run (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_run_may_continue_with_another_reward(toy_config):
    folder = train(toy_config(num_epochs=1)).run.folder
    train(toy_config(num_epochs=2, resume_from=str(folder), reward_fn="colour", eval_reward_fn=""))
    assert read(folder).trained == ["colour"] and (folder / "report.html").exists()


def test_files_of_a_person_beside_the_samples_are_left_alone(toy_config):
    folder = train(toy_config(num_epochs=1)).run.folder
    mine = folder / "samples" / "step_000001 (copy).png"
    mine.write_text("a person's file")
    train(toy_config(num_epochs=2, resume_from=str(folder)))
    assert mine.exists()


def test_the_checkpoint_that_the_report_recommends_is_kept(toy_config, monkeypatch):
    verdict = page.Verdict("hacked", "It fell.", best=2, turned=4)
    monkeypatch.setattr(records, "judge", lambda *args: verdict)
    options = dict(num_epochs=4, eval_freq=1, save_freq=1, num_checkpoint_limit=1, train__learning_rate=0.05)
    trainer = train(toy_config(**options))
    assert 2 in read(trainer.run.folder).checkpoints


def test_several_sizes_and_one_evaluation(toy_config):
    """Two sizes: pictures of unequal shapes. An interrupted run: only the evaluation before the first step."""
    folder = train(toy_config(num_epochs=1, resolution="16x24,24x16", num_eval_images=4)).run.folder
    ratios = re.findall(r"aspect-ratio: (\d+) / (\d+)", (folder / "report.html").read_text())
    assert {int(w) > int(h) for w, h in ratios} == {True, False}
    rows = [row for row in read(folder).rows if row["step"] == 0]
    assert write_page(read_run(folder, rows, [])).kind == "early"


# ---- comparisons


def compared(monkeypatch, tmp_path, *folders):
    output = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, folders), "--output", str(output)])
    compare.main()
    return Elements(output.read_text(encoding="utf-8"))


def test_a_run_is_compared_with_the_base_picture_by_picture(toy_config, tmp_path, monkeypatch):
    options = dict(num_eval_images=4, num_eval_prompts=2)
    folder = train(toy_config(num_epochs=2, train__learning_rate=0.1, **options)).run.folder
    base = evaluate(toy_config(task="evaluate", run_name="base", **options))
    page = compared(monkeypatch, tmp_path, base, folder)
    assert len(page.of("img")) == 2 * 2  # as many as each of the two has kept
    run, texts = read(folder), " ".join(page.texts)
    first, last = run.points[0].scores["reward"], run.points[-1].scores["reward"]
    difference = last - first  # the base's pictures are those of step 0
    prompts = run.points[-1].prompts
    means = [difference[[i for i, p in enumerate(prompts) if p == prompt]].mean() for prompt in set(prompts)]
    error = abs(means[0] - means[1]).item() / 2  # of two prompts
    assert f"{sum(means).item() / 2:+.3g}" in texts and f"± {student(1.96, 1) * error:.4g}" in texts


def test_rewards_of_different_kinds_are_not_compared(toy_config, tmp_path, monkeypatch):
    one = evaluate(toy_config(task="evaluate", run_name="one", num_eval_images=4))
    two = evaluate(toy_config(task="evaluate", run_name="two", num_eval_images=4, reward_fn="colour"))
    found = compared(monkeypatch, tmp_path, one, two).texts
    assert "tests.helpers.toy_rewards:contrast" in found and "reward" not in found


@pytest.mark.parametrize("case", ["missing", "empty", "twice", "others"])
def test_what_cannot_be_compared_is_one_line(toy_config, tmp_path, monkeypatch, case):
    one = evaluate(toy_config(task="evaluate", run_name="one", num_eval_images=4))
    (tmp_path / "empty").mkdir()
    others = {"missing": tmp_path / "no", "empty": tmp_path / "empty", "twice": one}
    if case == "others":
        others[case] = evaluate(toy_config(task="evaluate", run_name="two", num_eval_images=2))
    message = {
        "missing": "is not a folder", "empty": "holds no evaluation", "twice": "is named twice",
        "others": "evaluate both with the same eval_prompt_fn",
    }[case]  # fmt: skip
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        compared(monkeypatch, tmp_path, one, others[case])
