"""Benchmarks: every number the documentation quotes comes from one of these modules."""
