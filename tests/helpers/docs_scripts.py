"""What makes the documents' commands of scripts/ small: what is put behind them, and what is smaller around them."""

from alignprop.method import estimators
from alignprop.tasks import plan
from config import align_prop
from config.align_prop import get_config
from tests.helpers.docs_stand_ins import as_flags


def as_it_is(stand_ins, monkeypatch) -> list[str]:
    return []


def like_trl(stand_ins, monkeypatch) -> list[str]:
    return as_flags(stand_ins.fields(get_config("aesthetic")))


def quickstart(stand_ins, monkeypatch) -> list[str]:
    return as_flags(stand_ins.fields(get_config("quickstart")))


def one_family(stand_ins, monkeypatch) -> list[str]:
    """Its model of full size, which is only planned, is planned as a small one."""
    compare_policies = plan.compare_policies

    def plan_small(config):
        config.update_from_flattened_dict({**stand_ins.fields(config), "reward_fn": "colour", "memory_policy": "fast"})
        return compare_policies(config)

    monkeypatch.setattr(plan, "compare_policies", plan_small)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # which the script sets, and leaves so
    return ["z_image"]


def two_estimators(stand_ins, monkeypatch) -> list[str]:
    """With random weights, whose gradients are found sooner than the bundled model's."""

    def small(preset):
        config = get_config(preset)
        config.pretrained.model = str(stand_ins.random_model("sd"))
        return config

    monkeypatch.setattr(align_prop, "get_config", small)
    for name in estimators.ESTIMATORS.keys() - {"full", "randomized"}:
        monkeypatch.delitem(estimators.ESTIMATORS, name)
    return ["--batches=2", "--steps=2"]


def one_reward(stand_ins, monkeypatch) -> list[str]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the script sets, and leaves so
    return ["clip"]


def one_test_file(stand_ins, monkeypatch) -> list[str]:
    return ["-n", "0", "tests/unit/test_losses.py"]


# Script: what is put behind its command, and what it then leaves in the folder, if anything.
SMALLER = {
    "scripts/alignprop_like_trl.py": (like_trl, "logs/aesthetic_*/checkpoints/checkpoint_1"),
    "scripts/bench/families.py": (one_family, ""),
    "scripts/config_docs.py": (as_it_is, ""),
    "scripts/gradient_table.py": (two_estimators, ""),
    "scripts/install_hps.sh": (as_it_is, "pip.txt"),
    "scripts/push_to_hub.py": (as_it_is, ""),
    "scripts/reward_table.py": (one_reward, ""),
    "scripts/run.sh": (quickstart, "logs/quickstart_*/before_after.png"),
    "scripts/test.sh": (one_test_file, ""),
}
# Minutes however small they are made: which tests call their main(), with stand-ins for what takes so long.
ELSEWHERE = {
    "scripts/bakeoff/run.py": "tests/scripts/test_bakeoff.py",
    "scripts/bench/formats.py": "tests/scripts/test_formats.py",
    "scripts/bench/gpu.py": "tests/scripts/test_gpu_bench.py",
    "scripts/bench/prefix_cache.py": "tests/scripts/test_prefix_cache.py",
    "scripts/bench/samplers.py": "tests/scripts/test_samplers.py",
    "scripts/bench/time_to_reward.py": "tests/scripts/test_time_to_reward.py",
    "scripts/check_gpu.py": "tests/scripts/test_check_gpu.py",
    "scripts/compare.py": "tests/runs/test_report.py",
}
