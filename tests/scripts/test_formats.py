"""scripts/bench/formats.py: what it compares, and a run of few and small steps."""

import json
import sys

from config.align_prop import get_config
from scripts.bench import formats
from tests.helpers.shaped import gradients, random_network, sdxl_shaped


def small_networks():
    facts = sdxl_shaped(width=32, layers=1)
    _, x = random_network(facts)
    yield "small", lambda: formats.with_lora(random_network(facts)[0]), lambda network: gradients(network, x)


def small_preset(name):
    config = get_config(name)
    small = {"num_eval_images": 2, "max_vis_images": 1, "train.num_inference_steps": 2, "num_inference_steps": 2}
    few = {"per_gpu_capacity": 2, "train.total_batch_size": 2, "train.total_samples_per_epoch": 4}
    config.update_from_flattened_dict(small | few)
    return config


def test_gradients_alone(monkeypatch, capsys):
    monkeypatch.setattr(formats, "networks", small_networks)
    monkeypatch.setattr(sys, "argv", ["formats.py", "--gradients"])
    formats.main()
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split("|")[3].strip() == "error of the output"
    cells = {line.split("|")[2].strip(): [float(cell) for cell in line.split("|")[3:-1]] for line in lines}
    assert 0 < cells["int8"][0] < cells["int4"][0] < cells["nf4"][0]
    assert 1 > cells["int8"][1] > cells["int4"][1] > 0.8


def test_an_alignment_on_each_format(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "networks", lambda: ())
    monkeypatch.setattr(formats, "get_config", small_preset)
    monkeypatch.setattr(formats, "SHOWN", (1, 2))
    out = tmp_path / "out.json"
    words = ["--seeds", "1", "--formats", "int8", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["formats.py", *words])
    formats.main()
    runs = json.loads(out.read_text())["runs"]
    found = [(row["kind"], row["step"]) for row in runs["int8"][0]]
    assert found == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][-1:] == ["int8"]


def test_the_table_has_means_and_their_errors():
    judged = {formats.JUDGE + "rating": 5.0, formats.JUDGE + "obedience": 1.0}

    def rows(reward):
        evaluations = [{"kind": "eval", "step": s, "reward": reward + s, "rewards": judged} for s in (0, 10)]
        return evaluations + [{"kind": "train", "step": s, "reward": reward} for s in formats.SHOWN]

    line = formats.table_of({"": [rows(1.0), rows(3.0)]}).splitlines()[-1]
    in_training, judged = ["2.00 ± 1.00"] * len(formats.SHOWN), ["5.00 ± 0.00", "1.00 ± 0.00"]
    assert [c.strip() for c in line.split("|")[2:-1]] == [*in_training, "2.00 ± 1.00", "12.00 ± 1.00", *judged]
