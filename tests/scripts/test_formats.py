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
    small = {"num_eval_images": 2, "per_gpu_capacity": 2, "max_vis_images": 1, "train.num_inference_steps": 2}
    config.update_from_flattened_dict(small | {"num_inference_steps": 2})
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
    out = tmp_path / "out.json"
    words = ["--seeds", "1", "--formats", "", "int8", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["formats.py", *words])
    formats.main()
    runs = json.loads(out.read_text())["runs"]
    plain, packed = runs[""][0], runs["int8"][0]
    assert [row["step"] for row in plain] == [row["step"] for row in packed] == list(formats.SHOWN)
    assert plain[-1]["reward"] != packed[-1]["reward"] and abs(plain[0]["reward"] - packed[0]["reward"]) < 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][-2:] == ["float32", "int8"]


def test_the_table_has_means_and_their_errors():
    judged = {"rewards.tiny_judge:rating": 5.0, "rewards.tiny_judge:obedience": 1.0}
    seeds = [[{"step": s, "reward": r, "rewards": judged} for s in formats.SHOWN] for r in (1.0, 3.0)]
    line = formats.table_of({"": seeds}).splitlines()[-1]
    assert [c.strip() for c in line.split("|")[2:-1]] == ["2.00 ± 1.00"] * 6 + ["5.00 ± 0.00", "1.00 ± 0.00"]
