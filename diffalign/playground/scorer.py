"""The playground's preference model: a small CLIP (open_clip) that tells how well an image fits a caption.

It plays PickScore: trainers see its scores, while the exact verifier, which nothing is trained on at align
time, is the judge. It learns from rendered scenes, half of them damaged (bent, blurred, bitten,
overlapping, with objects too many or too few), and the captions that are true or false of them, with the
sigmoid loss of SigLIP (Zhai et al. 2023) and one hard negative (a single attribute changed) per image.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from tqdm.auto import tqdm

from diffalign.playground.captions import COLOURS, SHAPES, Claim, change_one_word
from diffalign.playground.fit import fit
from diffalign.playground.sd import TOKENS, make_tokenizer, to_pixels
from diffalign.playground.verifier import Found, find, judge
from diffalign.playground.world import SIZE, Scene, Thing, render, scene

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": TOKENS, "width": 96, "heads": 4, "layers": 2},
    "init_logit_scale": 2.3,
    "init_logit_bias": -4.0,
}


@dataclass(frozen=True)
class Example:
    """A picture, what it was meant to show, and what is in it."""

    image: np.ndarray  # (64, 64, 3) uint8
    claim: Claim
    found: list[Found]
    clean: bool


def damage(drawn: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene with the faults that generated images have; (64, 64, 3) uint8."""
    things = list(drawn.things)
    fault = rng.integers(5)
    if fault == 0:  # an object too many, anywhere
        x, y = rng.uniform(10, SIZE - 10, 2)
        extra = Thing(COLOURS[rng.integers(7)], SHAPES[rng.integers(6)], x, y, rng.uniform(7, 11))
        things.append(extra)
    elif fault == 1:  # one too few
        things.pop(rng.integers(len(things)))
    elif fault == 2 and len(things) > 1:  # neighbours that touch
        near = rng.uniform(0.3, 0.8)
        a, b = things[0], things[1]
        things[1] = replace(b, x=a.x + near * (b.x - a.x), y=a.y + near * (b.y - a.y))
    elif fault == 3:  # another colour or shape for one of them
        i = rng.integers(len(things))
        if rng.random() < 0.5:
            things[i] = replace(things[i], colour=COLOURS[rng.integers(7)])
        else:
            things[i] = replace(things[i], shape=SHAPES[rng.integers(6)])
    image = render(replace(drawn, things=tuple(things))).astype(np.float32)
    if rng.random() < 0.6:  # bent
        shift = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), (0, 4, 4), mode="wrap")
        shift *= rng.uniform(0.5, 3.0) / shift.std()
        where = np.mgrid[0:SIZE, 0:SIZE] + shift
        image = np.stack([ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in image.T], 0).T
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
    if things and rng.random() < 0.3:  # a bite in the colour of the background
        bitten = things[rng.integers(len(things))]
        angle, r = rng.uniform(0, 2 * np.pi), bitten.radius
        cx, cy = bitten.x + 0.8 * r * np.cos(angle), bitten.y + 0.8 * r * np.sin(angle)
        ys, xs = np.mgrid[0:SIZE, 0:SIZE]
        image[np.hypot(xs - cx, ys - cy) < rng.uniform(0.3, 0.7) * r] = np.asarray(drawn.background) * 255
    blur = rng.uniform(0, 1.0)
    image = ndimage.gaussian_filter(image, (blur, blur, 0)) + rng.normal(0, rng.uniform(0, 6), image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def draw_examples(seed: int, n: int, *, damaged: float = 0.6) -> list[Example]:
    """The first ``n`` examples of a stream; a share ``damaged`` of them is drawn with faults."""
    examples = []
    for i in tqdm(range(n), desc="drawing examples", unit="img", leave=False):
        drawn, rng = scene(seed, i), np.random.default_rng([seed, i, 1])
        image = damage(drawn, rng) if rng.random() < damaged else render(drawn)
        examples.append(Example(image, drawn.claim, *find(image)))
    return examples


def truth(claims: list[Claim], examples: list[Example]) -> np.ndarray:
    """(images, claims) bool: does each claim hold for each image? By the verifier, quickly."""
    by_things = defaultdict(list)
    for j, claim in enumerate(claims):
        by_things[tuple(sorted(claim.things))].append(j)
    table = np.zeros((len(examples), len(claims)), bool)
    for i, example in enumerate(examples):
        if any(f.colour is None or f.shape is None for f in example.found):
            continue
        for j in by_things.get(tuple(sorted((f.colour, f.shape) for f in example.found)), ()):  # type: ignore[misc]
            table[i, j] = judge(claims[j], example.found, example.clean).true
    return table


def build(
    output: Path, work: Path, *, images: int, steps: int, seed: int, batch_size: int = 64
) -> dict[str, float]:
    """Train the scorer and write ``output`` as an open_clip folder of fp16 safetensors.

    Returns:
        Seconds and accuracies, for the README.
    """
    from open_clip.model import CLIP

    began = time.perf_counter()
    tokenizer = make_tokenizer(work / "tokenizer")
    config = json.loads(json.dumps(CONFIG))
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    torch.manual_seed(seed)
    model = CLIP(**config)
    examples = draw_examples(seed + 10, images)

    def encode(claims: list[Claim]) -> Tensor:
        text = tokenizer(
            [str(c) for c in claims],
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        return text.input_ids

    def loss(step: int, _: torch.Generator) -> Tensor:
        rng = np.random.default_rng([seed, step])
        rows = [examples[i] for i in rng.integers(len(examples), size=batch_size)]
        own = [row.claim for row in rows]
        claims = own + [change_one_word(claim, rng) for claim in own]
        holds = torch.from_numpy(truth(claims, rows)).float()
        image = F.normalize(model.encode_image(to_pixels(np.stack([row.image for row in rows]))), dim=-1)
        text = F.normalize(model.encode_text(encode(claims)), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
        weight = torch.full_like(holds, 4 / (2 * batch_size))
        near = torch.arange(batch_size)
        weight[near, near] = weight[near, near + batch_size] = 1.0
        return (weight * F.binary_cross_entropy_with_logits(logits, holds, reduction="none")).sum(1).mean()

    seconds = fit("scorer", work, {"scorer": model}, loss, steps=steps, learning_rate=2e-3, seed=seed)
    if output.exists():
        shutil.rmtree(output)
    _write(model, config, output, work / "tokenizer")
    return measure(output, seed=seed + 11) | {
        "training_seconds": seconds,
        "seconds": time.perf_counter() - began,
    }


def measure(folder: Path, *, seed: int, n: int = 1000) -> dict[str, float]:
    """Ranking accuracies on fresh examples.

    ``captions``: of a clean image, the true caption scores above one with a single attribute changed.
    ``images``: for one caption, a true image scores above a damaged one that is false.
    """
    from diffalign.rewards import load_reward, score_images

    reward = load_reward("pickscore", folder)
    rng = np.random.default_rng(seed)
    scenes = [scene(seed, i) for i in range(n)]
    clean = np.stack([render(s) for s in scenes])
    true = score_images(reward, clean, [s.caption for s in scenes])
    false = score_images(reward, clean, [str(change_one_word(s.claim, rng)) for s in scenes])
    broken = np.stack([damage(s, rng) for s in scenes])
    wrong = [not judge(s.claim, *find(image)).true for s, image in zip(scenes, broken, strict=True)]
    worse = score_images(reward, broken, [s.caption for s in scenes])
    return {"captions": float(np.mean(true > false)), "images": float(np.mean((true > worse)[wrong]))}


def _write(model: torch.nn.Module, config: dict, output: Path, tokenizer: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPTokenizer

    output.mkdir(parents=True)
    CLIPTokenizer.from_pretrained(tokenizer, model_max_length=TOKENS).save_pretrained(output)
    config["text_cfg"]["hf_tokenizer_name"] = "."
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": half}, indent=2)
    (output / "open_clip_config.json").write_text(text + "\n")
    weights = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()
    }
    file = output / "open_clip_model.safetensors"
    save_file(weights, file)
    file.chmod(0o644)
