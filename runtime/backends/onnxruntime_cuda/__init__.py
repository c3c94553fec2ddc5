"""The backend ``onnxruntime-cuda``."""
