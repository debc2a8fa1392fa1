"""The image tower and text encoder of BLIP, written down once more with the names of its original weights.

Pre-norm ViT with fused qkv (timm's), post-norm BERT with cross-attention to the image in every layer; dropout
is left out. Only torch, so that the mapped networks of transformers have something to agree with.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


def attention(query, key, value, heads, mask=None):
    """Multi-head attention of (B, N, D) tensors; `mask` (B, N) is 0 where a key is padding."""

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)
    weights = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Modules by dotted name, so that a state dict can have any names."""

    def __init__(self, parts):
        super().__init__()
        for name, part in parts.items():
            at, *rest = name.split(".", 1)
            if rest:
                below = {n.split(".", 1)[1]: p for n, p in parts.items() if n.startswith(f"{at}.")}
                if not hasattr(self, at):
                    setattr(self, at, Layer(below))
            else:
                setattr(self, at, part)


class ViT(nn.Module):
    def __init__(self, width, depth, heads, size, patch, inner):
        super().__init__()
        self.heads = heads
        self.patch_embed = Layer({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(
            Layer(
                {
                    "norm1": nn.LayerNorm(width, eps=1e-6),
                    "norm2": nn.LayerNorm(width, eps=1e-6),
                    "attn.qkv": nn.Linear(width, 3 * width),
                    "attn.proj": nn.Linear(width, width),
                    "mlp.fc1": nn.Linear(width, inner),
                    "mlp.fc2": nn.Linear(inner, width),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block.attn.proj(attention(*block.attn.qkv(block.norm1(x)).chunk(3, -1), self.heads))
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)


class Bert(nn.Module):
    def __init__(self, width, depth, heads, words, seen, inner, length=64):
        super().__init__()
        self.heads = heads

        def norm():
            return nn.LayerNorm(width, eps=1e-12)

        self.embeddings = Layer(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(length, width),
                "LayerNorm": norm(),
            }
        )
        layers = [
            Layer(
                {
                    "attention.self.query": nn.Linear(width, width),
                    "attention.self.key": nn.Linear(width, width),
                    "attention.self.value": nn.Linear(width, width),
                    "attention.output.dense": nn.Linear(width, width),
                    "attention.output.LayerNorm": norm(),
                    "crossattention.self.query": nn.Linear(width, width),
                    "crossattention.self.key": nn.Linear(seen, width),
                    "crossattention.self.value": nn.Linear(seen, width),
                    "crossattention.output.dense": nn.Linear(width, width),
                    "crossattention.output.LayerNorm": norm(),
                    "intermediate.dense": nn.Linear(width, inner),
                    "output.dense": nn.Linear(inner, width),
                    "output.LayerNorm": norm(),
                }
            )
            for _ in range(depth)
        ]
        self.encoder = Layer({"layer": nn.ModuleList(layers)})

    def forward(self, ids, mask, seen):
        x = self.embeddings.word_embeddings(ids) + self.embeddings.position_embeddings.weight[: ids.shape[1]]
        x = self.embeddings.LayerNorm(x)
        for layer in self.encoder.layer:
            x = self._attend(layer.attention, x, x, mask)
            x = self._attend(layer.crossattention, x, seen, None)
            x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
        return x

    def _attend(self, part, x, to, mask):
        own = part.self
        read = attention(own.query(x), own.key(to), own.value(to), self.heads, mask)
        return part.output.LayerNorm(part.output.dense(read) + x)


class PlainImageReward(nn.Module):
    """BLIP and the chain of linear layers, with the names of ImageReward.pt."""

    def __init__(self, words=40):
        super().__init__()
        self.blip = Layer(
            {
                "visual_encoder": ViT(128, 2, 2, 32, 8, 96),
                "text_encoder": Bert(64, 2, 1, words, 128, 80),
            }
        )
        sizes = (64, 10, 8, 6, 4, 1)
        linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        between = nn.Dropout(0.2)
        self.mlp = Layer(
            {
                "layers": nn.Sequential(
                    linear[0], between, linear[1], between, linear[2], between, linear[3], linear[4]
                )
            }
        )

    def forward(self, normalised, ids, mask):
        seen = self.blip.visual_encoder(normalised)
        first = self.blip.text_encoder(ids, mask, seen)[:, 0]
        return (self.mlp.layers(first)[:, 0] - 0.16717362830052426) / 1.0333394966054072
