"""onnxruntime as far as optimum-onnx's worker knows it."""

from __future__ import annotations


class SessionOptions:
    intra_op_num_threads = 0
