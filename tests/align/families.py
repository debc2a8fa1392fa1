"""Tiny pipelines of every family, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffalign.bench.networks import SD_SCHEDULER, character_clip, tiny_pipeline


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        **options,
    )


def _clip(kind: type, projection: int = 32) -> Any:
    return character_clip(kind, projection_dim=projection)


def _t5() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    letters = {c: i + 3 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz 0123456789")}
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | letters
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config), fast


def _sdxl_unet(width: int, ids: int) -> UNet2DConditionModel:
    """Text of that width, so many numbers on size and crop."""
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * ids + 32,
    )


def sdxl() -> StableDiffusionXLPipeline:
    clip, tokenizer = _clip(CLIPTextModel)
    clip_2, tokenizer_2 = _clip(CLIPTextModelWithProjection)
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=clip,
        text_encoder_2=clip_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_sdxl_unet(width=64, ids=6),
        scheduler=EulerDiscreteScheduler.from_config(SD_SCHEDULER),
    )


def playground_v2() -> StableDiffusionXLPipeline:
    """SDXL with the noise of EDM, as Playground v2.5 is."""
    pipe = sdxl()
    pipe.scheduler = EDMDPMSolverMultistepScheduler()
    pipe.vae.register_to_config(scaling_factor=0.5)
    return pipe


def sdxl_refiner() -> StableDiffusionXLImg2ImgPipeline:
    clip, tokenizer = _clip(CLIPTextModelWithProjection)
    return StableDiffusionXLImg2ImgPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=clip,
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=_sdxl_unet(width=32, ids=5),
        scheduler=EulerDiscreteScheduler.from_config(SD_SCHEDULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    clip, tokenizer = _clip(CLIPTextModelWithProjection, 16)
    clip_2, tokenizer_2 = _clip(CLIPTextModelWithProjection, 16)
    t5, tokenizer_3 = _t5()
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip,
        text_encoder_2=clip_2,
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
    )


def flux() -> FluxPipeline:
    clip, tokenizer = _clip(CLIPTextModel)
    t5, tokenizer_2 = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
    pipe.default_sample_size = 4
    return pipe


def wan(**options: Any) -> WanPipeline:
    """Latents half as wide and high as the video, and half as long but for the first frame."""
    _, tokenizer = _t5()
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.0, 2.0, 1.5],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
        **options,
    )


BUILDERS = {
    "sd": tiny_pipeline,
    "sdxl": sdxl,
    "sdxl-refiner": sdxl_refiner,
    "playground-v2.5": playground_v2,
    "sd3": sd3,
    "flux": flux,
}
VIDEO_BUILDERS = {"wan": wan}


def build(name: str, **options: Any) -> Any:
    """The same pipeline every time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = (BUILDERS | VIDEO_BUILDERS)[name](**options)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
