"""Measure the checkpoint: does it draw what the caption says?

    python evaluate.py . --figures figures.json --sheet contact-sheet.png

For 200 captions (canonical ones and alternates) a picture is drawn, and the training pictures are ranked by
their distance to it (`features.py`). Top 1: the nearest has this caption; top 5: one of the five nearest has.
The same for wordings that training never used, and for prompts that name a group; each at guidance 5 and 1.
Then the effect of a negative prompt. The drawing is done by diffusers; pictures drawn by another program from
`--write-prompts` are judged with `--pictures`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from contact_sheet import contact_sheet
from data import GROUP_PROMPTS, Emoji, read_captions, to_unit_range
from features import distances
from latents import captioned_images, encode

PROMPTS = 200
STEPS, GUIDANCE = 20, 5.0
UNSEEN_WORDINGS = (
    "please draw {} for me",
    "a small sticker that shows {}",
    "{} on a white background",
    "i would like to see {}, very simple",
)
GROUP_SEEDS = 8
NEGATIVE_GROUPS = ("fruit", "animal", "vehicle", "food")
NEGATIVE_MEMBERS, NEGATIVE_SEEDS = 6, 6
SHEET_COLUMNS, SHEET_ROWS = 8, 12


@dataclass(frozen=True)
class Task:
    """One picture to draw: its prompts and its seed."""

    prompt: str
    seed: int
    negative: str = ""


class Artist:
    """Draws with diffusers' pipeline and DDIM. The noise comes from PyTorch's CPU generator."""

    def __init__(self, checkpoint: Path, device: str, batch: int = 40) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(checkpoint).to(device)
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        self.batch = batch

    def draw(self, tasks: list[Task], guidance: float = GUIDANCE, steps: int = STEPS) -> Tensor:
        """Pictures in 0…1: [N, 3, 64, 64]."""
        parts = []
        for start in range(0, len(tasks), self.batch):
            part = tasks[start : start + self.batch]
            pictures = self.pipeline(
                [task.prompt for task in part],
                negative_prompt=[task.negative for task in part],
                generator=[torch.Generator().manual_seed(task.seed) for task in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images
            parts.append(torch.from_numpy(pictures).permute(0, 3, 1, 2))
            print(f"drew {start + len(part)} of {len(tasks)}", flush=True)
        return torch.cat(parts)


def caption_tasks(table: list[Emoji]) -> tuple[list[Task], list[int]]:
    """The 200 captions and the number of the emoji that each names.

    Every emoji once, canonical caption and alternates in turn, then from the start with the others.
    """
    tasks, targets = [], []
    for seed in range(PROMPTS):
        rounds, index = divmod(seed, len(table))
        phrases = table[index].phrases
        tasks.append(Task(phrases[(index + rounds) % len(phrases)], seed))
        targets.append(index)
    return tasks, targets


def retrieval(drawn: Tensor, known: Tensor, targets: list[int]) -> dict[str, float]:
    """Shares of pictures whose own emoji is the nearest (top 1) or among the five nearest (top 5)."""
    away = distances(drawn, known)
    own = away.gather(1, torch.tensor(targets)[:, None])
    rank = (away < own).sum(dim=1)
    return {
        "top1": (rank < 1).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "mean_distance": own.mean().item(),
    }


def unseen_tasks(table: list[Emoji]) -> tuple[list[Task], list[int]]:
    """The same 200 captions in wordings that are not among the templates of training."""
    tasks, targets = caption_tasks(table)
    wordings = [UNSEEN_WORDINGS[n % len(UNSEEN_WORDINGS)] for n in range(len(tasks))]
    reworded = [Task(w.format(t.prompt), t.seed) for w, t in zip(wordings, tasks, strict=True)]
    return reworded, targets


def compare_guidance(
    artist: Artist, tasks: list[Task], targets: list[int], known: Tensor, guided: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Retrieval at guidance 5 (drawn here unless given) and at guidance 1, from the same noise."""
    guided = artist.draw(tasks) if guided is None else guided
    plain = artist.draw(tasks, guidance=1.0)
    return {
        "guidance_5": retrieval(guided, known, targets),
        "guidance_1": retrieval(plain, known, targets),
    }


def group_figures(artist: Artist, table: list[Emoji], known: Tensor) -> dict[str, float]:
    """For prompts like "a fruit": how often the nearest training picture is of that group."""
    tasks = [Task(prompt, seed) for prompt in GROUP_PROMPTS.values() for seed in range(GROUP_SEEDS)]
    groups = [group for group in GROUP_PROMPTS for _ in range(GROUP_SEEDS)]
    figures: dict[str, float] = {"prompts": len(tasks)}
    hits: dict[int, list[bool]] = {}
    for guidance in (5, 1):
        nearest = distances(artist.draw(tasks, guidance), known).argmin(dim=1).tolist()
        hits[guidance] = [table[n].group == group for n, group in zip(nearest, groups, strict=True)]
        figures[f"in_group_guidance_{guidance}"] = sum(hits[guidance]) / len(tasks)
        figures[f"different_emoji_guidance_{guidance}"] = len(set(nearest))
    differ = [five for five, one in zip(hits[5], hits[1], strict=True) if five != one]
    figures |= {"only_guidance_5": sum(differ), "only_guidance_1": len(differ) - sum(differ)}
    figures["sign_test_p"] = sign_test(sum(differ), len(differ))
    return figures


def negative_effect(artist: Artist, table: list[Emoji], known: Tensor) -> dict[str, float]:
    """What naming an emoji in the negative prompt does to pictures of its group.

    The prompt is a group ("a fruit"), the negative prompt one member of it ("a banana"); the same seeds are
    drawn without it. Groups, members and seeds are fixed beforehand. Compared pair by pair: the distance to
    the named emoji, and how often that is the nearest one.
    """
    plain, negated, targets = [], [], []
    for group in NEGATIVE_GROUPS:
        members = [n for n, emoji in enumerate(table) if emoji.group == group][:NEGATIVE_MEMBERS]
        for index in members:
            for seed in range(NEGATIVE_SEEDS):
                plain.append(Task(GROUP_PROMPTS[group], seed))
                negated.append(Task(GROUP_PROMPTS[group], seed, table[index].caption))
                targets.append(index)
    seeds_only = list(dict.fromkeys(plain))  # without a negative prompt, members share their pictures
    pictures = dict(zip(seeds_only, artist.draw(seeds_only), strict=True))
    before = distances(torch.stack([pictures[task] for task in plain]), known)
    after = distances(artist.draw(negated), known)
    return paired_figures(before, after, torch.tensor(targets))


def paired_figures(before: Tensor, after: Tensor, targets: Tensor) -> dict[str, float]:
    """Compare distances [N, M] without and with the negative prompt, to the emoji it names [N]."""
    own_before = before.gather(1, targets[:, None])[:, 0]
    own_after = after.gather(1, targets[:, None])[:, 0]
    change = (own_after - own_before).double()
    error = change.std().item() / math.sqrt(len(change))
    further, nearer = int((change > 0).sum()), int((change < 0).sum())
    return {
        "pairs": len(change),
        "named_is_nearest_without": (before.argmin(dim=1) == targets).float().mean().item(),
        "named_is_nearest_with": (after.argmin(dim=1) == targets).float().mean().item(),
        "mean_distance_without": own_before.mean().item(),
        "mean_distance_with": own_after.mean().item(),
        "mean_change": change.mean().item(),
        "standard_error": error,
        "further": further,
        "nearer": nearer,
        "sign_test_p": sign_test(further, further + nearer),
    }


def sign_test(successes: int, trials: int) -> float:
    """One-sided probability of at least so many successes if both directions were equally likely."""
    tail = sum(math.comb(trials, k) for k in range(successes, trials + 1))
    return float(tail / 2**trials)


@torch.no_grad()
def autoencoder_figures(artist: Artist, images: Tensor) -> dict[str, float]:
    """Peak signal-to-noise ratio of the captioned pictures, encoded and decoded (dB)."""
    vae = artist.pipeline.vae
    latents = encode(vae, images)
    output = torch.cat([vae.decode(part).sample for part in torch.split(latents, 16)])
    error = (output.clamp(-1, 1) - to_unit_range(images)).square().mean(dim=(1, 2, 3)) / 4.0
    ratios = -10.0 * error.log10()
    return {"psnr_mean": ratios.mean().item(), "psnr_worst": ratios.min().item()}


def feature_check(known: Tensor) -> dict[str, float]:
    """Does the feature space find a training picture again after a shift of 2 pixels and noise?"""
    generator = torch.Generator().manual_seed(0)
    shifted = torch.nn.functional.pad(known, (2, 0, 2, 0), value=1.0)[..., :64, :64]
    noisy = (shifted + 0.05 * torch.randn(known.shape, generator=generator)).clamp(0, 1)
    return retrieval(noisy, known, list(range(len(known))))


def read_pictures(folder: Path, count: int) -> Tensor:
    """`000.png`, `001.png`, … of `folder`: [count, 3, 64, 64] in 0…1."""
    pictures = [Image.open(folder / f"{n:03d}.png").convert("RGB") for n in range(count)]
    return torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in pictures]).permute(0, 3, 1, 2) / 255.0


def measure(artist: Artist, table: list[Emoji]) -> tuple[dict[str, object], Tensor]:
    """All figures of the model card, and the pictures of the 200 captions."""
    images = captioned_images(table)
    known = images / 255.0
    tasks, targets = caption_tasks(table)
    drawn = artist.draw(tasks)
    figures: dict[str, object] = {
        "prompts": PROMPTS,
        "emoji": len(table),
        "steps": STEPS,
        "sampler": "ddim",
        "captions": compare_guidance(artist, tasks, targets, known, drawn),
        "unseen_wordings": compare_guidance(artist, *unseen_tasks(table), known),
        "groups": group_figures(artist, table, known),
        "chance_top1": 1.0 / len(table),
        "negative_prompt": negative_effect(artist, table, known),
        "feature_check": feature_check(known),
        "autoencoder": autoencoder_figures(artist, images),
    }
    return figures, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the emoji checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--figures", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write-prompts", type=Path, help="only write the prompts and their seeds")
    parser.add_argument("--pictures", type=Path, help="only judge 000.png … of this folder")
    arguments = parser.parse_args()
    table = read_captions()
    tasks, targets = caption_tasks(table)
    if arguments.write_prompts:
        prompts = [{"prompt": task.prompt, "seed": task.seed} for task in tasks]
        arguments.write_prompts.write_text(json.dumps(prompts, indent=1) + "\n")
        return
    if arguments.pictures:
        drawn = read_pictures(arguments.pictures, len(tasks))
        figures: dict[str, object] = {"pictures": retrieval(drawn, captioned_images(table) / 255.0, targets)}
    else:
        figures, drawn = measure(Artist(arguments.checkpoint, arguments.device), table)
    text = json.dumps(rounded(figures), indent=2)
    print(text)
    if arguments.figures:
        arguments.figures.write_text(text + "\n")
    if arguments.sheet:
        chosen = sheet_choice(len(table))
        captions = [tasks[n].prompt for n in chosen]
        contact_sheet(drawn[chosen], captions, SHEET_COLUMNS).save(arguments.sheet, optimize=True)


def rounded(value: object) -> object:
    """Floats with four significant digits, inside nested dictionaries too."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def sheet_choice(count: int) -> list[int]:
    """Evenly spread over the table: neither the best nor the worst."""
    places = SHEET_COLUMNS * SHEET_ROWS
    return [place * count // places for place in range(places)]


if __name__ == "__main__":
    main()
