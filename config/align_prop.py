"""Presets of reward backpropagation. A preset states only how it differs from `base`.

    accelerate launch main.py --config config/align_prop.py:hps --config.train.learning_rate=5e-4

Every field can be overridden on the command line like `learning_rate` above. A field that is None is derived
after the overrides; `config.json` in the run folder shows the resolved values.
"""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from alignprop.settings.errors import one_of

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"


def base() -> ConfigDict:
    """AlignProp's published hyper-parameters (arXiv 2310.03739, appendix), on Stable Diffusion 1.5."""
    c = ConfigDict()
    c.task = "train"  # "train", "evaluate", "evaluate_soup" or "guide"
    c.algorithm = "align_prop"  # of training: "align_prop" back-propagates the reward; "ddpo" (config/ddpo.py) does not

    # -- the run ---------------------------------------------------------------------------------------------------
    c.run_name = ""  # folder under log_dir; empty: the preset's name and the time
    c.log_dir = "logs"  # where run folders are made
    c.log_with = ""  # extra trackers: "", "wandb", "tensorboard" or "wandb,tensorboard"
    c.seed = 0  # of everything random: noise, prompts, truncation, LoRA initialisation
    c.resume_from = ""  # a checkpoint, a run folder (its newest checkpoint) or "latest"; empty: a new run
    c.save_freq = 1  # epochs between checkpoints; the last epoch is always saved
    c.num_checkpoint_limit = 5  # newest checkpoints kept, besides the best and the one resumed from; 0 keeps all
    c.timeout_minutes = 10.0  # longest wait for another process; a run that waited that long ends with an error
    c.mixed_precision = "fp16"  # "no", "fp16" (with loss scaling) or "bf16"; of frozen weights and network calls
    c.allow_tf32 = True  # TF32 matrix products on NVIDIA GPUs: faster float32, 10-bit mantissa
    c.channels_last = config_dict.placeholder(bool)  # convolutions in NHWC order; None: on a CPU, where it saves 2 to
    # 4 % of the time; on your GPU scripts/bench/gpu.py --variants channels_last measures it
    c.compile = False  # torch.compile of the denoiser's repeated blocks: a minute or more at first, then faster steps
    c.hub = ConfigDict()
    c.hub.repo = ""  # "user/name" on the Hugging Face hub, which gets the best weights and a model card after training;
    # the token is that of HF_TOKEN or of `hf auth login`; empty: no upload
    c.hub.private = False  # True: for its owners' eyes alone; False: for everybody's, but where an organisation's
    # new repositories are private

    # -- the model -------------------------------------------------------------------------------------------------
    c.pretrained = ConfigDict()
    c.pretrained.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub name, folder, .safetensors or .ckpt
    c.pretrained.revision = config_dict.placeholder(str)  # hub branch, tag or commit; None: the newest
    c.pretrained.config = config_dict.placeholder(str)  # for a single file: pipeline folder with its configuration
    c.pretrained.vae = config_dict.placeholder(str)  # hub name or folder of another VAE, such as one for SDXL in fp16
    c.pretrained.without = ""  # what to leave out: "t5" of Stable Diffusion 3, 9 GB, at some loss of long prompts
    c.resolution = config_dict.placeholder(int)  # side of the pictures in pixels; None: the model's own
    c.use_lora = True  # False trains every weight of the denoiser, in float32
    c.train_text_encoder = False  # True: a LoRA of the text encoders too, those that the pipeline's LoRA files hold;
    # prompts are then encoded anew for every micro-batch, instead of once
    c.lora_rank = 4  # rank of each weight change
    c.lora_alpha = config_dict.placeholder(float)  # weight change = alpha / rank · B @ A; None: alpha = rank
    c.lora_target_modules = config_dict.placeholder(tuple)  # endings of the names of adapted layers; None: those of
    # the model's family, its attention; of a text encoder, always the attention

    # -- sampling --------------------------------------------------------------------------------------------------
    c.num_inference_steps = 50  # sampler steps of evaluation, and of training unless train.num_inference_steps is set
    c.guidance_scale = 7.5  # classifier-free guidance; 1 is none and halves the cost of a network call. Of FLUX.1-dev,
    # an input of the network
    c.true_cfg_scale = 1.0  # FLUX.1 only: classifier-free guidance on top of that; 1 is none
    c.eta = 0.0  # noise of the DDIM sampler: 0 deterministic … 1 ancestral

    # -- the estimator ---------------------------------------------------------------------------------------------
    c.estimator = "randomized"  # which steps carry gradient: "full", "truncated", "randomized", "per_step", "draft_lv",
    # "refl", "drtune", "sparse", "bridge", "lagrange" or "leapalign"; docs/estimators.md compares them
    c.trunc_backprop_timestep = config_dict.placeholder(int)  # truncated: first sampler step with gradient; None: last
    c.truncated_backprop_minmax = config_dict.placeholder(tuple)  # randomized, per_step: range of that step, e.g.
    # (0, 50) for K = 1 … 50 of 50 steps; None: the whole chain
    c.plan = ConfigDict()  # of the newer estimators; None: the method's own value, given here
    c.plan.num_active = config_dict.placeholder(int)  # drtune (3), sparse (4), bridge (5), lagrange (2 a leap): steps
    # that carry gradient
    c.plan.exit_window = config_dict.placeholder(float)  # refl (0.25), drtune (0.4): the chain is left in that share of
    # its steps, at the end; 0 … 1
    c.plan.copies = config_dict.placeholder(int)  # draft_lv (2): further noises for the last step
    c.plan.late_bias = config_dict.placeholder(float)  # sparse (1), bridge (4): step i is drawn with weight (i+1)^bias
    c.plan.rescale = config_dict.placeholder(float)  # sparse (0.5), bridge (0): 1 lets the active steps stand for all
    c.plan.coupling = config_dict.placeholder(float)  # bridge (0.5), lagrange (0.1), leapalign (0.3): share of ∂f/∂x
    # that passes the split; 0 … 1
    c.plan.order = config_dict.placeholder(int)  # lagrange (3): supports of a leap
    c.plan.support_scale = config_dict.placeholder(float)  # lagrange (0.25): gradient of supports other than the first
    c.guidance_grad = "both"  # "both" branches of guidance carry gradient; "cond": approximate, half the sweep's cost
    c.adjoint_clip = 0.0  # largest growth of a sample's ∂R/∂x on its way down the chain, as a ratio; 0: off

    # -- the reward ------------------------------------------------------------------------------------------------
    c.reward_fn = "aesthetic"  # "aesthetic", "hps", "pickscore", "imagereward", "clip", "siglip", "count", "colour",
    # "jpeg_proxy"; without gradient "jpeg_compressibility", "jpeg_incompressibility", "count_hard"; of the bundled
    # model "tiny_count"; your own "package.module:callable"; or a sum "hps:1,aesthetic:0.1"; docs/rewards.md
    c.eval_reward_fn = ""  # further rewards measured at evaluation only, comma-separated
    c.loss = "maximise"  # "maximise", "target" (|r - target|) or "ceiling" (max(0, target - r))
    c.loss_target = config_dict.placeholder(float)  # target and ceiling: in units of the reward
    c.reward_combine = "sum"  # of several rewards, each times its weight: their "sum", "mean" or "min"
    c.reward_noise = 0.0  # training: Gaussian noise on the pictures that the reward sees, as a standard deviation in
    # units of [0, 1]; a reward that collapses under it is being fooled
    c.kl_coeff = 0.0  # times the mean squared difference of the denoiser's output to the base model's, added to the
    # loss of a sample after loss_coeff and grad_scale; one more network call with gradient and one without
    c.grad_scale = 1.0  # multiplies the loss of a sample; with loss_coeff, sets gradients against max_grad_norm
    c.aesthetic = ConfigDict()
    c.aesthetic.clip = "openai/clip-vit-large-patch14"  # hub name or folder of the CLIP model under the head
    c.aesthetic.head_repo = "trl-lib/ddpo-aesthetic-predictor"  # hub repository of the head
    c.aesthetic.head_file = "aesthetic-model.pth"  # file in it, or a local .pth or .safetensors
    c.aesthetic.dtype = "float32"  # of its tower: "float32", "bfloat16" or "float16"; less disturbs the gradient
    c.hps = ConfigDict()
    c.hps.version = "v2.1"  # "v2.0" or "v2.1"
    c.hps.checkpoint = config_dict.placeholder(str)  # local file; None: from the hub
    c.hps.tokenizer = "openai/clip-vit-large-patch14"  # hub name or folder with CLIP's vocabulary
    c.hps.dtype = "float32"  # as aesthetic.dtype
    c.hps.backend = "transformers"  # "transformers", or "hpsv2" for the package itself
    c.pickscore = ConfigDict()
    c.pickscore.model = "yuvalkirstain/PickScore_v1"  # hub name or folder of a transformers CLIP trained on picks
    c.pickscore.processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # hub name or folder of its tokenizer and
    # preprocessing
    c.pickscore.dtype = "float32"  # as aesthetic.dtype
    c.imagereward = ConfigDict()
    c.imagereward.checkpoint = config_dict.placeholder(str)  # local ImageReward.pt; None: from the hub
    c.imagereward.tokenizer = "google-bert/bert-base-uncased"  # hub name or folder with uncased BERT's vocabulary
    c.imagereward.dtype = "float32"  # as aesthetic.dtype
    c.clip = ConfigDict()
    c.clip.model = "openai/clip-vit-large-patch14"  # hub name or folder of any transformers CLIP
    c.clip.dtype = "float32"  # as aesthetic.dtype
    c.siglip = ConfigDict()
    c.siglip.model = "google/siglip-base-patch16-224"  # hub name or folder of a SigLIP, or SigLIP 2 of a fixed size
    c.siglip.dtype = "float32"  # as aesthetic.dtype
    c.count = ConfigDict()
    c.count.model = "google/owlvit-base-patch32"  # hub name or folder of an OWL-ViT, OWLv2, YOLOS or DETR detector
    c.count.threshold = config_dict.placeholder(float)  # score from which a box counts; None: the detector's usual
    c.colour = ConfigDict()
    c.colour.target = (0.1, 0.9, 0.5)  # red, green, blue that pictures are to have, each 0 … 1
    c.jpeg = ConfigDict()
    c.jpeg.quality = 95  # of the encoder, 1 … 100, for all jpeg rewards

    # -- prompts and evaluation --------------------------------------------------------------------------------------
    c.prompt_fn = "simple_animals"  # a named prompt set or a text file with one prompt a line
    c.eval_prompt_fn = "eval_simple_animals"  # the same, for evaluation
    c.eval_freq = 1  # epochs between evaluations; 0: only before the first and after the last
    c.resume_from_2 = "stablediffusion"  # evaluate_soup: the second checkpoint; "stablediffusion" is the base model
    c.mixing_coef_1 = (0.0, 0.25, 0.5, 0.75, 1.0)  # evaluate_soup: c, one value or several, 0 … 1
    c.allow_extrapolation = False  # evaluate_soup: c below 0 and above 1 too, which subtracts a checkpoint
    c.soup_mode = "delta"  # "delta" mixes weight changes exactly; "factors" mixes A and B, as the released code does
    c.num_eval_images = 32  # pictures per evaluation; the prompts repeat, each time with other noise
    c.num_eval_prompts = config_dict.FieldReference(16, field_type=int)  # distinct prompts of an evaluation, so that
    # some repeat; None: all there are
    c.eval_diversity = True  # measure how much pictures of a prompt differ: 1 - cosine in the space of clip.model
    c.eval_base_distance = True  # measure the mean squared difference of the denoiser's output to the base model's, on
    # the first 8 pictures at 4 steps each
    c.stop_when = ""  # ends training after an evaluation, e.g. "clip<0.25" or "clip<0.9x" (x: its value at step 0);
    # several, separated by commas; names as in the evaluation's row: rewards, "reward", "diversity", "base_distance"
    c.best_by = ""  # the measure, named likewise, whose highest value makes checkpoints/best; empty: the trained reward
    c.lora_scale = 1.0  # evaluate, guide: multiplies the trained weight change
    c.lora_schedule = "constant"  # evaluate, guide: "linear": the weight change grows from 0 at the first sampler step
    # to lora_scale at the last, which keeps the base model's layout
    c.max_vis_images = 16  # pictures in a sample grid and sent to trackers

    # -- guidance without training (task "guide") ----------------------------------------------------------------------
    c.guide = ConfigDict()
    c.guide.strength = 0.5  # length of a move along the reward's gradient, as a share of the sampler's own step; on
    # average over the window
    c.guide.through = "denoiser"  # gradient through the "denoiser", or through "x0" alone, which takes f for a constant
    c.guide.schedule = "noise"  # of the strength over the window: "constant", "noise" (falls with the share of noise
    # in the latents) or "late" (grows as it falls)
    c.guide.window = (0.0, 1.0)  # from, to: the share of the chain's steps in which latents are moved

    # -- policy gradient (algorithm "ddpo") ----------------------------------------------------------------------------
    c.ddpo = ConfigDict()
    c.ddpo.inner_epochs = 1  # passes over the samples of an epoch
    c.ddpo.clip_range = 1e-4  # the importance ratio counts within 1 ± clip_range
    c.ddpo.adv_clip_max = 5.0  # advantages are clipped to ± this many standard deviations
    c.ddpo.timestep_fraction = 1.0  # share of the sampler steps that an update is made from, drawn anew for each
    c.ddpo.min_noise = 0.0  # steps are trained on whose noise, as a standard deviation of latents, is greater; the last
    # step's, 0.03, hardly shows in a picture, and its gradient is far larger than that of all others
    c.ddpo.per_prompt_buffer = 16  # newest rewards of a prompt, for its mean and deviation; 0: those of the epoch
    c.ddpo.per_prompt_min_count = 16  # prompts with fewer rewards so far use the epoch's mean and deviation

    # -- memory: what to trade for it; `--plan` says what it comes to. Rounding apart, no result changes -------------
    # [prices: SD 1.5 at 512², bf16, 4 samples, CLIP ViT-L; "lean" peaks at 6.4 GiB in the sweep, 6.5 in the decode]
    c.memory_policy = "auto"  # "roomy", "fast", "lean", "balanced", "small" or "smallest": what is None below;
    # "auto": the first of them that fits the GPU, and "fast" on a CPU
    c.memory = ConfigDict()
    c.memory.sweep_chunk = config_dict.placeholder(int)  # samples per network call, 0: all; few leave a GPU idle
    # [1: sweep 6.4 → 3.3 GiB]
    c.memory.decode_chunk = config_dict.placeholder(int)  # samples per decode, reward and backward, 0: all; likewise
    # [1: decode 6.5 → 3.3 GiB]
    c.memory.guidance_batching = config_dict.placeholder(str)  # "joint": both branches in one call; "split": in two of
    # half the size, one after the other [sweep 6.4 → 4.3 GiB]
    c.memory.keep_steps = config_dict.placeholder(int)  # last active steps whose activations are kept instead of
    # computed again [each +3.7 GiB, -0.6 % of the operations of 50 active steps, -1.8 % of those of 1]
    c.memory.block_checkpointing = config_dict.placeholder(bool)  # compute the denoiser's activations again, block by
    # block [sweep 6.4 → 3.9 GiB, +12 % operations with 50 active steps, +1 % with 1]
    c.memory.decoder_checkpointing = config_dict.placeholder(bool)  # and those of the VAE, layer by layer
    # [decode 6.5 → 5.3 GiB, +0.4 % operations with 50 active steps, +1 % with 1]
    c.memory.residency = config_dict.placeholder(str)  # "all" modules are on the device, or those of the "phase"
    # [sweep -0.7 GiB, decode -1.6; each micro-batch moves 2.3 GiB]
    c.memory.lean = config_dict.placeholder(bool)  # frozen layers keep only what their own backward pass needs,
    # and compute norms and activations again [False: sweep 6.4 → 10.4 GiB, decode 6.5 → 14.1; True: a CPU +4 % time]

    # -- training --------------------------------------------------------------------------------------------------
    c.num_epochs = 100  # passes of total_samples_per_epoch samples
    c.per_gpu_capacity = config_dict.FieldReference(4, field_type=object)  # samples in one micro-batch on one GPU, or
    # "auto": the most that fit; changes rounding only
    c.train = ConfigDict()
    c.train.total_batch_size = 128  # samples per optimizer step, over all processes
    c.train.total_samples_per_epoch = 256  # samples per epoch, over all processes
    c.train.num_inference_steps = config_dict.placeholder(int)  # sampler steps of training, 10 … 25 are cheaper; None:
    # num_inference_steps
    c.train.optimizer = "adamw"  # "adamw", "adafactor" (less memory in full fine-tuning) or "sgd", of torch
    c.train.learning_rate = 1e-3  # step size, constant
    c.train.adam_beta1 = 0.9  # adamw: decay per step of the gradient's running mean
    c.train.adam_beta2 = 0.999  # adamw: decay per step of the squared gradient's running mean
    c.train.adam_weight_decay = 0.1  # per step, times the learning rate; of every optimizer
    c.train.adam_epsilon = 1e-8  # adamw: added to the root of the squared gradient's mean, against division by zero
    c.train.max_grad_norm = 5.0  # gradients of an optimizer step are clipped to this norm
    c.train.loss_coeff = 0.01  # multiplies the loss
    c.train.ema_decay = 0.0  # moving average of the trained weights, used for evaluation and saved files; 0: off
    c.train.max_skipped_steps = 10  # non-finite optimizer steps in a row that end the run
    return c


def aesthetic() -> ConfigDict:
    """LAION aesthetic score of animals, towards 10. The paper: 5.73 → 8.94 in 7 epochs on 4 A100."""
    c = base()
    c.num_epochs = 7
    c.num_checkpoint_limit = 14
    c.loss = "target"
    c.loss_target = 10.0
    return c


def aesthetic_k1() -> ConfigDict:
    """`aesthetic` with gradient through the last sampler step alone (49 of 50)."""
    c = aesthetic()
    c.estimator = "truncated"
    return c


def hps() -> ConfigDict:
    """Human Preference Score v2 on its benchmark's prompts. The paper: 0.274 → 0.330 on 4 A100."""
    c = base()
    c.num_epochs = 200
    c.save_freq = 4
    c.eval_freq = 4
    c.reward_fn = "hps"
    c.hps.version = "v2.0"  # the paper's; v2.1 has another scale
    c.prompt_fn = "hps_v2_all"
    c.eval_prompt_fn = "eval_hps_v2_all"
    return c


def hps_k1() -> ConfigDict:
    """`hps` with gradient through the last sampler step alone (49 of 50)."""
    c = hps()
    c.estimator = "truncated"
    return c


def hps_with(estimator: str) -> ConfigDict:
    """`hps` with another estimator, after which the preset is called: "draft_lv", "refl", …"""
    c = hps()
    c.estimator = estimator
    return c


def evaluate() -> ConfigDict:
    """Rewards and pictures of a checkpoint (`--config.resume_from=…`) or, without one, of the base model."""
    c = hps()
    c.task = "evaluate"
    c.num_eval_images = 200
    c.num_eval_prompts = None
    return c


def evaluate_soup() -> ConfigDict:
    """LoRAs c·resume_from + (1-c)·resume_from_2 for each c of mixing_coef_1, under all the named rewards."""
    c = evaluate()
    c.task = "evaluate_soup"
    return c


def guide() -> ConfigDict:
    """Reward guidance while sampling, beside the plain model and, with `resume_from`, beside the fine-tuned one."""
    c = evaluate()
    c.task = "guide"
    c.num_eval_images = 32
    return c


def use_tiny(c: ConfigDict) -> ConfigDict:
    """Points any preset at the bundled 64×64 model, its rewards and its prompts, on a CPU."""
    c.pretrained.model = str(TINY / "pipeline")
    c.mixed_precision = "no"
    c.num_inference_steps = 20
    c.guidance_scale = 3.0
    c.aesthetic.clip = c.clip.model = str(TINY / "clip")
    c.aesthetic.head_file = str(TINY / "aesthetic.safetensors")
    c.prompt_fn, c.eval_prompt_fn = "tiny_train", "tiny_heldout"
    c.eval_reward_fn = "aesthetic,clip,rewards.tiny_judge:rating,rewards.tiny_judge:obedience"
    return c


def quickstart() -> ConfigDict:
    """The bundled model towards a higher aesthetic score, in minutes on two CPU cores."""
    c = use_tiny(base())
    c.reward_fn = "aesthetic:1,clip:40"  # CLIP keeps the pictures true to their prompts
    c.num_epochs = 3
    c.per_gpu_capacity = 8
    c.num_eval_images = 48
    c.num_eval_prompts = 24
    c.max_vis_images = 12
    c.train.total_batch_size = 8
    c.train.total_samples_per_epoch = 64
    c.train.learning_rate = 4e-3
    c.train.loss_coeff = 1.0
    c.train.max_grad_norm = 1.0
    c.train.adam_weight_decay = 1e-4
    return c


def quickstart_fast() -> ConfigDict:
    """`quickstart` in seconds: 8 large steps through a chain of 5 sampler steps. Longer, it over-optimises."""
    c = quickstart()
    c.estimator = "full"
    c.memory_policy = "roomy"
    c.num_epochs = 1
    c.train.num_inference_steps = 5
    c.train.learning_rate = 1.2e-2
    return c


def tiny_evaluate() -> ConfigDict:
    """`evaluate` on the bundled model."""
    c = use_tiny(evaluate())
    c.reward_fn = "aesthetic"
    return c


def tiny_guide() -> ConfigDict:
    """`guide` on the bundled model."""
    c = use_tiny(guide())
    c.reward_fn = "aesthetic:1,clip:40"
    return c


def tiny_soup() -> ConfigDict:
    """`evaluate_soup` on the bundled model."""
    c = use_tiny(evaluate_soup())
    c.reward_fn = "aesthetic"
    return c


PRESETS = {
    preset.__name__: preset
    for preset in (
        aesthetic, aesthetic_k1, hps, hps_k1, evaluate, evaluate_soup, guide,
        quickstart, quickstart_fast, tiny_evaluate, tiny_soup, tiny_guide,
    )
} | {
    estimator: partial(hps_with, estimator)
    for estimator in ("draft_lv", "refl", "drtune", "sparse", "bridge", "lagrange", "leapalign")
}  # fmt: skip


def get_config(preset: str = "quickstart") -> ConfigDict:
    """What `--config config/align_prop.py:<preset>` calls."""
    config = PRESETS[one_of("preset", preset, PRESETS)]()
    config.preset = preset
    return config
