"""The backend ``openvino-cpu``."""
