"""Measure the adapters of this folder, and draw their sheets.

    python -m lora.measure --figures lora/figures.json --sheets out

Styles: what share of the pictures a classifier calls the style at weights 0, 0.5 and 1, and whether the
thing is still the one that the caption names. The concept: does its word draw it, and do other words draw
what they did. Few steps: do four steps without guidance draw what twenty with guidance do. Drawn by
diffusers and PEFT, fp32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from contact_sheet import contact_sheet
from data import GROUP_PROMPTS, Emoji, load_images, read_captions
from evaluate import GROUP_SEEDS, Artist, Task, caption_tasks, retrieval, rounded, unseen_tasks
from features import distances
from latents import captioned_images
from lora.adapters import CHECKPOINT, FOLDER
from lora.classifier import StyleClassifier
from lora.styles import STYLES
from lora.train_concept import CODES, CONCEPT
from lora.train_style import is_shown

WEIGHTS = (0.0, 0.5, 1.0)
CONCEPT_SEEDS = 4
SHEET_COLUMNS = 12


class LoraArtist(Artist):
    """An artist with one adapter at a time."""

    def use(self, name: str | None, weight: float = 1.0) -> None:
        """Draw with `<name>.safetensors` from now on, or with none."""
        self.pipeline.unload_lora_weights()
        if name is not None and weight:
            self.pipeline.load_lora_weights(load_file(FOLDER / f"{name}.safetensors"), adapter_name=name)
            self.pipeline.set_adapters([name], [weight])

    def sampler(self, few_steps: bool) -> None:
        """LCM's sampler, or DDIM."""
        kind = LCMScheduler if few_steps else DDIMScheduler
        self.pipeline.scheduler = kind.from_config(self.pipeline.scheduler.config)


class Sheet:
    """Rows of pictures that are compared: the same captions in each row."""

    def __init__(self) -> None:
        self.pictures: list[Tensor] = []
        self.captions: list[str] = []

    def add(self, label: str, pictures: Tensor, captions: list[str]) -> None:
        """A row of at most `SHEET_COLUMNS` pictures, evenly chosen."""
        places = [n * len(captions) // SHEET_COLUMNS for n in range(SHEET_COLUMNS)]
        self.pictures.append(pictures[places])
        self.captions += [f"{label}: {captions[n]}" for n in places]

    def save(self, path: Path) -> None:
        contact_sheet(torch.cat(self.pictures), self.captions, SHEET_COLUMNS).save(path, optimize=True)


def own_captions(table: list[Emoji]) -> list[Task]:
    """Each emoji by its canonical caption, each with a seed of its own."""
    return [Task(emoji.caption, seed) for seed, emoji in enumerate(table)]


def style_figures(style: str, artist: LoraArtist, table: list[Emoji], sheet: Sheet) -> dict[str, object]:
    """Share of the style and of recognised things at each weight, for emoji shown in training and others."""
    plain = captioned_images(table) / 255.0
    styled = STYLES[style](plain)
    kept_out = torch.tensor([not is_shown(n) for n in range(len(table))])
    judge = StyleClassifier(plain, styled, kept_out)
    figures: dict[str, object] = {
        "classifier": {"held_out_accuracy": judge.accuracy, "held_out_pictures": judge.test_pictures}
    }
    for weight in WEIGHTS:
        artist.use(style, weight)
        drawn = artist.draw(own_captions(table))
        sheet.add(f"{style} {weight:g}", drawn, [emoji.caption for emoji in table])
        # At half weight a picture may be nearer to the thing as it was or to the thing in the style.
        nearest = distances(drawn, torch.cat([plain, styled])).argmin(dim=1) % len(table)
        right = (nearest == torch.arange(len(table))).float()
        figures[f"weight_{weight:g}"] = {
            "style_shown": judge.share(drawn[~kept_out]),
            "style_kept_out": judge.share(drawn[kept_out]),
            "object_top1_shown": right[~kept_out].mean().item(),
            "object_top1_kept_out": right[kept_out].mean().item(),
        }
    return figures


def concept_figures(artist: LoraArtist, table: list[Emoji], sheet: Sheet) -> dict[str, object]:
    """How often the nearest of all 1,911 emoji is the concept, and what becomes of the other captions."""
    images = load_images()
    codes = list(images)
    every = torch.stack(list(images.values())) / 255.0
    known = captioned_images(table) / 255.0
    tasks = [Task(prompt, seed) for prompt in CONCEPT[0].prompts() for seed in range(CONCEPT_SEEDS)]
    figures: dict[str, object] = {"pictures": len(tasks), "among": len(codes)}
    for weight in WEIGHTS:
        artist.use("wizard", weight)
        drawn, others = artist.draw(tasks), artist.draw(own_captions(table))
        nearest = distances(drawn, every).argmin(dim=1).tolist()
        sheet.add(f"wizard {weight:g}", drawn, [task.prompt for task in tasks])
        sheet.add(f"wizard {weight:g}", others, [emoji.caption for emoji in table])
        figures[f"weight_{weight:g}"] = {
            "concept_top1": sum(codes[n] in CODES for n in nearest) / len(tasks),
            "other_captions_top1": retrieval(others, known, list(range(len(table))))["top1"],
        }
    return figures


def group_tasks() -> tuple[list[Task], list[str]]:
    """Prompts that name a group, with the seeds of `evaluate.py`, and the group of each."""
    tasks = [Task(prompt, seed) for prompt in GROUP_PROMPTS.values() for seed in range(GROUP_SEEDS)]
    return tasks, [group for group in GROUP_PROMPTS for _ in range(GROUP_SEEDS)]


def few_steps_figures(artist: LoraArtist, table: list[Emoji], sheet: Sheet) -> dict[str, object]:
    """Four steps with the adapter beside four and twenty without."""
    known = captioned_images(table) / 255.0
    tasks, groups = group_tasks()
    figures: dict[str, object] = {}
    for label, adapter, few, guidance in (
        ("20_steps_guidance_5", None, False, 5.0),
        ("4_steps_guidance_5", None, True, 5.0),
        ("4_steps_guidance_1", None, True, 1.0),
        ("4_steps_guidance_1_with_adapter", "lcm", True, 1.0),
    ):
        artist.use(adapter)
        artist.sampler(few)
        steps = 4 if few else 20
        captions, targets = caption_tasks(table)
        named = retrieval(artist.draw(captions, guidance, steps), known, targets)
        reworded = retrieval(artist.draw(unseen_tasks(table)[0], guidance, steps), known, targets)
        drawn = artist.draw(tasks, guidance, steps)
        sheet.add(label, drawn, [task.prompt for task in tasks])
        away = distances(drawn, known)
        hits = [table[n].group == group for n, group in zip(away.argmin(dim=1).tolist(), groups, strict=True)]
        figures[label] = {
            "captions_top1": named["top1"],
            "captions_distance": named["mean_distance"],
            "unseen_wordings_top1": reworded["top1"],
            "in_group": sum(hits) / len(hits),
            "group_distance": away.amin(dim=1).mean().item(),
        }
    artist.sampler(few_steps=False)
    return figures


MEASURES: dict[str, Callable[[LoraArtist, list[Emoji], Sheet], dict[str, object]]] = {
    **{style: partial(style_figures, style) for style in STYLES},
    "wizard": concept_figures,
    "lcm": few_steps_figures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the adapters.")
    parser.add_argument(
        "--figures", type=Path, help="write the figures into this JSON file; others in it stay"
    )
    parser.add_argument("--sheets", type=Path, help="write a sheet for each into this folder")
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table, artist = read_captions(), LoraArtist(CHECKPOINT, "cpu")
    for name in arguments.only:
        sheet = Sheet()
        figures = {name: rounded(MEASURES[name](artist, table, sheet))}
        print(json.dumps(figures, indent=2), flush=True)
        if arguments.sheets:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            sheet.save(arguments.sheets / f"{name}.png")
        if arguments.figures:
            before = json.loads(arguments.figures.read_text()) if arguments.figures.exists() else {}
            arguments.figures.write_text(json.dumps({**before, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
