"""Write the tokenizer: CLIP's byte-pair encoding, cut to its first merges.

    python make_tokenizer.py tokenizer

CLIP's vocabulary lists the 256 bytes, the same bytes ending a word, one token per merge, and two special
tokens, in this order. The first merges are the most frequent, so a short list still has common words whole;
rarer words fall into more pieces. The small table keeps the text encoder small.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

from architecture import TEXT_ENCODER, VOCABULARY

MERGES_FILE = Path(__file__).parents[2] / "export" / "data" / "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """A printable character for each byte, in CLIP's order (printable Latin-1 first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


def read_merges(count: int, path: Path = MERGES_FILE) -> list[str]:
    """The first `count` merges, each `"left right"`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return lines[1 : count + 1]  # the first line names the version


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token → id, in CLIP's order."""
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer(folder: Path) -> None:
    """Write the four files of a `CLIPTokenizer` folder."""
    merges = read_merges(VOCABULARY - 512 - 2)
    tokens = vocabulary(merges)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_ENCODER["max_position_embeddings"],
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", tokens)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def write_json(path: Path, value: object) -> None:
    """JSON as the transformers library writes it."""
    text = json.dumps(value, ensure_ascii=False, indent=2 if path.name != "vocab.json" else None)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the truncated CLIP tokenizer.")
    parser.add_argument("folder", type=Path)
    write_tokenizer(parser.parse_args().folder)


if __name__ == "__main__":
    main()
