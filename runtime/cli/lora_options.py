"""``--lora``, ``--lora-dir`` and ``--lora-partial`` of ``sd-run``, and what is said of LoRAs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sdrt.runtime.console.run_command import say

if TYPE_CHECKING:
    from sdrt.runtime.request.request import Request


def add_lora_options(add: Callable[..., object]) -> None:
    """Add them to a command line.

    Args:
        add: Its ``add_argument``.
    """
    add(
        "--lora",
        action=AddLora,
        metavar="FILE[=WEIGHT]",
        help="a LoRA (.safetensors, or a name in --lora-dir) and how strongly it changes the model (default: "
        "1); may be given several times",
    )
    add(
        "--lora-dir",
        metavar="DIR",
        help="where <lora:name:0.8> in prompts finds its file, with all below (default: that of "
        "the embedded model, for that one)",
    )
    add(
        "--lora-partial",
        action="store_true",
        default=None,
        help="take of LoRAs what has a place in the model; by default one with anything else is refused",
    )


class AddLora(argparse.Action):
    """``FILE=WEIGHT`` or ``FILE`` into a table; a name may have an equals sign, too."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_rest: object
    ) -> None:
        """See the class."""
        file, equals, number = values.rpartition("=")
        weight = 1.0
        if not equals or os.path.isfile(values):  # noqa: PTH113 - Path.is_file raises for too long a name
            file = values
        else:
            try:
                weight = float(number)
            except ValueError:
                parser.error(f"argument --lora: {values!r} is FILE=WEIGHT, and {number!r} is no number")
        loras = dict(namespace.lora or {})
        if file in loras:
            parser.error(f"argument --lora: {file} is given twice")
        namespace.lora = {**loras, file: weight}


def say_loras(requests: Iterable[Request]) -> None:
    """Say which LoRAs change the model, how strongly, and what they are."""
    uses = [use for request in requests for image in request.loras for use in image]
    files = {use.lora.file.sha256: use.lora.file for use in uses}
    for digest, file in files.items():
        weights = sorted({str(use.weights) for use in uses if use.lora.file.sha256 == digest})
        count = f"{len(file.changes)} tensors" + (f", {len(file.left_out)} left out" if file.left_out else "")
        say("sd-run", f"LoRA {file.path}, weight {', '.join(weights)} ({file.format}, {count})")
