"""Samplers tuned to a model: what is measured or searched once and then kept beside the model."""
