"""Stable Diffusion: export to ONNX and TensorRT, and a torch-free runtime that draws.

``sdrt.runtime`` turns a bundle and a prompt into pictures, ``sdrt.export`` turns a checkpoint into a
bundle, ``sdrt.kernels`` holds the few kernels of our own. Importing ``sdrt`` imports none of them.
"""

__version__ = "0.1.0"
