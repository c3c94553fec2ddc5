"""LoRA files, in every form that is about, and their exact sum with a bundle's weights."""
