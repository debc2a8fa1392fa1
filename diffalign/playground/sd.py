"""The playground's Stable Diffusion: tokenizer, text encoder, autoencoder and UNet, trained from nothing.

The parts are those of SD 1.5 at 1/300 of its size: CLIPTextModel, AutoencoderKL (4 channels, here 4x
downsampling of 64 px), UNet2DConditionModel (epsilon prediction, cross-attention), the scaled-linear
schedule of 1000 steps.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.pipelines.generate import generate
from diffalign.playground.captions import all_captions, draw_captions
from diffalign.playground.fit import fit
from diffalign.playground.verifier import FOREGROUND, accuracy
from diffalign.playground.world import Scene, render, scene

TOKENS = 12
"""Length of a tokenised caption, begin and end included."""


def draw_images(seed: int, n: int, text: str = "drawing scenes") -> tuple[list[Scene], np.ndarray]:
    """The first ``n`` scenes of a stream and their pictures, (n, 64, 64, 3) uint8."""
    scenes = [scene(seed, i) for i in range(n)]
    bar = tqdm(scenes, desc=text, unit="img", leave=False)
    return scenes, np.stack([render(s) for s in bar])


def to_pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


# --- tokenizer and text encoder ---


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer that holds every word of the captions as one token, and single letters for all else."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False, vocab_size=10_000)
    bpe.train_from_iterator(all_captions(), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=288,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, TOKENS) int64, padded as StableDiffusionPipeline pads."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# --- autoencoder ---


def train_autoencoder(
    folder: Path, images: np.ndarray, scenes: list[Scene], *, steps: int, seed: int
) -> tuple[Any, float]:
    """Crops around objects first, where the detail is, then whole images, for GroupNorm's true statistics.

    Returns:
        The autoencoder with unit-variance, zero-mean latents (scaling_factor 1), and its training seconds.
    """
    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    vae.to(memory_format=torch.channels_last)
    centres = [[(t.x, t.y) for t in s.things] for s in scenes]
    crop_steps = int(0.65 * steps)

    def batch(step: int, rng: np.random.Generator) -> Tensor:
        if step >= crop_steps:
            return to_pixels(images[rng.integers(len(images), size=24)])
        crops = []
        for i in rng.integers(len(images), size=64):
            x, y = centres[i][rng.integers(len(centres[i]))] + rng.uniform(-10, 10, 2)
            left, top = (int(np.clip(round(v - 16), 0, 32)) for v in (x, y))
            crops.append(images[i, top : top + 32, left : left + 32])
        return to_pixels(np.stack(crops))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = batch(step, np.random.default_rng([seed, step])).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        off = vae.decode(posterior.mean + posterior.std * noise).sample - x
        weight = 1 + 4 * (x.amin(1, keepdim=True) < 2 * FOREGROUND - 1).float()
        error = (weight * (off.abs() + off.square())).mean()
        return error + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    seconds = fit(
        "autoencoder", folder, {"vae": vae}, loss, steps=steps, learning_rate=2e-3, seed=seed, ema_decay=0.995
    )
    _whiten(vae, to_pixels(images[:1000]))
    return vae, seconds


@torch.no_grad()
def _whiten(vae: Any, pixels: Tensor) -> None:
    """Fold the affine map that gives every latent channel mean 0 and variance 1 into the 1x1 convolutions."""
    z = vae.encode(pixels).latent_dist.mean
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    quant, post, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """(N, 4, 16, 16) float32 means of the latents."""
    starts = tqdm(range(0, len(images), batch_size), desc="encoding", unit="batch", leave=False)
    return torch.cat([vae.encode(to_pixels(images[i : i + batch_size])).latent_dist.mean for i in starts])


@torch.no_grad()
def judge_autoencoder(vae: Any, captions: list[str], images: np.ndarray) -> dict[str, float]:
    """PSNR in dB of reconstructions and the share of them of which the verifier still says true."""
    decoded = torch.cat([vae.decode(z).sample for z in encode(vae, images).split(64)])
    restored = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    mse = np.mean((restored.astype(float) - images) ** 2, axis=(1, 2, 3))
    psnr = float(np.mean(10 * np.log10(255**2 / mse)))
    return {"psnr_db": psnr, "verified": accuracy(captions, restored)["true"]}


# --- denoiser ---


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """(n,) numbers, each uniform in [0, 1), one in every n-th: less variance per batch, the same law per
    row."""
    return (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n


def make_unet() -> Any:
    """2.8 M parameters; cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_scheduler() -> Any:
    """diffusers' usual sampler on the schedule of Stable Diffusion."""
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    # Not its own option, but that of classes made from its config, which clip latents to [-1, 1] otherwise.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def train_denoiser(
    folder: Path,
    vae: Any,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    captions: list[str],
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    every: int = 500,
) -> tuple[Any, float]:
    """Text encoder and UNet jointly: epsilon, min-SNR weight 5 (Hang et al. 2023), 10 % empty captions.

    Returns:
        The whole pipeline with averaged weights, and the training seconds.
    """
    torch.manual_seed(seed)
    text, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    unet.to(memory_format=torch.channels_last)
    ids, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    alphas = scheduler.alphas_cumprod.double()
    snr = (alphas / (1 - alphas)).float()
    alpha, sigma = alphas.sqrt().float(), (1 - alphas).sqrt().float()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        x0 = latents[rows].float()
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        condition = text(torch.where(dropped[:, None], empty, ids[rows])).last_hidden_state
        t = (stratified(batch_size, generator) * 1000).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=generator)
        x = alpha[t, None, None, None] * x0 + sigma[t, None, None, None] * noise
        predicted = unet(x.contiguous(memory_format=torch.channels_last), t, condition).sample
        weight = (5.0 / snr[t]).clamp(max=1.0)
        return (weight * F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))).mean()

    pipe: Any = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    seconds = fit(
        "denoiser",
        folder,
        {"unet": unet, "text_encoder": text},
        loss,
        steps=steps,
        learning_rate=1e-3,
        seed=seed,
        betas=(0.9, 0.99),
        ema_decay=0.998,
        every=every,
        evaluate=lambda step: judge(pipe, prompts=100, seed=1, sheet=folder / f"samples-{step:05d}.png"),
    )
    return pipe, seconds


def judge(
    pipe: Any,
    *,
    prompts: int,
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
    sheet: Path | None = None,
    progress: str | None = None,
) -> dict[str, float]:
    """Verifier accuracy of one image for each of ``prompts`` held-out captions; a sheet of them if asked."""
    captions = draw_captions(seed, prompts, held_out=True)
    drawn = generate(pipe, captions, range(prompts), steps=steps, guidance=guidance, progress=progress)
    if sheet is not None:
        from PIL import Image

        from diffalign.report import tile

        Image.fromarray(tile(drawn.images[:60], 10)).save(sheet)
    return accuracy(captions, drawn.images)


# --- the whole ---


def build(
    output: Path, work: Path, *, images: int, vae_steps: int, steps: int, seed: int, eval_prompts: int = 500
) -> dict[str, float]:
    """Train everything and write ``output`` as an ordinary Stable Diffusion folder of fp16 safetensors.

    Returns:
        Seconds and accuracies, for the README.
    """
    began = time.perf_counter()
    tokenizer = make_tokenizer(work / "tokenizer")
    scenes, pictures = draw_images(seed, images)
    vae, vae_seconds = train_autoencoder(work, pictures, scenes, steps=vae_steps, seed=seed)
    fresh, fresh_pictures = draw_images(seed + 1, 1000, "fresh scenes")
    facts = {
        f"vae_{k}": v for k, v in judge_autoencoder(vae, [s.caption for s in fresh], fresh_pictures).items()
    }
    tqdm.write("autoencoder: " + ", ".join(f"{k} {v:.3f}" for k, v in facts.items()))
    latents = encode(vae, pictures).half()
    pipe, seconds = train_denoiser(
        work, vae, tokenizer, latents, [s.caption for s in scenes], steps=steps, seed=seed
    )
    facts |= ship(pipe, output, eval_prompts)
    return facts | {
        "vae_seconds": vae_seconds,
        "denoiser_seconds": seconds,
        "seconds": time.perf_counter() - began,
    }


def ship(pipe: Any, output: Path, prompts: int, **how: Any) -> dict[str, float]:
    """Write ``output`` anew and `judge` what was written; accuracies and the number of parameters."""
    if output.exists():
        shutil.rmtree(output)
    save_half(pipe, output)
    shipped = StableDiffusionPipeline.from_pretrained(output)
    facts = judge(shipped, prompts=prompts, seed=2, progress="judging", sheet=output / "samples.png", **how)
    networks = (pipe.vae, pipe.unet, pipe.text_encoder)
    return facts | {"parameters": float(sum(p.numel() for m in networks for p in m.parameters()))}


def with_network(pipe: Any, unet: Any, scheduler: Any) -> Any:
    """A pipeline of ``unet`` and ``scheduler`` that shares all other parts of ``pipe``."""
    parts = pipe.components | {"unet": unet, "scheduler": scheduler}
    new: Any = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    new.set_progress_bar_config(disable=True)
    return new


def save_half(pipe: Any, output: Path) -> None:
    """Write fp16 weights (the pipeline itself is turned to fp16)."""
    pipe.unet.to(memory_format=torch.contiguous_format)
    pipe.vae.to(memory_format=torch.contiguous_format)
    pipe.to(dtype=torch.float16).save_pretrained(output)
    for config in output.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # where a part came from on the machine that built it
        if config.parent.name == "text_encoder":
            # transformers would take fp16 from here while diffusers loads fp32.
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2) + "\n")
