"""The bake-off's bookkeeping on made-up metrics, and one real run of a second."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from alignprop.method.estimators import ESTIMATORS
from alignprop.settings.errors import ConfigError
from scripts.bakeoff.claims import against_ddpo, claims, differences
from scripts.bakeoff.curves import curve, mean_error, samples_to_reach, value_at
from scripts.bakeoff.figures import STYLES, mean_curve
from scripts.bakeoff.report import busy_seconds, table, write_report
from scripts.bakeoff.run import keep_flags, main
from scripts.bakeoff.schedule import METHODS, Bakeoff, BakeRun, Budget, runs_of
from scripts.bakeoff.summary import summarise, values

RUN = BakeRun("full", "jpeg", 0)


def rows_of(rewards, *, step_seconds=2.0, steps=8, batch=8, **measured):
    """The metrics of a run with an evaluation before, and after every `steps` steps; the first step of each epoch
    costs 5 seconds more."""
    rows = []
    for epoch, reward in enumerate(rewards):
        rows += [
            {"kind": "train", "step": steps * (epoch - 1) + n, "samples": batch * (steps * (epoch - 1) + n),
             "seconds": 99.0, "cpu_seconds": step_seconds + 5 * (n == 1), "active_steps": 3.0}
            for n in range(1, steps + 1) if epoch
        ]  # fmt: skip
        terms = {"clip": 0.5, "rewards.tiny_judge:obedience": 0.75, "jpeg_compressibility": -2.0}
        rows.append({"kind": "eval", "step": steps * epoch, "reward": reward, "rewards": terms, **measured})
    return rows


def point(samples, seconds, reward, **more):
    return {"samples": samples, "seconds": seconds, "reward": reward, **more}


def write(folder, run, rows):
    (folder / run.name).mkdir(parents=True, exist_ok=True)
    (folder / run.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- curves


def test_a_curve_counts_samples_and_processor_seconds_without_what_evaluations_leave_to_the_next_step():
    points = curve(rows_of([1.0, 2.0, 4.0], diversity=0.3, base_distance=None))
    assert [p["samples"] for p in points] == [0, 64, 128]
    assert [p["seconds"] for p in points] == [0, 16, 32]
    assert [p["reward"] for p in points] == [1, 2, 4]
    assert points[2]["obedience"] == 0.75 and points[2]["diversity"] == 0.3 and points[2]["active_steps"] == 3
    assert "active_steps" not in points[0]


def test_steps_that_all_follow_an_evaluation_count_as_they_are():
    assert [p["seconds"] for p in curve(rows_of([1.0, 2.0], steps=1))] == [0, 7]


def test_the_first_step_of_a_process_is_not_counted_as_it_is():
    assert curve(rows_of([1.0, 2.0])[1:])[-1]["seconds"] == 16


def test_a_step_without_processor_seconds_counts_those_of_the_clock():
    rows = [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in rows_of([1.0, 2.0])]
    assert curve(rows)[-1]["seconds"] == 8 * 99


def test_an_evaluation_without_a_finite_reward_is_no_point():
    assert [p["samples"] for p in curve(rows_of([1.0, None, 3.0]))] == [0, 128]


def test_values_lie_on_lines_between_evaluations_and_nowhere_else():
    points = [point(0, 0.0, 1.0), point(64, 10.0, 2.0, obedience=0.5), point(128, 20.0, 6.0, obedience=0.7)]
    assert value_at(points, "samples", 96, "reward") == 4
    assert value_at(points, "seconds", 5, "reward") == 1.5
    assert value_at(points, "samples", 128, "obedience") == 0.7
    assert value_at(points, "samples", 129, "reward") is None
    assert value_at(points, "samples", 64, "diversity") is None
    assert value_at([], "samples", 0, "reward") is None


def test_mean_and_standard_error():
    found = mean_error([1.0, None, 3.0, 5.0])
    assert found == {"mean": 3.0, "stderr": pytest.approx(2 / math.sqrt(3)), "n": 3}
    assert mean_error([4.0])["stderr"] is None and mean_error([None]) is None


def test_samples_to_reach_a_reward():
    points = [point(0, 0, 1.0), point(64, 1, 2.0), point(128, 2, 6.0)]
    assert samples_to_reach(points, 4.0) == (128, 96.0)
    assert samples_to_reach(points, 2.0) == (64, 64.0)
    assert samples_to_reach(points, 0.5) == (0, 0.0)
    assert samples_to_reach(points, 6.1) is None


# ---- which runs, and how much of them is left


def test_whole_seeds_come_first_and_methods_are_side_by_side():
    runs = runs_of(["full", "ddpo"], ["jpeg", "aesthetic_clip"], 2)
    assert [run.name for run in runs[:4]] == [
        "full-jpeg-0", "full-aesthetic_clip-0", "ddpo-jpeg-0", "ddpo-aesthetic_clip-0",
    ]  # fmt: skip
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert [*ESTIMATORS, "ddpo"] == METHODS and set(STYLES) <= set(METHODS)


@pytest.mark.parametrize(("rewards", "seconds", "covered", "epochs"), [
    ([], 30, False, 2),  # nothing is known: as many as the samples take
    ([1.0], 30, False, 2),
    ([1.0, 2.0], 30, False, 2),
    ([1.0, 2.0, 3.0], 30, True, 2),
    ([1.0, 2.0], 40, False, 3),  # 16 seconds an epoch
    ([1.0, 2.0, 3.0], 40, False, 3),
    ([1.0, 2.0, 3.0, 4.0], 40, True, 3),
])  # fmt: skip
def test_a_run_goes_on_until_both_budgets_are_covered(tmp_path, rewards, seconds, covered, epochs):
    if rewards:
        write(tmp_path, RUN, rows_of(rewards))
    bakeoff = Bakeoff(tmp_path, [RUN], Budget(samples=128, seconds=seconds), [])
    assert bakeoff.is_covered(RUN) == covered
    assert bakeoff.epochs(RUN) == epochs


def test_a_seed_that_has_not_begun_takes_its_length_from_the_others(tmp_path):
    runs = runs_of(["full", "refl"], ["jpeg"], 2)
    write(tmp_path, runs[0], rows_of([1.0, 2.0]))
    bakeoff = Bakeoff(tmp_path, runs, Budget(seconds=60), [])
    assert [bakeoff.epochs(run) for run in runs] == [4, 2, 4, 2]
    assert bakeoff.work() == (16, 16 * (4 + 2 + 4 + 2))
    write(tmp_path, runs[2], rows_of([1.0, 2.0], step_seconds=4.0))
    bakeoff = Bakeoff(tmp_path, runs, Budget(seconds=60), [])
    assert [bakeoff.epochs(run) for run in runs] == [4, 2, 2, 2]  # its own, where it has begun


def test_ddpo_has_a_budget_of_its_own(tmp_path):
    run = BakeRun("ddpo", "jpeg", 0)
    write(tmp_path, run, rows_of([1.0] * 4))
    bakeoff = Bakeoff(tmp_path, [run], Budget(samples=128, seconds=1, ddpo_samples=1600), [])
    assert not bakeoff.is_covered(run) and bakeoff.epochs(run) == 25
    assert Bakeoff(tmp_path, [run], Budget(samples=192, seconds=1, ddpo_samples=0), []).is_covered(run)
    assert not Bakeoff(tmp_path, [run], Budget(samples=256, seconds=1, ddpo_samples=0), []).is_covered(run)


def test_the_flags_name_preset_reward_and_place(tmp_path):
    flags = RUN.flags(tmp_path, 64, 3)
    assert flags[0] == "--config=config/align_prop.py:quickstart"
    assert {
        "--config.estimator=full", "--config.reward_fn=jpeg_proxy", "--config.num_epochs=3", "--config.seed=0",
        f"--config.log_dir={tmp_path}", "--config.run_name=full-jpeg-0", "--config.resume_from=latest",
        "--config.train.total_samples_per_epoch=64",
    } <= set(flags)  # fmt: skip
    ddpo = BakeRun("ddpo", "aesthetic_clip", 1).flags(tmp_path, 64, 25)
    assert ddpo[0] == "--config=config/ddpo.py:tiny" and "--config.eval_freq=3" in ddpo
    assert not any("estimator" in flag for flag in ddpo)


# ---- processes; instead of main.py a line of Python


class Pretend(Bakeoff):
    """Its processes do what `does[run.name]` says with `rows`, the file to write metrics to."""

    def __init__(self, *arguments, does):
        super().__init__(*arguments)
        self.does, self.started = does, []

    def command(self, run):
        self.started.append(run.name)
        file = self.folder / run.name / "metrics.jsonl"
        code = f"import os, sys, time, pathlib; file = pathlib.Path({str(file)!r}); {self.does[run.name]}"
        return [sys.executable, "-c", code]


def epoch_more(seconds=10.0):
    """Appends an evaluation, and before it an epoch where there was one already."""
    row = {"kind": "eval", "reward": 1.0, "rewards": {}}
    train = {"kind": "train", "seconds": 99.0, "cpu_seconds": seconds}
    return (
        "file.parent.mkdir(exist_ok=True); n = file.read_text().count('eval') if file.exists() else 0; "
        f"first, train, last = {row!r}, {train!r}, {row!r}; import json; "
        "add = ([first] if not n else []) + [{**train, 'samples': 64 * max(n, 1)}, last]; "
        "file.open('a').write(''.join(json.dumps(row) + chr(10) for row in add))"
    )


def test_runs_go_on_until_covered_and_a_failed_one_does_not_hold_up_the_others(tmp_path):
    runs = runs_of(["full", "refl", "sparse", "bridge"], ["jpeg"], 1)
    does = {
        "full-jpeg-0": "print('loading'); print('error: it is Monday'); print('bye'); sys.exit(1)",
        "refl-jpeg-0": epoch_more(),
        "sparse-jpeg-0": "pass",
    }
    write(tmp_path, runs[3], rows_of([1.0, 2.0, 3.0]))
    bakeoff = Pretend(tmp_path, runs, Budget(samples=64, seconds=20), [], does=does)
    failed = bakeoff.run(jobs=1)
    assert bakeoff.started == ["full-jpeg-0", "refl-jpeg-0", "refl-jpeg-0", "sparse-jpeg-0"]
    assert [line.split(" (see")[0] for line in failed] == [
        "full-jpeg-0: exit status 1: it is Monday", "sparse-jpeg-0: ended without a further evaluation",
    ]  # fmt: skip
    assert bakeoff.is_covered(runs[1])
    assert busy_seconds(tmp_path)[0] == pytest.approx(busy_seconds(tmp_path)[1])


def test_a_run_that_was_asked_to_stop_goes_on(tmp_path):
    stops_once = f"{epoch_more(0.0)}; sys.exit(75 if n == 0 else 0)"
    bakeoff = Pretend(tmp_path, [RUN], Budget(samples=128, seconds=0), [], does={RUN.name: stops_once})
    assert bakeoff.run(jobs=2) == [] and bakeoff.started == [RUN.name] * 2


def test_ctrl_c_asks_the_processes_to_stop_and_waits_for_them(tmp_path, monkeypatch, ctrl_c):
    does = {RUN.name: "import signal; signal.signal(15, lambda *_: (time.sleep(0.3), os._exit(75))); "
                      "print('ready', flush=True); time.sleep(60)"}  # fmt: skip
    bakeoff = Pretend(tmp_path, [RUN], Budget(), [], does=does)
    ready = lambda: bakeoff.log(RUN).exists() and "ready" in bakeoff.log(RUN).read_text()  # noqa: E731
    monkeypatch.setattr(bakeoff, "work", lambda: os.kill(os.getpid(), signal.SIGINT) if ready() else (0.0, 1.0))
    with pytest.raises(KeyboardInterrupt):
        bakeoff.run(jobs=1)
    last = json.loads((tmp_path / "processes.jsonl").read_text())
    assert last["exit_status"] == 75 and last["run"] == RUN.name


def test_a_run_that_another_process_still_has_is_left_until_that_ends(tmp_path):
    import fcntl

    bakeoff = Bakeoff(tmp_path, [RUN], Budget(), [])
    assert not bakeoff.is_held(RUN)
    write(tmp_path, RUN, [])
    with open(tmp_path / RUN.name / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bakeoff.is_held(RUN)
    assert not bakeoff.is_held(RUN)


def test_others_go_first_meanwhile(tmp_path, monkeypatch):
    runs = runs_of(["full", "refl"], ["jpeg"], 1)
    bakeoff = Pretend(tmp_path, runs, Budget(64, 0), [], does={run.name: epoch_more() for run in runs})
    monkeypatch.setattr(bakeoff, "is_held", lambda run: run == runs[0] and not bakeoff.curves[runs[1]])
    assert bakeoff.run(jobs=2) == [] and bakeoff.started == ["refl-jpeg-0", "full-jpeg-0"]


def test_one_folder_has_one_set_of_flags(tmp_path):
    keep_flags(tmp_path / "a", ["--config.eta=1"])
    keep_flags(tmp_path / "a", ["--config.eta=1"])
    with pytest.raises(ConfigError, match="name another"):
        keep_flags(tmp_path / "a", [])


def test_time_in_which_any_process_ran(tmp_path):
    spans = [(0, 10), (5, 10), (30, 5), (31, 1)]
    rows = [{"run": "", "started": start, "seconds": seconds, "exit_status": 0} for start, seconds in spans]
    (tmp_path / "processes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert busy_seconds(tmp_path) == (20, 26)


# ---- what it comes to

BUDGET = Budget(samples=128, seconds=20)


def made_up(seeds=2):
    """randomized gains 2 an epoch, truncated 1, DDPO 0.1; seed 1 is 1 higher. An epoch is 8 s, of DDPO 40 s."""
    curves = {}
    for seed in range(seeds):
        for method, gain, seconds in (("truncated", 1, 8.0), ("randomized", 2, 16.0)):
            points = [point(64 * n, seconds * n, seed + gain * n, obedience=0.9 - 0.1 * n * gain) for n in range(4)]
            curves["jpeg", method, seed] = points
        curves["jpeg", "ddpo", seed] = [point(192 * n, 120 * n, seed + 0.3 * n, obedience=0.9) for n in range(9)]
    return curves


def test_values_at_both_budgets():
    found = values(made_up()["jpeg", "truncated", 1], BUDGET)
    assert found["reward_at_samples"] == 3 and found["reward_at_seconds"] == 3.5
    assert found["obedience"] == pytest.approx(0.7) and found["step_seconds"] == 1.0 and found["diversity"] is None


def test_the_table_has_the_best_in_bold_and_the_base_model_first():
    lines = table(summarise(made_up(), BUDGET)["jpeg"], BUDGET).splitlines()
    assert lines[0] == "| method | reward at 128 samples | reward at 20 s | obedience | s per 8 samples |"
    assert lines[2] == "| base | 0.5 ± 0.5 | – | 0.9 ± 0 | – |"
    assert lines[3] == "| truncated | 2.5 ± 0.5 | **3 ± 0.5** | 0.7 ± 0 | **1 ± 0** |"
    assert lines[4] == "| randomized | **4.5 ± 0.5** | **3 ± 0.5** | 0.5 ± 0 | 2 ± 0 |"


def test_samples_against_ddpo():
    curves = made_up()
    first = against_ddpo(curves, "jpeg", "randomized")[0]
    assert first["ddpo_samples"] == 1536 and first["samples"] == 128 and first["ratio"] == 12
    assert first["interpolated"] == pytest.approx(1536 / (64 * 1.2))
    for worse in curves["jpeg", "ddpo", 0][1:]:
        worse["reward"] = -1
    assert against_ddpo(curves, "jpeg", "randomized")[0]["ratio"] is None
    for better in curves["jpeg", "ddpo", 1][1:]:
        better["reward"] = 50
    assert against_ddpo(curves, "jpeg", "randomized")[1]["ratio"] is None
    lines = claims(curves, BUDGET, "jpeg", summarise(curves, BUDGET)["jpeg"])[0]
    assert "nothing to reach" in lines[0] and "did not reach DDPO's 50" in lines[1] and lines[2].endswith("no")


def test_ddpo_counts_until_it_collapses():
    curves = made_up(seeds=1)
    for worse in curves["jpeg", "ddpo", 0][5:]:
        worse["reward"] = -3
    (found,) = against_ddpo(curves, "jpeg", "randomized")
    assert found["ddpo_samples"] == 768 and found["target"] == pytest.approx(1.2) and found["samples"] == 64
    lines = claims(curves, BUDGET, "jpeg", summarise(curves, BUDGET)["jpeg"])[0]
    assert "to DDPO's 1.2 after 768 samples, from 0 (its end: -3): 12.0×" in lines[0]


@pytest.mark.parametrize(("gain", "answer"), [(3.0, "yes"), (2.0, "no")])
def test_the_claim_of_fewer_samples(gain, answer):
    curves = made_up(seeds=1)
    curves["jpeg", "randomized", 0] = [point(64 * n, 8.0 * n, gain * n) for n in range(3)]
    curves["jpeg", "ddpo", 0] = [point(1600 * n, 8.0 * n, 2.5 * n) for n in range(2)]
    lines, numbers = claims(curves, BUDGET, "jpeg", summarise(curves, BUDGET)["jpeg"])
    assert f"- (a) randomized: at least 25 times fewer samples with every seed: {answer}" in lines
    assert numbers["against_ddpo"]["randomized"][0]["ratio"] == (25 if answer == "yes" else 12.5)


def test_differences_are_paired_by_seed():
    found = differences(made_up(seeds=3), BUDGET, "jpeg", "randomized", "truncated")
    assert found["reward_at_samples"] == {"mean": 2, "stderr": 0, "n": 3} and found["reward_at_seconds"]["mean"] == 0


def test_the_best_is_named_with_those_that_cannot_be_told_from_it():
    lines, numbers = claims(made_up(), BUDGET, "jpeg", summarise(made_up(), BUDGET)["jpeg"])
    assert numbers["best"]["reward_at_samples"] == {"method": "randomized", "not_told_apart": []}
    assert numbers["best"]["reward_at_seconds"] == {"method": "truncated", "not_told_apart": ["randomized"]}
    assert numbers["best"]["obedience"]["method"] == "truncated"
    assert "- (b) randomized - truncated, paired by seed: 2 ± 0 at 128 samples, 0 ± 0 at 20 s" in lines


def test_curves_are_averaged_over_seeds_where_all_have_an_evaluation():
    curves = made_up()
    curves["jpeg", "truncated", 1].pop()
    assert [p["reward"] for p in mean_curve(curves, "jpeg", "truncated")] == [0.5, 1.5, 2.5]


def test_the_report_is_complete_while_runs_are_missing(tmp_path):
    curves = {**made_up(), ("jpeg", "full", 0): [], ("jpeg", "refl", 0): [point(0, 0.0, 1.0)], ("clip", "full", 0): []}
    text = write_report(tmp_path, curves, BUDGET)
    assert text.startswith("## jpeg") and "| refl | – |" in text and "## clip" not in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md", "results.json", "bakeoff_samples.png", "bakeoff_seconds.png", "bakeoff_quality.png",
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"]["jpeg"]["randomized"]["reward_at_samples"]["mean"] == 4.5


# ---- for real


def test_a_bake_off_from_the_command_line(toy_config, tmp_path, monkeypatch, capsys):
    toy = toy_config().to_dict()
    fields = {name: toy[name] for name in ("prompt_fn", "eval_prompt_fn", "eval_reward_fn", "reward_fn")}
    fields |= {"pretrained.model": toy["pretrained"]["model"], "num_inference_steps": 2, "num_eval_images": 2,
               "eval_diversity": False, "eval_base_distance": False, "per_gpu_capacity": 2,
               "train.total_batch_size": 2}  # fmt: skip
    more = [f"--config.{name}={value}" for name, value in fields.items()]
    budgets = ["--samples=2", "--seconds=0", "--epoch=2", "--seeds=1"]
    chosen = ["--methods=truncated", "--rewards=aesthetic_clip", f"--folder={tmp_path / 'oven'}"]
    monkeypatch.setattr(sys, "argv", ["run.py", *chosen, *budgets, *more])
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert "| truncated |" in capsys.readouterr().out
    assert len((tmp_path / "oven" / "processes.jsonl").read_text().splitlines()) == 1


def test_a_process_ends_with_the_bake_off(tmp_path, monkeypatch):
    """As after kill -9, which leaves no time to end anything."""
    child = tmp_path / "child"
    code = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(Bakeoff, "command", lambda self, run: command)
    bakeoff = Bakeoff(tmp_path, [RUN], Budget(), [])
    if not (parent := os.fork()):
        bakeoff.start(RUN)
        while not (child.exists() and child.read_text()):
            time.sleep(0.01)
        os._exit(0)
    os.waitpid(parent, 0)
    state = Path("/proc") / child.read_text() / "stat"
    for _ in range(500):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    os.kill(int(child.read_text()), signal.SIGKILL)
    pytest.fail("it went on")
