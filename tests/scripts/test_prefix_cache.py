"""scripts/bench/prefix_cache.py: what it measures, in a run of few and small steps."""

import json
import sys

from scripts.bench import prefix_cache


def test_the_script_runs_to_its_end_and_is_continued(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    small = ["num_inference_steps=6", "num_eval_images=2", "per_gpu_capacity=2"]
    small += ["train.total_batch_size=2", "train.total_samples_per_epoch=2"]
    words = ["--seeds", "1", "--steps", "2", "--intervals", "2", "--json", str(out), "--set", *small]
    monkeypatch.setattr(sys, "argv", ["prefix_cache.py", *words])
    prefix_cache.main()
    first = capsys.readouterr().out
    found = json.loads(out.read_text())["0"]
    assert found.keys() == {"1", "2"} and found["1"]["before"] == found["2"]["before"]
    assert all(len(one["seconds"]) == 1 for one in found.values())  # the first step warms up
    assert 0 < found["2"]["latents"] < 0.5 and 0.5 < found["2"]["cosine"] < 1
    assert found["1"]["after"] != found["2"]["after"]
    monkeypatch.setattr(prefix_cache, "race", None)  # nothing is measured again
    prefix_cache.main()
    assert capsys.readouterr().out == first


def test_the_table_has_ratios_and_gains():
    side = {"before": 4.0, "after": 6.0, "seconds": [2.0, 2.0]}
    quick = {"before": 4.0, "after": 5.0, "seconds": [1.0, 1.0], "latents": 0.1, "cosine": 0.9}
    off, on = prefix_cache.table({0: {1: side, 3: quick}, 1: {1: side, 3: quick | {"after": 7.0}}}).splitlines()[2:]
    assert [cell.strip() for cell in off.split("|")[1:-1]] == [
        "off",
        "2.00",
        "1.00",
        "0.0000",
        "1.0000",
        "+2.000 ± 0.000",
    ]
    assert [cell.strip() for cell in on.split("|")[1:-1]] == ["3", "1.00", "0.50", "0.1000", "0.9000", "+2.000 ± 1.000"]
