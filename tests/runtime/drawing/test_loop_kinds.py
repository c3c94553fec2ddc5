"""Kinds of steps in one loop: what each computes against float64, and what a change of kind costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.runs.loop_runs import (
    EVEN_SIZE,
    IMAGES,
    MORE_SIZES,
    SCALE,
    SIZE,
    TOKENS,
    WIDTH,
    Blend,
    CountingDevice,
    Exact,
    FakeUNet,
    exact_run,
    new_blend,
    new_loop,
    normal,
    predict,
    start,
    texts,
)

import tolerances
from sdrt.kernels.sampler_row import Column
from sdrt.runtime.bundle.families.record import TensorSpec
from sdrt.runtime.devices.host import HostDevice
from sdrt.runtime.drawing.loop import DenoiseLoop, StepKind
from sdrt.runtime.errors import UsageError
from sdrt.runtime.samplers.registry import SAMPLERS, make_table
from sdrt.runtime.samplers.schedule import FloatArray, NoiseSchedule
from sdrt.runtime.samplers.table import SamplerTable

STEPS = 8
PLAIN, GUIDED = StepKind(guided=False), StepKind(guided=True)
PHI = 0.75
KINDS = [
    StepKind(*choice) for choice in product([False, True], repeat=5) if choice[0] or not choice[2]
]  # all that there are


def exact(
    table: SamplerTable,
    kinds: Sequence[StepKind],
    guidance: FloatArray,
    *,
    size: tuple[int, int] = SIZE,
    **options: Any,
) -> Exact:
    """The run of `draw` in float64."""
    text = texts(guided=True).astype(np.float64)
    initial = normal(IMAGES, 4, *size, seed=1).astype(np.float64) * table.init_noise_sigma
    return exact_run(
        table, lambda x, t: predict(np.concatenate([x, x]), t, text), kinds, guidance, initial, **options
    )


def draw(
    loop: DenoiseLoop,
    table: SamplerTable,
    kinds: Sequence[StepKind],
    guidance: FloatArray,
    *,
    blend: Blend | None = None,
    phi: float = 0.0,
) -> list[NDArray[np.float32]]:
    """x after each row of a run from the noise of seed 1."""
    loop.prepare(set(kinds))
    kept = {} if blend is None else vars(blend)
    latents = normal(*loop.noise.shape, seed=1)
    loop.start(table, guidance, seeds=[0] * IMAGES, latents=latents, guidance_rescale=phi, **kept)
    result = []
    for kind in kinds:
        loop.step(kind)
        result.append(loop.latents())
    return result


def assert_near(found: Sequence[FloatArray | NDArray[np.float32]], wanted: Sequence[FloatArray]) -> None:
    for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert np.max(np.abs(one - other)) <= tolerances.LOOP_RUN * np.max(np.abs(other)), step


def interval(count: int) -> list[StepKind]:
    """Guidance in the middle alone."""
    return [GUIDED if count // 4 <= step < 3 * count // 4 else PLAIN for step in range(count)]


@pytest.mark.parametrize("size", [SIZE, EVEN_SIZE], ids=["apart", "views"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "pndm"])
def test_steps_outside_the_interval_are_those_of_w_1(name: str, size: tuple[int, int]) -> None:
    """Guidance that changes from row to row; a row without it equals one with w = 1, and costs half."""
    table = make_table(name, NoiseSchedule(), STEPS)
    kinds = interval(len(table))
    guidance = np.where([kind.guided for kind in kinds], np.linspace(2, 5, len(table)), 1.0)
    unet, always = FakeUNet(), [GUIDED] * len(table)
    mixed = draw(new_loop(unet, size=size), table, kinds, guidance)
    rows = unet.rows[-len(table) :]
    assert rows == [2 * IMAGES if kind.guided else IMAGES for kind in kinds]
    whole = draw(new_loop(size=size), table, always, guidance)
    expected = exact(table, kinds, guidance, size=size)
    assert_near(mixed, expected.latents)
    assert_near(whole, expected.latents)


def test_w_of_a_row_without_guidance_is_not_read() -> None:
    table = make_table("euler", NoiseSchedule(), STEPS)
    kinds = interval(STEPS)
    guidance = np.where([kind.guided for kind in kinds], SCALE, np.nan)
    assert_near(draw(new_loop(), table, kinds, guidance), exact(table, kinds, guidance).latents)


def test_a_loop_without_guidance_draws_what_the_half_of_one_with_it_draws() -> None:
    table = make_table("dpmpp_2m", NoiseSchedule(), STEPS)
    unguided = new_loop(guided=False)
    for row, text in zip(
        unguided.conditioning["encoder_hidden_states"], texts(guided=True)[IMAGES:], strict=True
    ):
        row[...] = text
    kinds, guidance = [PLAIN] * STEPS, np.zeros(STEPS)
    for one, other in zip(
        draw(unguided, table, kinds, guidance), draw(new_loop(), table, kinds, guidance), strict=True
    ):
        assert np.array_equal(one, other)


def test_rescaled_guidance() -> None:
    table = make_table("dpmpp_2m", NoiseSchedule(), STEPS)
    kinds, guidance = [StepKind(guided=True, rescales=True)] * STEPS, np.full(STEPS, SCALE)
    expected = exact(table, kinds, guidance, phi=PHI)
    assert_near(draw(new_loop(), table, kinds, guidance, phi=PHI), expected.latents)
    plain = exact(table, kinds, guidance, phi=0.0).latents[-1]
    assert np.max(np.abs(plain - expected.latents[-1])) > 0.01  # it would be noticed
    assert_near(draw(new_loop(), table, [GUIDED] * STEPS, guidance, phi=PHI)[-1:], [plain])


@pytest.mark.parametrize("name", SAMPLERS)
def test_blending_with_a_mask(name: str) -> None:
    """Every sampler; where the mask is 0 the result is what was to be kept, bit for bit."""
    table = make_table(name, NoiseSchedule(), STEPS, eta=0.0)
    blend, kind = new_blend(), StepKind(guided=True, blends=True, keeps_denoised=True)
    kinds, guidance = [kind] * len(table), np.full(len(table), SCALE)
    loop = new_loop()
    noise = np.stack([normal(*loop.noise.shape, seed=100 + step) for step in range(len(table))])
    expected = exact(table, kinds, guidance, blend=blend, noise=noise.astype(np.float64))
    loop.prepare([kind])
    loop.start(table, guidance, seeds=[0, 0], latents=normal(*loop.noise.shape, seed=1), **vars(blend))
    for step in range(len(table)):
        loop.set_noise(noise[step])
        loop.step(kind)
        assert_near([loop.latents(), loop.denoised()], [expected.latents[step], expected.denoised[step]])
    outside = np.broadcast_to(blend.mask == 0, blend.known.shape)
    assert np.array_equal(loop.latents()[outside], blend.known[outside])


def test_the_guess_of_the_clean_latents_is_kept_where_it_is_asked_for() -> None:
    table = make_table("euler", NoiseSchedule(), STEPS)
    keeps = StepKind(guided=True, keeps_denoised=True)
    kinds, guidance = [keeps if step % 3 == 0 else GUIDED for step in range(STEPS)], np.full(STEPS, SCALE)
    expected = exact(table, kinds, guidance)
    loop = new_loop()
    loop.prepare(kinds)
    loop.start(table, guidance, seeds=[0, 0], latents=normal(*loop.noise.shape, seed=1))
    for step, kind in enumerate(kinds):
        loop.step(kind)
        assert_near([loop.denoised()], [expected.denoised[step - step % 3]])
    # The result of Euler's last row is its guess.
    assert_near([draw(loop, table, [keeps] * STEPS, guidance)[-1]], [loop.denoised().astype(np.float64)])


@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_x_at_the_first_row_is_the_latents_times_the_scale(scale: float) -> None:
    table = make_table("euler", NoiseSchedule(), STEPS)
    loop, latents = new_loop(), normal(IMAGES, 4, *SIZE, seed=4)
    start(loop, table, GUIDED, latents=latents, scale=scale)
    assert np.array_equal(loop.latents(), latents * np.float32(scale))
    assert np.array_equal(
        loop.buffers.sample[:IMAGES], loop.latents() * np.float32(table.rows[0, Column.INPUT_SCALE])
    )


# --- what it costs


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_is_the_device_work_that_its_name_says(kind: StepKind) -> None:
    device = CountingDevice()
    loop = new_loop(device=device, size=EVEN_SIZE)
    table = make_table("ddim", NoiseSchedule(), STEPS, eta=1.0)
    kept = vars(new_blend(EVEN_SIZE)) if kind.blends else {}
    start(loop, table, kind, **kept)
    before = device.calls.copy()
    for _ in range(STEPS):
        loop.step(kind)
    wanted = {"guided_step": STEPS, "philox_normal": STEPS * kind.draws_noise}
    wanted["guidance_rescale"] = STEPS * kind.rescales
    assert device.calls - before == {name: calls for name, calls in wanted.items() if calls}


def test_kinds_prepared_once_come_and_go_without_an_allocation() -> None:
    device, unet = CountingDevice(), FakeUNet()
    loop = new_loop(unet, device=device)
    table = make_table("dpmpp_2m", NoiseSchedule(), STEPS)
    assert (device.calls["zeros"], unet.bindings) == (1, 1)
    first = draw(loop, table, interval(STEPS), np.full(STEPS, SCALE))
    assert (device.calls["zeros"], unet.bindings) == (2, 2)  # what half of the rows cannot be a view of
    draw(loop, table, [StepKind(guided=False, blends=True)] * STEPS, np.ones(STEPS), blend=new_blend())
    again = draw(loop, table, interval(STEPS), np.full(STEPS, SCALE))
    assert (device.calls["zeros"], unet.bindings) == (2, 2)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_conditional_half_is_a_view_where_it_may_be() -> None:
    """Only what ends off the alignment is copied: the texts when a run starts, the latents never."""
    device = CountingDevice()
    loop = new_loop(device=device, size=EVEN_SIZE)
    table = make_table("dpmpp_2m", NoiseSchedule(), STEPS)
    start(loop, table, PLAIN)
    before = device.calls.copy()
    loop.step(PLAIN)
    assert device.calls - before == {"guided_step": 1}


# --- inputs of the U-Net that are no texts


def more_inputs(family: str, rows: int) -> dict[str, NDArray[np.float32]]:
    shapes: dict[str, tuple[int, ...]] = {"timestep_cond": (7,), "inpainting": (5, *SIZE)}
    if family == "sdxl":
        shapes["time_ids"] = (6,)
    return {name: normal(rows, *shape, seed=30 + len(name)) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_inputs_of_other_checkpoints_reach_both_halves(family: str) -> None:
    """An inpainting U-Net, a latent consistency model's, SDXL's sizes: all at once, guided and not."""
    table = make_table("dpmpp_2m", NoiseSchedule(), STEPS)
    unet = FakeUNet(family, MORE_SIZES)
    given = more_inputs(family, 2 * IMAGES)
    loop = new_loop(unet)
    assert set(loop.conditioning) == {"encoder_hidden_states", *(["text_embeds"] if family == "sdxl" else [])}
    read = dict(given)
    if family == "sdxl":
        read["text_embeds"] = normal(2 * IMAGES, 3, seed=40)
        for row, embeds in zip(loop.conditioning["text_embeds"], read["text_embeds"], strict=True):
            row[...] = embeds
    kinds, guidance = interval(STEPS), np.full(STEPS, SCALE)
    loop.prepare(kinds)
    loop.start(table, guidance, seeds=[0, 0], latents=normal(*loop.noise.shape, seed=1), inputs=given)
    for kind in kinds:
        loop.step(kind)
    text = texts(guided=True).astype(np.float64)
    wide = {name: array.astype(np.float64) for name, array in read.items()}
    initial = normal(*loop.noise.shape, seed=1).astype(np.float64)
    expected = exact_run(
        table, lambda x, t: predict(np.concatenate([x, x]), t, text, **wide), kinds, guidance, initial
    )
    assert_near([loop.latents()], expected.latents[-1:])


def test_small_inputs_travel_with_the_other_numbers_of_a_run() -> None:
    table = make_table("ddim", NoiseSchedule(), 2)
    uploads = []
    for names in ((), ("timestep_cond",), ("timestep_cond", "inpainting")):
        widths = {"timestep_cond": "guidance_width", "inpainting": "inpainting_channels"}
        left_out = [widths[name] for name in widths if name not in names]
        device = CountingDevice()
        loop = new_loop(
            FakeUNet(sizes={k: v for k, v in MORE_SIZES.items() if k not in left_out}), device=device
        )
        given = {name: array for name, array in more_inputs("sd", 2 * IMAGES).items() if name in names}
        before = device.calls["upload"]
        start(loop, table, GUIDED, inputs=given)
        uploads.append(device.calls["upload"] - before)
    assert uploads == [2, 2, 3]  # the numbers, the latents; the picture to fill


def test_context_is_what_the_cross_attention_reads() -> None:
    loop = DenoiseLoop(HostDevice(), FakeUNet(), IMAGES, SIZE, guided=True, context=3 * TOKENS)
    assert loop.conditioning["encoder_hidden_states"][0].shape == (1, 3 * TOKENS, WIDTH)
    old = FakeUNet()  # of a bundle from before there was the axis: a number in its place, which counts
    states = ("encoder_hidden_states", "float32", ("rows", TOKENS, WIDTH))
    inputs = [TensorSpec(*states) if entry.name == states[0] else entry for entry in old.spec.inputs]
    old.spec = replace(old.spec, inputs=tuple(inputs))
    loop = DenoiseLoop(HostDevice(), old, IMAGES, SIZE, guided=True, context=3 * TOKENS)
    assert loop.conditioning["encoder_hidden_states"][0].shape == (1, TOKENS, WIDTH)


# --- mistakes


def test_what_the_unet_reads_must_be_given_and_no_more() -> None:
    table = make_table("ddim", NoiseSchedule(), 2)
    loop, given = new_loop(FakeUNet(sizes=MORE_SIZES)), more_inputs("sd", 2 * IMAGES)
    with pytest.raises(UsageError, match="the unet reads inpainting, which inputs do not hold"):
        start(loop, table, GUIDED, inputs={"timestep_cond": given["timestep_cond"]})
    with pytest.raises(
        UsageError, match="inputs hold time_ids, which the unet does not read: only timestep_c"
    ):
        start(loop, table, GUIDED, inputs={**given, "time_ids": given["timestep_cond"]})
    with pytest.raises(UsageError, match=r"inputs hold inpainting, .*: none of the kind"):
        start(new_loop(), table, GUIDED, inputs={"inpainting": given["inpainting"]})
    with pytest.raises(UsageError, match=r"timestep_cond has shape \[1, 7\]: \[4, 7\] is wanted"):
        start(loop, table, GUIDED, inputs={**given, "timestep_cond": given["timestep_cond"][:1]})
    start(loop, table, GUIDED, inputs=given)


def test_a_mask_without_what_it_keeps() -> None:
    table, loop, blend = make_table("ddim", NoiseSchedule(), 2), new_loop(), vars(new_blend())
    with pytest.raises(UsageError, match="of mask, known and known_noise only mask and known were given"):
        start(loop, table, GUIDED, mask=blend["mask"], known=blend["known"])
    with pytest.raises(UsageError, match=r"mask has shape \[2, 4, 3, 4\]: \[2, 1, 3, 4\] is wanted"):
        start(loop, table, GUIDED, **{**blend, "mask": blend["known"]})
    blends = StepKind(guided=True, blends=True)
    start(loop, table, blends, **blend)
    loop.step(blends)
    start(loop, table, blends)  # what was to be kept before must not be kept now
    with pytest.raises(UsageError, match="the run has no mask"):
        loop.step(blends)


def test_kinds_that_cannot_be() -> None:
    table = make_table("ddim", NoiseSchedule(), 2)
    with pytest.raises(UsageError, match="rescales without guidance"):
        StepKind(guided=False, rescales=True)
    with pytest.raises(UsageError, match="make it with guided=True"):
        new_loop(guided=False).prepare([GUIDED])
    loop = new_loop()
    start(loop, table, GUIDED)
    with pytest.raises(UsageError, match="was not prepared"):
        loop.step(PLAIN)
    with pytest.raises(UsageError, match=r"guidance has shape \[3\]: \[2\] is wanted"):
        loop.start(table, np.ones(3), seeds=[0, 0])
