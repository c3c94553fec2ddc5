"""PyTorch modules to ONNX graphs, and what their precision must be."""
