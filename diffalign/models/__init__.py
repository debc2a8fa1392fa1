"""Model families: the same few operations for every kind of diffusers pipeline.

from diffalign.models import load_adapter

adapter = load_adapter("path/or/hub-id")      # or a pipeline that is loaded already
adapter.denoise(x_t, t, adapter.encode_prompts(["a red star"]))
"""

from diffalign.models.base import FAMILIES, LORA_FILE, ModelAdapter, load_adapter

__all__ = ["FAMILIES", "LORA_FILE", "ModelAdapter", "load_adapter"]
