"""What is written is compared with PyTorch before it ships."""
