"""Write the tokenizer: CLIP's byte-pair encoding, cut to its first merges.

    python make_tokenizer.py tokenizer

CLIP's vocabulary lists the 256 bytes, the same bytes ending a word, one token per merge, and two special
tokens, in this order. The first merges are the most frequent, so a short list still has common words whole;
rarer words fall into more pieces. The small table keeps the text encoder small.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

from architecture import VOCABULARY
from sdrt.export.checkpoint.tokenizer_json import write_tokenizer_folder

BYTES_AND_SPECIAL = 512 + 2  # tokens that are no merges


def write_tokenizer(folder: Path) -> None:
    """Write the four files of a `CLIPTokenizer` folder."""
    write_tokenizer_folder(folder, VOCABULARY - BYTES_AND_SPECIAL)


class Tokenizer:
    """Padded token ids, as the trained text encoder gets them."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            self.inner = CLIPTokenizer.from_pretrained(folder)

    def ids(self, prompt: str) -> list[int]:
        """77 ids: start, the prompt (cut if it is too long), end, and the end token as padding."""
        ids: list[int] = self.inner(prompt, padding="max_length", truncation=True).input_ids
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the truncated CLIP tokenizer.")
    parser.add_argument("folder", type=Path)
    write_tokenizer(parser.parse_args().folder)


if __name__ == "__main__":
    main()
