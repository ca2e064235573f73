"""scripts/bench/large_models.py: what it asks the planner, and its table."""

import json
import sys

import pytest

from alignprop.memory.forecast import GIB, Forecast
from scripts.bench import large_models


def test_every_way_of_a_model(tmp_path, monkeypatch, capsys):
    asked = []

    def forecast(build, config, policy, memory, capacity):
        asked.append((config, policy, memory, capacity))
        return Forecast(policy, capacity, {"decode": GIB, "sweep": 2 * GIB}, 3e12, 4e3, GIB, GIB / 2)

    monkeypatch.setattr(large_models, "forecast", forecast)
    monkeypatch.setattr(sys, "argv", ["large_models.py", "--models=sd3", f"--json={tmp_path / 'out.json'}"])
    large_models.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["sd3", way, "2.00", "sweep", "3", "4", "1.5"] for way in large_models.WAYS]
    assert [row["peak"] for row in json.loads((tmp_path / "out.json").read_text())] == [2 * GIB] * len(lines)
    for way, (config, policy, memory, capacity) in zip(large_models.WAYS, asked, strict=True):
        formats = {config.pretrained.quantize, config.pretrained.quantize_text_encoders, config.quantize_rewards}
        assert formats == ({"int4"} if "int4" in way else {""})
        assert (memory.residency == "stream") == ("streaming" in way) and capacity == 1
        assert memory.block_checkpointing and policy == config.memory_policy
        assert memory.decode_activations == ("host" if "host" in way else "device")


def test_a_model_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["large_models.py", "--models=sd15,sd9"])
    with pytest.raises(SystemExit):
        large_models.main()
    assert "--models = sd9 is not one of sd15, sdxl" in capsys.readouterr().err
