"""A call of the pipeline for each task and each kind of prompt and guidance, on the tiny bundle."""

from __future__ import annotations

from typing import Any

import numpy as np

PICTURE = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[4:12, 8:] = True
SHORT: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "numpy", "seed": 4}
TASKS: dict[str, dict[str, Any]] = {
    "image": {"prompt": "a cat", "image": PICTURE, "strength": 0.7},
    "image, all of it": {"prompt": "a cat", "image": PICTURE, "strength": 1.0, "sampler": "euler_a"},
    "mask": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK},
    "mask, less": {"prompt": "a cat", "image": PICTURE, "mask_image": MASK, "strength": 0.6},
    "expand": {"prompt": "a cat", "image": PICTURE, "expand": (4, 0, 6, 2), "num_images_per_prompt": 3},
    "variation": {"image": PICTURE, "variation": 0.4, "sampler": "euler"},
    "weights": {"prompt": "a (red:1.4) [apple]", "negative_prompt": "(blue)"},
    "chunks": {"prompt": ["a", "a BREAK b", "c"], "negative_prompt": ["", "", "d BREAK e BREAK f"]},
    "clip skip": {"prompt": "a cat", "clip_skip": 1},
    "interval": {"prompt": "a cat", "guidance_interval": (0.3, 0.7), "guidance_rescale": 0.5},
    "schedule": {"prompt": "a cat", "guidance_scale": [5.0, 4.0, 1.0, 2.0, 1.0, 1.0]},
    "one half": {"prompt": "a cat", "guidance_scale": 1.0},
}
