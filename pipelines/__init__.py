"""Helpers around diffusers pipelines."""
