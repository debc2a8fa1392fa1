"""Preference data: pairs of images of one prompt, read from what people have, and their latents, cached.

    from diffalign.data import open_pairs

    pairs = open_pairs("my_pairs/")  # folder + pairs.jsonl, JSONL, parquet, datasets, Pick-a-Pic columns
    pairs[0].prompt, pairs[0].chosen, pairs[0].rejected

Importing this needs Pillow only; torch comes with :mod:`diffalign.data.cache` and
:mod:`diffalign.data.transforms`.
"""

from diffalign.data.pairs import BadRow, Pair, PairDataset, open_pairs
from diffalign.data.write import write_pairs

__all__ = ["BadRow", "Pair", "PairDataset", "open_pairs", "write_pairs"]
