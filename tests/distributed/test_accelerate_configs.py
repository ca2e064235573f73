"""The accelerate configurations: what accelerate's own loader and launcher make of them."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from alignprop.settings.resolve import resolve
from config.align_prop import get_config

FOLDER = Path(__file__).resolve().parents[2] / "config" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
# processes, of how many machines, micro-batches per optimizer step of the preset `hps`: 128 samples, 4 at once on a GPU
EXPECTED = {
    "fsdp2.yaml": (8, 1, 4), "one_gpu.yaml": (1, 1, 32), "one_node.yaml": (4, 1, 8), "several_nodes.yaml": (16, 2, 2),
}  # fmt: skip


def launch(name, *options):
    """What `accelerate launch --config_file` derives from a file: its arguments, and the environment of a process."""
    command = ["--config_file", str(FOLDER / name), "--main_process_port", "0", *options, "main.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.multi_gpu or arguments.use_fsdp:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_no_field_that_accelerate_does_not_know(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses unknown fields by itself, but not those of fsdp_config
    known = vars(launch_command_parser().parse_args(["main.py"]))
    assert [field for field in config.fsdp_config if field not in known] == []


@pytest.mark.parametrize("name", FILES)
def test_the_right_accumulation_follows(name):
    arguments, environment = launch(name)
    processes, machines, accumulation = EXPECTED[name]
    assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
    if processes > 1:
        assert int(arguments.nproc_per_node) * machines == processes
    assert resolve(get_config("hps"), processes).train.gradient_accumulation_steps == accumulation
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment


@pytest.mark.parametrize("name", FILES)
def test_precision_is_left_to_the_run(name):
    assert load_config_from_file(str(FOLDER / name)).mixed_precision is None
    assert launch(name)[1]["ACCELERATE_MIXED_PRECISION"] == "no"  # which `Accelerator(mixed_precision=…)` overrides


def test_only_fsdp2_asks_for_sharding(monkeypatch):
    assert [name for name in FILES if "ACCELERATE_USE_FSDP" in launch(name)[1]] == ["fsdp2.yaml"]
    for key, value in launch("fsdp2.yaml")[1].items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is torch.distributed.fsdp.wrap.transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # for alignprop/engine/sharding.py to fill


def test_several_machines_meet_at_the_main_one():
    arguments, _ = launch("several_nodes.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.7")
    endpoint = f"10.0.0.7:{arguments.main_process_port}"
    assert (arguments.rdzv_endpoint, arguments.node_rank, arguments.nnodes) == (endpoint, 1, "2")
