"""Checkpoint to bundle: ONNX export, parity gate and bundle writer. Needs torch, diffusers, transformers."""

from sdrt.runtime.system.telemetry import switch_telemetry_off

switch_telemetry_off()  # before any module here imports a library that has one
