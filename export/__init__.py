"""Checkpoint to bundle: ONNX export, parity gate and bundle writer. Needs torch, diffusers, transformers."""
