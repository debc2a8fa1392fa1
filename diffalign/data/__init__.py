"""Preference data: pairs of images of one prompt, read from what people have, and their latents, cached.

    from diffalign.data import open_pairs

    pairs = open_pairs("my_pairs/")  # folder + pairs.jsonl, JSONL, parquet, tar, datasets, Pick-a-Pic columns
    pairs[0].prompt, pairs[0].chosen, pairs[0].rejected
    images = open_images("good_pictures/")  # single images, with or without labels

Importing this needs Pillow only; torch comes with :mod:`diffalign.data.cache` and
:mod:`diffalign.data.transforms`.
"""

from diffalign.data.examples import BadRow
from diffalign.data.pairs import Pair, PairDataset, open_pairs
from diffalign.data.rows import Selection
from diffalign.data.scored import open_scored
from diffalign.data.unpaired import ImageDataset, LabelledImage, open_images
from diffalign.data.votes import Vote, image_scores, read_votes
from diffalign.data.write import ScoredImages, write_lists, write_pairs

__all__ = [
    "BadRow",
    "ImageDataset",
    "LabelledImage",
    "Pair",
    "PairDataset",
    "ScoredImages",
    "Selection",
    "Vote",
    "image_scores",
    "open_images",
    "open_pairs",
    "open_scored",
    "read_votes",
    "write_lists",
    "write_pairs",
]
