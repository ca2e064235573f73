"""FSDP2 on two CPU processes against one process: gradients, weights, checkpoints, and what is refused."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ml_collections import ConfigDict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from alignprop.engine.sharding import check_engine, check_policy, gather, shard
from alignprop.lora.factors import add_lora
from alignprop.models.sd import StableDiffusion
from alignprop.settings.errors import ConfigError
from alignprop.settings.memory_policies import POLICIES, MemoryPolicy
from alignprop.trainer import AlignPropTrainer
from tests.cli.test_main import flags
from tests.distributed.test_accelerate_configs import launch
from tests.helpers import warm

ROOT = Path(__file__).resolve().parents[2]


def two_processes(*script):
    """Runs a script on two processes, in the environment that `accelerate launch` makes of fsdp2.yaml."""
    of_the_file = launch("fsdp2.yaml")[1]
    done = warm.call("tests/helpers/fsdp2_on_cpu.py", *script, processes=2, environment=of_the_file)
    assert done.returncode == 0, done.stderr


def train(config):
    """A whole run; its first gradient, and how much of the denoiser this process holds."""
    trainer, gradients = AlignPropTrainer(config), []
    clip = trainer.run.accelerator.clip_grad_norm_

    def record(parameters, max_norm):
        gradients.append(gather([p.grad for p in parameters]))
        return clip(parameters, max_norm)

    trainer.run.accelerator.clip_grad_norm_ = record
    trainer.train()
    denoiser = trainer.run.model.denoiser
    return {
        "gradient": torch.cat([g.flatten() for g in gradients[0]]),
        "held": sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in denoiser.parameters()),
        "trained": sum(p.numel() * 4 for p in trainer.weights.parameters),
        "units": [type(module).__name__ for module in denoiser.modules() if isinstance(module, FSDPModule)],
    }


def exact_gradient(config, folder):
    """That of the first step in float64."""
    trainer, gradients = AlignPropTrainer(config, model=InDouble.load(str(folder), dtype=torch.float64)), []
    trainer.run.model.denoiser.double()
    trainer.weights.sum_dtype = torch.float64
    trainer.weights.zero_grad()
    trainer.run.accelerator.clip_grad_norm_ = lambda parameters, _: gradients.extend(p.grad for p in parameters) or 1.0
    trainer.step()
    return torch.cat([gradient.flatten() for gradient in gradients])


def worker(tmp_path):
    """What each of two processes does: the runs of configs.json, one after the other."""
    Accelerator.end_training = lambda self: None  # which would end the connection between them
    configs = json.loads((tmp_path / "configs.json").read_text())
    found = {name: train(ConfigDict(config)) for name, config in configs.items()}
    torch.save(found, tmp_path / f"found_{os.environ['RANK']}.pt")


class InDouble(StableDiffusion):
    def init_latents(self, generators):
        return super().init_latents(generators).double()


def relative_difference(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def checkpoint(tmp_path, run, step):
    return tmp_path / "logs" / run / "checkpoints" / f"checkpoint_{step}"


def usable_weights(tmp_path, run, step):
    tensors = load_file(next(checkpoint(tmp_path, run, step).rglob("*.safetensors")))
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def training_state(tmp_path, run, step):
    return torch.load(checkpoint(tmp_path, run, step) / "training_state.pt", weights_only=True)


def rows(tmp_path, run):
    return [json.loads(line) for line in (tmp_path / "logs" / run / "metrics.jsonl").read_text().splitlines()]


def layout(nested):
    """What a training state is made of, without its numbers."""
    if isinstance(nested, dict):
        return {key: layout(value) for key, value in nested.items()}
    if isinstance(nested, list):
        return [layout(value) for value in nested]
    return (nested.dtype, nested.shape) if isinstance(nested, torch.Tensor) else type(nested)


def test_one_process_and_fsdp2_make_the_same_run(toy_config, tmp_path, deeper_pipeline):
    """A LoRA, and all weights: these from the start, continued by one process, and continuing what one began."""
    options = {
        "num_inference_steps": 3, "per_gpu_capacity": 1, "train__total_samples_per_epoch": 4, "eval_freq": 1,
        "num_eval_images": 2, "eval_reward_fn": "", "eval_base_distance": True, "train__ema_decay": 0.5,
        "timeout_minutes": 1.0, "pretrained__model": deeper_pipeline,
        "channels_last": False,  # other kernels round otherwise, and what is spread cannot have it
        "train__adam_epsilon": 1e-3,  # or Adam divides a gradient that is nothing but rounding by itself
    }  # fmt: skip
    expected, exact, configs = {}, {}, {}
    for kind, use_lora in (("lora", True), ("full", False)):
        make = lambda run, epochs, kind=kind, use_lora=use_lora, **more: toy_config(  # noqa: E731
            run_name=f"{kind}_{run}", num_epochs=epochs, use_lora=use_lora, **options, **more
        )
        expected[kind] = train(make("whole", 2 if kind == "lora" else 4))
        exact[kind] = exact_gradient(make("exact", 4), deeper_pipeline)
        configs[kind] = make("sharded", 2).to_dict()
        if kind == "full":
            train(make("half", 2))
            configs["full_again"] = make("half", 4, resume_from=str(tmp_path / "logs" / "full_half")).to_dict()
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    two_processes("tests/distributed/test_sharding.py", tmp_path)
    train(toy_config(num_epochs=4, use_lora=False, resume_from=str(tmp_path / "logs" / "full_sharded"), **options))

    found = [torch.load(tmp_path / f"found_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind in ("lora", "full"):
        assert_held_in_halves([process[kind] for process in found], expected[kind], is_whole=kind == "lora")
        # Both are rounded, and differ as much from each other: what counts is how far they are from the exact one.
        gradients = (found[0][kind]["gradient"].double(), expected[kind]["gradient"].double())
        errors = [relative_difference(gradient, exact[kind]) for gradient in gradients]
        assert errors[0] <= 2 * errors[1] and max(errors) <= 2e-6  # which rounds better depends on the processor
        assert torch.equal(found[0][kind]["gradient"], found[1][kind]["gradient"])
        assert_same_run(tmp_path, f"{kind}_sharded", f"{kind}_whole", range(1, 3 if kind == "lora" else 5))
    assert_same_run(tmp_path, "full_half", "full_whole", range(3, 5))
    files = [checkpoint(tmp_path, run, 2) / "denoiser" / "config.json" for run in ("full_sharded", "full_whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_averages_are_saved(tmp_path, "full_sharded", 2)


def assert_held_in_halves(processes, alone, is_whole):
    whole = alone["trained"] if is_whole else 0  # bytes
    for process in processes:
        assert (process["held"] - whole) / (alone["held"] - whole) == pytest.approx(0.5, abs=0.01)
        assert {"FSDPUNet2DConditionModel", "FSDPBasicTransformerBlock", "FSDPResnetBlock2D"} <= set(process["units"])


def assert_averages_are_saved(tmp_path, run, step):
    saved = load_file(next((checkpoint(tmp_path, run, step) / "denoiser").glob("*.safetensors")))
    state = training_state(tmp_path, run, step)
    averages = dict(zip(state["weights"], state["ema"]["shadow_params"], strict=True))
    assert saved.keys() == averages.keys() and all(torch.equal(saved[name], averages[name]) for name in saved)
    assert not torch.equal(saved["conv_in.weight"], state["weights"]["conv_in.weight"])


def assert_same_run(tmp_path, run, whole, steps):
    for step in steps:
        ours, theirs = usable_weights(tmp_path, run, step), usable_weights(tmp_path, whole, step)
        assert relative_difference(ours, theirs) <= 1e-6
        # All that a step changes is small beside the weights: its difference is measured against the change, too.
        change = usable_weights(tmp_path, whole, steps[-1]) - usable_weights(tmp_path, whole, 1)
        assert (ours - theirs).norm() <= 1e-4 * change.norm()
        assert layout(training_state(tmp_path, run, step)) == layout(training_state(tmp_path, whole, step))
    for ours, theirs in zip(rows(tmp_path, run), rows(tmp_path, whole), strict=True):
        for name in ("reward", "loss", "grad_norm") if ours["kind"] == "train" else ("reward",):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


def test_main_trains_all_weights_in_half_precision(toy_config, tmp_path):
    """Gathered in bfloat16, trained and averaged in float32; the gradient is that of one process but for rounding."""
    options = {
        "use_lora": False, "mixed_precision": "bf16", "num_epochs": 1, "eval_reward_fn": "", "timeout_minutes": 1.0,
        "num_eval_images": 5,  # the second process has none of the last two
    }  # fmt: skip
    two_processes("main.py", *flags(toy_config(run_name="sharded", **options)))
    train(toy_config(run_name="alone", **options))
    resolved = json.loads((tmp_path / "logs" / "sharded" / "config.json").read_text())
    assert resolved["train"]["gradient_accumulation_steps"] == 1
    norms = [[r["grad_norm"] for r in rows(tmp_path, run) if r["kind"] == "train"] for run in ("sharded", "alone")]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert usable_weights(tmp_path, "sharded", 2).dtype == torch.float32


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_the_engine_is_told(deeper_pipeline, use_lora):
    """Only here: half precision and a file without a wrap policy. `prepare` gets it all, and nothing of it stays."""
    denoiser, told = StableDiffusion.load(deeper_pipeline).denoiser, []
    if use_lora:
        add_lora(denoiser, rank=2, alpha=2, target_modules=["to_q"], seed=0)
    else:
        denoiser.requires_grad_(True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="fp16")
    state = SimpleNamespace(fsdp_plugin=plugin)
    prepare = lambda model, optimizer: told.append(state.fsdp_plugin) or (model, optimizer)  # noqa: E731
    assert shard(SimpleNamespace(state=state, prepare=prepare), denoiser, "optimizer") == "optimizer"
    policy, ignored = told[0].mixed_precision_policy, told[0].ignored_modules
    assert policy.param_dtype == torch.float16 and policy.reduce_dtype == torch.float32
    assert policy.output_dtype is None and not policy.cast_forward_inputs
    assert told[0].auto_wrap_policy is transformer_auto_wrap_policy
    assert set(told[0].transformer_cls_names_to_wrap) == {
        "BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
    }  # fmt: skip
    adapter = [p for module in ignored or () for p in module.parameters()]
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    assert {id(p) for p in adapter} == ({id(p) for p in trained} if use_lora else set())
    assert state.fsdp_plugin is plugin and plugin.ignored_modules is None and plugin.auto_wrap_policy is None


def fake_accelerator(kind, plugin=None):
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, state=state, mixed_precision="bf16", is_main_process=True)


@pytest.mark.parametrize(("kind", "plugin", "optimizer", "message"), [
    ("DEEPSPEED", {}, "adamw", "distributed_type = DEEPSPEED is not supported; use MULTI_GPU or FSDP"),
    ("FSDP", {"fsdp_version": 1}, "adamw", "fsdp_version = 1 is not supported; it must be 2"),
    ("FSDP", {"cpu_offload": True}, "adamw", "fsdp_offload_params = True is not supported; it must be False"),
    ("FSDP", {"cpu_ram_efficient_loading": True}, "adamw", "fsdp_cpu_ram_efficient_loading = True is not supported"),
    ("FSDP", {"ignored_modules": "conv_in"}, "adamw", "fsdp_ignored_modules = conv_in is not supported"),
    ("FSDP", {"activation_checkpointing": True}, "adamw", "use memory.block_checkpointing"),
    *(("FSDP", {}, name, f"train.optimizer = '{name}' cannot train weights that FSDP2 has spread")
      for name in ("adafactor", "adamw8bit", "prodigy")),
])  # fmt: skip
def test_what_cannot_work_is_refused(monkeypatch, kind, plugin, optimizer, message):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # accelerate writes it
    made = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
    with pytest.raises(ConfigError, match=message):
        check_engine(fake_accelerator(DistributedType[kind], made), use_lora=False, optimizer=optimizer)


def test_a_text_encoder_is_not_trained_under_fsdp(monkeypatch):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(ConfigError, match=r"^train_text_encoder = True is not supported under FSDP"):
        check_engine(fake_accelerator(DistributedType.FSDP, plugin), True, "adamw", train_text_encoder=True)
    check_engine(fake_accelerator(DistributedType.MULTI_GPU, plugin), True, "adamw", train_text_encoder=True)


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_works_is_not_refused(use_lora, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    for kind in (DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.NO):
        check_engine(fake_accelerator(kind, plugin), use_lora, "adafactor" if use_lora else "sgd")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("memory", "compiled", "channels_last", "field"), [
    (MemoryPolicy(keep_steps=2), False, None, "memory.keep_steps = 2"),
    (POLICIES["small"], False, None, "memory.residency = 'phase'"),
    (POLICIES["fast"], True, None, "compile = True"),
    (POLICIES["fast"], False, True, "channels_last = True"),
])  # fmt: skip
def test_what_gathered_weights_cannot_have_is_refused(memory, compiled, channels_last, field):
    with pytest.raises(ConfigError, match=f"^{field} does not work with FSDP2; it must be"):
        check_policy(fake_accelerator(DistributedType.FSDP), memory, compiled, channels_last)
    check_policy(fake_accelerator(DistributedType.MULTI_GPU), memory, compiled, channels_last)
    check_policy(fake_accelerator(DistributedType.FSDP), POLICIES["balanced"], False, None)


def test_another_precision_in_accelerates_file_is_overruled_with_a_warning(monkeypatch, capsys):
    for theirs, warned in (("no", False), ("bf16", False), ("fp16", True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", theirs)
        check_engine(fake_accelerator(DistributedType.NO), True, "adamw")
        assert ("warning: accelerate's mixed_precision = 'fp16' has no effect" in capsys.readouterr().err) == warned


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
