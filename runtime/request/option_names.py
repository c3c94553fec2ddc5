"""What the options of a call are named: by the pipeline, by ``sd-run``, and by other tools."""

from __future__ import annotations

from typing import Final, NamedTuple


class Names(NamedTuple):
    """The names of one option beside the pipeline's.

    Attributes:
        command: The option of ``sd-run`` without its dashes, where it is another.
        others: Names in other tools that mean the same; ``sd-run`` takes them, too.
        nearly: Names in other tools that mean nearly the same: Python's answer to them is a question.
    """

    command: str = ""
    others: tuple[str, ...] = ()
    nearly: tuple[str, ...] = ()


# The pipeline's name, or the command's where only that has the option → its other names.
OPTION_NAMES: Final = {
    "prompt": Names(),
    "negative_prompt": Names(others=("neg", "negative", "neg_prompt")),
    "prompts": Names(others=("prompt_file", "prompts_file", "from_file")),
    "guidance_scale": Names(others=("cfg", "cfg_scale", "scale", "guidance")),
    "num_inference_steps": Names("steps", ("ddim_steps", "num_steps", "sampling_steps")),
    "sampler": Names(others=("sampler_name", "sampling_method", "scheduler")),
    "num_images_per_prompt": Names(
        "num_images", ("n_iter", "n_samples", "batch_count", "batch_size"), nearly=("n",)
    ),
    "image": Names(others=("init_image", "init_img")),
    "mask_image": Names("mask"),
    "depth_map": Names("depth", ("depth_image",)),
    "strength": Names(others=("denoise", "denoising_strength")),
    "lora_dir": Names(others=("lora_model_dir",)),
    "output": Names(others=("out", "outdir")),
    "loras": Names("lora"),
    "seed": Names(nearly=("generator",)),
    "callback_on_step_end": Names(nearly=("callback",)),
}
# Any of the other names → the pipeline's.
ALSO_CALLED: Final = {
    other: ours
    for ours, names in OPTION_NAMES.items()
    for other in (*filter(None, (names.command,)), *names.others, *names.nearly)
}


def command_name(option: str) -> str:
    """The attribute of a parsed command line that holds an option of the pipeline."""
    return OPTION_NAMES.get(option, Names()).command or option
