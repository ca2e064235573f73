"""The `hps` preset on files in the formats that people have: a single-file SD, an HPSv2 checkpoint, a LAION head."""

import json

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from alignprop.lora.files import LORA_FILE
from alignprop.runs.checkpoint import checkpoints_of
from alignprop.trainer import AlignPropTrainer
from tests.helpers.reward_files import laion_head, make_clip, make_tokenizer, open_clip_state
from tests.helpers.single_file import make_pipeline, write_single_file


def test_single_file_model_with_hps_and_aesthetic(toy_config, tmp_path):
    folder = make_pipeline(tmp_path / "pipeline")
    model = write_single_file(folder, tmp_path / "model.safetensors")
    make_tokenizer(size=49408).save_pretrained(tmp_path / "tokenizer")
    torch.save({"state_dict": open_clip_state()}, tmp_path / "HPS_v2_compressed.pt")
    make_clip(tmp_path / "clip", projection_dim=768)
    torch.save(laion_head(), tmp_path / "aesthetic-model.pth")
    config = toy_config(
        "hps",
        run_name="r",
        pretrained__model=str(model),
        pretrained__config=str(folder),
        reward_fn="hps:1.0,aesthetic:0.1",
        eval_reward_fn="",
        hps__checkpoint=str(tmp_path / "HPS_v2_compressed.pt"),
        hps__tokenizer=str(tmp_path / "tokenizer"),
        aesthetic__clip=str(tmp_path / "clip"),
        aesthetic__head_file=str(tmp_path / "aesthetic-model.pth"),
        num_epochs=1,
        per_gpu_capacity=4,
    )
    trainer = AlignPropTrainer(config)
    trainer.train()

    rows = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert len(steps) == 2 and all(row["grad_norm"] > 0 for row in steps)
    assert set(steps[0]["rewards"]) == {"hps", "aesthetic"}
    checkpoint = checkpoints_of(trainer.run.folder)[-1]
    assert any(tensor.any() for name, tensor in load_file(checkpoint / LORA_FILE).items() if "lora_B" in name)

    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)

    def picture():
        generator = torch.Generator().manual_seed(0)
        return plain("a cat", num_inference_steps=3, generator=generator, output_type="pt").images

    before = picture()
    plain.load_lora_weights(checkpoint)
    assert not torch.equal(picture(), before)
