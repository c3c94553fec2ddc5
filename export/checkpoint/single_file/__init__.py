"""Single-file checkpoints: what one is, and its tensors under diffusers' names."""
