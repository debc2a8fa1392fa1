"""Few-step samplers as diffusers schedulers."""
