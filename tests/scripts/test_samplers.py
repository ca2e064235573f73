"""scripts/bench/samplers.py: what counts as good enough, and a table that is continued."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from scripts.bench import samplers

PROMPTS = (
    "a red circle on a blue background",
    "two green squares on a white background",
    "a blue triangle on a red background",
)


def test_the_mean_has_its_standard_error():
    mean, error = samplers.mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and error == pytest.approx(math.sqrt(5 / 3) / 2)


@pytest.mark.parametrize(("shift", "enough"), [(0.0, True), (0.5, True), (-0.1, True), (-3.0, False)])
@pytest.mark.parametrize("name", ["rating", "obedience"])
def test_no_measure_may_be_below_the_references_by_more_than_the_errors(name, shift, enough):
    reference = {"rating": [4.0, 5.0, 6.0], "obedience": [0.0, 1.0, 1.0]}
    found = {**reference, name: [value + shift for value in reference[name]]}
    assert samplers.is_enough(found, reference) is enough


def test_a_table_is_continued(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samplers, "REFERENCE", ("ddim", "", 2))
    monkeypatch.setattr(samplers, "SAMPLERS", [("HeunDiscrete", "")])
    monkeypatch.setattr(samplers, "STEPS", (2,))
    monkeypatch.setattr(samplers, "BATCH", 2)
    monkeypatch.setattr(samplers, "load_prompts", lambda *args: SimpleNamespace(prompts=PROMPTS))
    out = tmp_path / "samplers.json"
    monkeypatch.setattr(sys, "argv", ["samplers.py", "--seeds", "2", "--prompts", "1", "--out", str(out)])
    samplers.main()
    first, results = capsys.readouterr().out, json.loads(out.read_text())
    assert [len(case["rating"]) for case in results.values()] == [2, 2]  # one of the three prompts, two seeds
    assert [case["calls"] for case in results.values()] == [2, 3]
    assert out.with_suffix(".png").exists() and "| HeunDiscrete |" in first
    monkeypatch.setattr(samplers, "measure", None)  # nothing is measured again
    samplers.main()
    assert capsys.readouterr().out == first
