"""The backend ``onnxruntime-cpu``."""
