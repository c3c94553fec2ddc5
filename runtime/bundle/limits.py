"""How large the parts of a bundle may be, and what is asked of it: one table.

Nothing that anybody exports comes near a limit; what is beyond one was written to take memory or time, or is
damaged. Each is refused by the message of the place that reads it, which says the limit.
"""

from __future__ import annotations

from typing import Final

# Files, in bytes.
MAX_MANIFEST_BYTES: Final = 16 << 20  # some 20 kB
MAX_ENGINE_JSON_BYTES: Final = 4 << 20
MAX_WEIGHT_MAP_BYTES: Final = 16 << 20  # SDXL's has 1 MB
MAX_TOKENIZER_BYTES: Final = 32 << 20  # CLIP's vocabulary has 4 MB
MAX_GRAPH_BYTES: Final = 32 << 20  # without weights, which lie beside it: SDXL's U-Net has some MB
MAX_FILE_BYTES: Final = 1 << 40

# A manifest.
MAX_FILES: Final = 256  # of one component, or of one engine
MAX_BATCH: Final = 256  # pictures drawn together
MAX_SIDE: Final = 16_384  # pixels
MAX_CHUNKS: Final = 100  # of a prompt
MAX_CLIP_SKIP: Final = 100
MAX_CHANNELS: Final = 1024  # of latents: 4 to 16 are about
MAX_FACTOR: Final = 256  # pixels of a latent's side: 8
MAX_AXIS: Final = 1 << 20  # any other size of a component's tensor
MAX_TOKENS: Final = 4096  # that a text encoder reads at once: 77
MAX_ENCODER_SIZE: Final = 4096  # pixels that an image encoder reads: 224
MAX_PICTURE_PIXELS: Final = 1 << 26  # of the smallest batch, and of a picture of the default size

# Engines of a bundle.
MAX_ENGINES: Final = 1000
MAX_PROFILES: Final = 64  # of one engine

# A graph.
MAX_NODES: Final = 200_000  # of SDXL's U-Net: some thousands
MAX_TENSORS: Final = 200_000
MAX_NAME_BYTES: Final = 4096
MAX_RANK: Final = 16
MAX_DIMENSION: Final = 1 << 40
MAX_CONSTANT_ELEMENTS: Final = 1 << 26  # of what a node makes from constants alone

# A tokenizer.
MAX_PATTERN_CHARACTERS: Final = 500  # of its regular expression: CLIP's has 110

# A file of textual inversion.
MAX_EMBEDDING_BYTES: Final = 16 << 20  # 75 vectors for both of SDXL's text encoders in float64 are 1.2 MB
MAX_EMBEDDING_NAME: Final = 100  # characters

# A LoRA.
MAX_LORA_BYTES: Final = 6 << 30  # all differences of SDXL in fp16 are 5 GB, a usual one 20 to 800 MB
MAX_LORA_TENSORS: Final = 50_000  # of SDXL with every layer's three: 8,000
MAX_LORA_HEADER_BYTES: Final = 16 << 20
MAX_LORA_CONFIG_BYTES: Final = 1 << 20  # PEFT's adapter_config.json

# A request.
MAX_PROMPT_CHARACTERS: Final = 50_000  # far more than any bundle's chunks hold; it takes a second
MAX_CALL_CHARACTERS: Final = 1_000_000  # of all prompts of a call, with the negative ones

# The first load of a component that is a stranger's, in a process of its own.
FIRST_LOAD_SECONDS: Final = 120.0
FIRST_LOAD_SECONDS_PER_BYTE: Final = 60e-9  # of its files: a minute for a gigabyte
FIRST_LOAD_SECONDS_PER_PIXEL: Final = 4e-4  # of the smallest batch: 400 s for 1024 x 1024, which takes 60
FIRST_LOAD_BYTES: Final = 4 << 30
FIRST_LOAD_BYTES_PER_BYTE: Final = 8  # weights widened, repacked, and once more while that is done
FIRST_LOAD_BYTES_PER_PIXEL: Final = 16 << 10  # 4 KiB are a VAE decoder's activations
