"""What a call of the pipeline can be asked, in one place for Python, ``--interactive`` and ``sd-run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sdrt.runtime.checks import did_you_mean
from sdrt.runtime.errors import UsageError
from sdrt.runtime.request.option_names import ALSO_CALLED
from sdrt.runtime.request.output import CallbackOptions, OutputType
from sdrt.runtime.request.recipes import FIELDS
from sdrt.runtime.samplers.noise import Rng


class DrawOptions(CallbackOptions, total=False):
    """Arguments of `Pipeline.__call__` by name; the names are diffusers' where it has the thing.

    What is drawn:

    * ``negative_prompt``: what to move away from: one text for all, or one per prompt;
    * ``plain_prompt``: brackets, colons and ``BREAK`` in prompts are text; by default they are weights and
      chunks as `sdrt.runtime.text.syntax` says;
    * ``comma_lookback``: a prompt of several chunks is parted behind a comma if one stands within this many
      tokens of a chunk's end, 20 as in stable-diffusion-webui; 0 parts it wherever a chunk is full;
    * ``clip_skip``: layers of the text encoder to leave out at its end, 0 (none) to all but one;
    * ``height``, ``width``: pixels; by default the picture's that was given, else the bundle's;
    * ``loras``: LoRAs that change the model for this call, a table of names or paths and their weights,
      ``{"pixel": 0.8, "styles/ink.safetensors": {"text_encoder": 0.5, "unet": 1}}``. A name is that of an
      adapter (`Pipeline.load_lora_weights`) or of a file in the folder of LoRAs (``lora_dir`` of
      `Pipeline.load`). By default those that are active; prompts add theirs (``<lora:pixel:0.8>``);
    * ``lora_partial``: take of LoRA files what has a place in the model, where by default what has none is
      refused;
    * ``num_images_per_prompt``: K; N = P·K images are drawn, prompt by prompt;
    * ``original_size``, ``crops_coords_top_left``, ``target_size``: height and width, or top and left, of
      what SDXL is to imitate; by default the picture's size, and (0, 0);
    * ``aesthetic_score``, ``negative_aesthetic_score``: how much people like what SDXL's refiner is to
      imitate, and what it is to move away from, 0 to 100; by default 6 and 2.5.

    From what:

    * ``seed``: image i gets ``seed + i``; or a list of N seeds; -1, and by default, a random one;
    * ``rng``: ``philox`` gives the noise of PyTorch's CUDA generator, ``cpu`` of its CPU generator;
    * ``latents``: float32 [N, C, h, w] of unit variance, in place of noise drawn from the seeds: a NumPy
      array, or on a GPU an array of it (``__cuda_array_interface__`` or DLPack);
    * ``image``: a picture to start from: a path, a Pillow image or a uint8 array [H, W, 3]. Its latents are
      drawn from the VAE's posterior with the seed of each image, as diffusers does with a list of pictures
      and generators. For an image-variations or stable-unclip bundle it is what is varied, for an
      instruct-pix2pix one what is edited, for an x4-upscaler one what is enlarged;
    * ``strength``: how much of the schedule is run on the picture, above 0 (nearly all is kept) to 1; by
      default 0.8 (SDXL's refiner 0.3), and 1 with a mask;
    * ``mask_image``: what of ``image`` is drawn anew: white is, black is kept exactly;
    * ``depth_map``: for a bundle that draws with depth maps: a picture or an array [H, W] of any numbers, the
      brighter or higher the nearer, in the proportions of what is drawn (or cut in its middle);
    * ``expand``: pixels that the picture grows by, (left, top, right, bottom); the new area is drawn;
    * ``variation``: the picture is inverted to the noise that it would be drawn from (DDIM inversion), and
      this share of that noise, 0 to 1, comes from the seed. By default 0.3 where an image and no prompt is
      given. It is the posterior's mean that is inverted.

    How:

    * ``num_inference_steps``: noise levels that the run visits. Where a sampler evaluates the U-Net more
      often (heun, dpm2, pndm …), the callback and the timings count each evaluation as a step;
    * ``guidance_scale``: w of classifier-free guidance; at 1 or below only the conditional half runs. A list
      has one w per step;
    * ``image_guidance_scale``: of an instruct-pix2pix bundle, how far to keep to the given picture, from 1;
      by default 1.5. It works where ``guidance_scale`` does;
    * ``noise_level``: of a stable-unclip or x4-upscaler bundle, how much noise is laid over the given
      picture: a whole number from 0 to what the checkpoint admits; by default 0 and 20;
    * ``guidance_interval``: (start, stop) as shares of the steps, outside of which w is 1 (Kynkäänniemi et
      al. 2024), so that only one half runs there;
    * ``guidance_rescale``: phi of Lin et al. 2023, section 3.4, 0 to 1;
    * ``refine_from``: the share of the schedule, above 0 and below 1, after which the refiner goes on that
      the pipeline was loaded with. It is asked the same; the picture is decoded by its VAE;
    * ``denoising_end``, ``denoising_start``: the share of the schedule after which this run ends, with noisy
      latents, and that which another run did before this one: ``latents`` (or ``image``, as in diffusers)
      are then what that one ended with. So an ensemble is drawn by two calls;
    * ``sampler``: a name in `sdrt.runtime.samplers.registry.SAMPLERS`, or what A1111 or diffusers call it,
      with a schedule or without (``DPM++ 2M Karras``: `sdrt.runtime.samplers.registry`); by default the
      bundle's;
    * ``karras``, ``spacing``, ``sigma_schedule``, ``timesteps``, ``sigmas``, ``eta``, ``solver_order``,
      ``lower_order_final``, ``original_inference_steps``: see `sdrt.runtime.samplers.table.SamplerOptions`;
      ``karras`` is short for the ``sigma_schedule`` of that name. A sampler that adds noise draws ``philox``
      on the device, inside the step's graph; the CPU generator's numbers are made on the host, and each
      step that adds noise then begins with an upload.

    A recipe of `sdrt.runtime.request.output.PipelineOutput.recipes` is a call's arguments, too: what only
    informs (``backend``, ``version`` …) is passed over, and what it was drawn from must be there.

    And out:

    * ``output_type``: ``pil``, ``numpy``, ``latents`` (no decoding), or ``device``: pictures and latents stay
      in the device's memory, and only fault words are downloaded; or as diffusers has them ``np`` (float32 in
      [0, 1], in steps of 1/255) and ``latent`` (the latents as ``images``, too);
    * ``callback_on_step_end``: called as ``f(pipeline, step, timestep, state)`` after each step of each batch
      of images; a dict it returns may hold ``latents`` to go on with, beside the rest of ``state`` as it
      was. An exception it raises ends the run and leaves the pipeline usable; after
      ``pipeline._interrupt = True`` no further step is done, and what there is is decoded, as in diffusers
      (in a batch that had not begun, noise); the recipe says so in ``interrupted_after_step``;
    * ``callback_on_step_end_tensor_inputs``: what ``state`` holds, each at the cost of a download a step:
      ``latents``, ``denoised`` (the guess of the clean latents, float32 [N, C, h, w]) and ``preview`` (that
      guess as a small picture, uint8 [N, h, w, 3]). With ``()`` nothing is copied and nothing waits;
    * ``callback_on_batch_end``: called as ``f(pipeline, batch)`` with the pictures of each batch as soon as
      they are finished (`sdrt.runtime.request.output.FinishedBatch`), so that they can be saved before the
      next one is begun.
    """

    negative_prompt: str | Sequence[str] | None
    plain_prompt: bool
    comma_lookback: int
    clip_skip: int
    loras: Mapping[str, Any] | None
    lora_partial: bool
    height: int | None
    width: int | None
    num_images_per_prompt: int
    original_size: Sequence[int] | None
    crops_coords_top_left: Sequence[int] | None
    target_size: Sequence[int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    seed: int | Sequence[int] | None
    rng: Rng
    latents: Any
    image: Any
    strength: float | None
    mask_image: Any
    depth_map: Any
    expand: Sequence[int] | None
    variation: float | None
    num_inference_steps: int | None
    guidance_scale: float | Sequence[float] | None
    image_guidance_scale: float | None
    noise_level: int | None
    guidance_interval: Sequence[float] | None
    guidance_rescale: float
    refine_from: float | None
    denoising_end: float | None
    denoising_start: float | None
    sampler: str | None
    karras: bool
    spacing: str | None
    sigma_schedule: str | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    solver_order: int | None
    lower_order_final: bool
    original_inference_steps: int | None
    output_type: OutputType


_FUNCTIONS: Final = tuple(CallbackOptions.__annotations__)
OPTIONS: Final = (*(name for name in DrawOptions.__annotations__ if name not in _FUNCTIONS), *_FUNCTIONS)
# What a line of JSON cannot hold.
_IN_PYTHON_ONLY: Final = ("latents", "output_type")
JSON_OPTIONS: Final = tuple(name for name in OPTIONS if name not in (*_IN_PYTHON_ONLY, *_FUNCTIONS))


def check_names(
    options: Mapping[str, Any], allowed: Sequence[str], what: str, also: Sequence[str] = FIELDS
) -> None:
    """Refuse an option that there is not.

    Args:
        options: What was given, by name.
        allowed: Names that there are.
        what: Has them, for the message.
        also: Names that are taken and not told of: those that recipes have.

    Raises:
        UsageError: Names it, and the nearest that there is.
    """
    for name in options:
        if name not in allowed and name not in also:
            known = ALSO_CALLED.get(str(name).lower().replace("-", "_"))
            also_called = {} if known is None or known not in allowed else {str(name): known}
            question = did_you_mean(str(name), allowed, also_called=also_called)
            hint = f", {question}" if question else ":"
            raise UsageError(f"{what} has no {str(name)[:100]}{hint} there is {', '.join(allowed)}")
