"""Options that every trainer has. Names are those of diffusers' training scripts where it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffalign.errors import UserError

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(kw_only=True)
class TrainConfig:
    """Options of a training run.

    Args:
        pretrained_model_name_or_path: pipeline folder, hub id or playground/<name> of the model to train.
        pretrained_vae_model_name_or_path: another autoencoder, folder or hub id.
        revision: git revision on the hub.
        variant: weight files of this variant, such as fp16.
        dataset_name: preference data: a folder, a .jsonl or .parquet file, or hf://owner/name.
        dataset_split: which split, where the data has several.
        max_train_samples: use only so many pairs.
        output_dir: where weights, checkpoints, log.jsonl and the model card go.
        overwrite: start anew in an output folder that a run has used; its checkpoints and log are removed.
        resume_from_checkpoint: "latest" or a checkpoint folder; "auto" is latest, or the start if there is
            none.
        cache_dir: where encoded images and prompts are kept; by default <output_dir>/cache.
        seed: of the order of the data, the noise and new weights.
        resolution: side in pixels that images are cropped to; by default the model's own.
        center_crop: crop the centre; otherwise a place drawn per pair.
        random_flip: mirror both images of a pair half the time.
        proportion_empty_prompts: share of pairs that are trained without their caption.
        prompt_windows: in how many windows of 75 tokens Stable Diffusion and SDXL read a caption, each by
            itself, for the network to attend to all of them; with 1 they read the first 75 tokens, which is
            what other software does.
        train_batch_size: pairs per device and forward pass.
        gradient_accumulation_steps: forward passes per optimiser step.
        max_train_steps: optimiser steps.
        enable_xformers_memory_efficient_attention: attention of xformers, for policy and reference alike, if
            it works here (it is tried before use); otherwise torch's own, which is as fast on most cards.
        gradient_checkpointing: less memory for a third more time.
        learning_rate: peak learning rate.
        scale_lr: multiply learning_rate by the number of pairs per optimiser step.
        lr_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.
        lr_warmup_steps: optimiser steps until the peak; needs a scheduler other than constant.
        adam_beta1: AdamW's beta1.
        adam_beta2: AdamW's beta2.
        adam_weight_decay: AdamW's weight decay.
        adam_epsilon: AdamW's epsilon.
        use_8bit_adam: AdamW of bitsandbytes, with states in 8 bits.
        use_adafactor: Adafactor at the given rate, with adam_weight_decay: a row and a column of numbers in
            place of each matrix of second moments, and no first moments.
        max_grad_norm: gradients are clipped to this norm.
        rank: rank of the LoRA (its alpha is the same); 0 trains all weights of the denoiser.
        lora_targets: names of the layers that get a LoRA; by default the attention projections.
        init_lora: folder of a LoRA to go on from; it is then the reference as well.
        mixed_precision: no, fp16 or bf16.
        allow_tf32: TF32 matrix products on NVIDIA cards.
        use_ema: keep an exponential moving average of the weights, and give that as the result.
        ema_decay: its decay per step.
        checkpointing_steps: optimiser steps between checkpoints; 0 for none.
        checkpoints_total_limit: keep so many checkpoints, the newest.
        validation_steps: optimiser steps between validations; 0 for none. One more follows the last step.
        patience: stop after so many validations in a row without a better result on held-out data (of pairs
            the share that is won, of good images alone their likelihood); 0 never does.
        validation_prompts: what to draw then, always from the same noise, into <output_dir>/validation.
        validation_guidance_scale: guidance of these pictures; 1 for none.
        validation_inference_steps: network evaluations per picture.
        push_to_hub: hub id (owner/name) that the result is uploaded to when the run has ended well; needs a
            login.
        report_to: trackers of accelerate, such as tensorboard or wandb, comma-separated. log.jsonl is always
            written.
        progress: show progress bars.
    """

    pretrained_model_name_or_path: str = ""
    pretrained_vae_model_name_or_path: str | None = None
    revision: str | None = None
    variant: str | None = None
    dataset_name: str = ""
    dataset_split: str | None = None
    max_train_samples: int | None = None
    output_dir: str = "outputs/train"
    overwrite: bool = False
    resume_from_checkpoint: str | None = None
    cache_dir: str | None = None
    seed: int = 0
    resolution: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    prompt_windows: int = 1
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    enable_xformers_memory_efficient_attention: bool = False
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-5
    scale_lr: bool = False
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    use_adafactor: bool = False
    max_grad_norm: float = 1.0
    rank: int = 8
    lora_targets: list[str] = field(default_factory=list)
    init_lora: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    use_ema: bool = False
    ema_decay: float = 0.9999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    validation_steps: int = 0
    patience: int = 0
    validation_prompts: list[str] = field(default_factory=list)
    validation_guidance_scale: float = 7.5
    validation_inference_steps: int = 20
    push_to_hub: str | None = None
    report_to: str = ""
    progress: bool = True

    def check(self) -> None:
        """Refuse values that cannot work, before anything is loaded.

        Raises:
            UserError: names the option, its value and what is allowed.
        """
        counts = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps")
        for name in (*counts, "validation_inference_steps", "prompt_windows"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr_warmup_steps", "rank", "checkpointing_steps", "learning_rate"):
            self._need(name, getattr(self, name) >= 0, "0 or more")
        for name in ("validation_steps", "patience"):
            self._need(name, getattr(self, name) >= 0, "0 or more")
        self._need("max_grad_norm", self.max_grad_norm > 0, "above 0")
        for name in ("checkpoints_total_limit", "max_train_samples"):
            value = getattr(self, name)
            self._need(name, value is None or value >= 1, "at least 1")
        self._need("resolution", self.resolution is None or self.resolution >= 8, "at least 8 pixels")
        self._need("proportion_empty_prompts", 0 <= self.proportion_empty_prompts <= 1, "between 0 and 1")
        self._need("ema_decay", 0 < self.ema_decay < 1, "between 0 and 1")
        self._need("mixed_precision", self.mixed_precision in ("no", "fp16", "bf16"), "no, fp16 or bf16")
        self._need("lr_scheduler", self.lr_scheduler in LR_SCHEDULERS, f"one of {', '.join(LR_SCHEDULERS)}")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("lr_scheduler constant has no warm-up: use constant_with_warmup")
        if self.use_8bit_adam and self.use_adafactor:
            raise UserError("use_8bit_adam and use_adafactor are two optimisers: give one of them")
        if self.overwrite and self.resume_from_checkpoint:
            raise UserError("overwrite starts anew and resume_from_checkpoint goes on: give one of the two")
        if self.validation_prompts and not self.validation_steps:
            raise UserError("validation_prompts are drawn every validation_steps steps: set it as well")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(f"push_to_hub must be a hub id such as owner/name, but is {self.push_to_hub!r}")
        if self.push_to_hub and "wandb" in self.report_to:
            raise UserError("push_to_hub and wandb together would publish the run's options with its secrets")
        if self.rank == 0 and (self.init_lora or self.lora_targets):
            raise UserError("rank 0 trains all weights, which leaves nothing for init_lora or lora_targets")

    def _need(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise UserError(f"{name} must be {allowed}, but is {getattr(self, name)!r}")
