"""Networks of known size with random weights: what a step costs does not depend on what a model has learnt.

Nothing is downloaded: the shapes of the published models are written down here.
"""

from __future__ import annotations

from typing import Any

UNETS: dict[str, dict[str, Any]] = {
    # A UNet small enough for unit tests.
    "tiny": {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    # Stable Diffusion 1.5: 860 M parameters.
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    # Stable Diffusion XL: 2.6 G parameters.
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


# The scheduler config that Stable Diffusion 1.5 comes with.
SD_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# Autoencoders that belong to them, for what it costs to encode images inside a training step.
VAES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (16, 16), "norm_num_groups": 4},
    "sd15": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "sdxl": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}


def unet(size: str, seed: int = 0) -> Any:
    """A `diffusers.UNet2DConditionModel` of the shape ``UNETS[size]`` with random float32 weights."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**UNETS[size])


def vae(size: str, seed: int = 0) -> Any:
    """A `diffusers.AutoencoderKL` of the shape ``VAES[size]`` with random float32 weights, four channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    shape = VAES[size]
    blocks = len(shape["block_out_channels"])
    return AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **shape,
    )


def tiny_pipeline(seed: int = 0) -> Any:
    """A complete `diffusers.StableDiffusionPipeline` that draws 32 px images in milliseconds.

    Its text encoder knows single characters, so any prompt is valid.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    denoiser = unet("tiny", seed)
    text_encoder, tokenizer = character_clip(CLIPTextModel)
    scheduler = PNDMScheduler.from_config(SD_SCHEDULER)
    pipe: Any = StableDiffusionPipeline(
        vae=vae("tiny", seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval()
    return pipe


def character_clip(kind: type, **options: Any) -> tuple[Any, Any]:
    """A tiny text encoder of class `kind` (of transformers' CLIP) and its tokenizer, which knows single
    characters; `options` go to its config."""
    from transformers import CLIPTextConfig

    tokenizer = _character_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=tokenizer.model_max_length,
        **options,
    )
    return kind(config), tokenizer


def _character_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
