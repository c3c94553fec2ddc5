"""What a model family is, as data.

A family's record says which components it has, what each takes and gives, how texts or a picture become what
the U-Net reads, and what a request may ask. The exporter names graph inputs and outputs after it, the
manifest records them with the sizes of one checkpoint filled in, and the runtime allocates its buffers from
the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from sdrt.runtime.bundle.families.told import ToldOption

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "fp16", "bf16")

FLOAT: Final = "float"  # stands for the component's precision; resolved by `TensorSpec.resolve`

# Axes that stay symbolic in the graph. Every other name in a record is a size of the checkpoint.
# `context` is what the U-Net's cross-attention reads: the text encoder's tokens, once for each chunk of a
# prompt.
DYNAMIC_AXES: Final = frozenset(
    {"batch", "rows", "height", "width", "latent_height", "latent_width", "context"}
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: The graph's name of the tensor.
        dtype: ``int64``, ``float32``, ``float16``, ``bfloat16``, or ``FLOAT`` before `resolve`.
        shape: One entry per axis: a size, or the name of an axis.
        about: Units and meaning, for people.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    about: str = ""

    def resolve(self, sizes: Mapping[str, int], precision: Precision) -> TensorSpec:
        """Fill in the checkpoint's sizes and the precision; dynamic axes keep their names.

        Raises:
            KeyError: An axis is neither dynamic nor in ``sizes``.
        """
        shape = tuple(
            axis if isinstance(axis, int) or axis in DYNAMIC_AXES else sizes[axis] for axis in self.shape
        )
        return TensorSpec(self.name, self.resolved_dtype(precision), shape, self.about)

    def resolved_dtype(self, precision: Precision) -> str:
        """The dtype in a component of that precision."""
        names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        return names[precision] if self.dtype == FLOAT else self.dtype

    def concrete(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every named axis looked up in ``axes``."""
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in self.shape)


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """Inputs and outputs of one component, in the graph's order.

    Attributes:
        name: The component's.
        inputs: What it takes.
        outputs: What it gives.
        optional: Inputs that only the graphs of some kinds of checkpoints have. Each has at least one axis
            whose size only those checkpoints give.
        of_request: Inputs that are numbers of the request or of its picture, which no component makes.
        recurring: Groups of inputs whose values come again, from step to step or in every picture. What
            depends on one group alone may be kept and need not be computed anew.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: frozenset[str] = frozenset()
    of_request: tuple[str, ...] = ()
    recurring: tuple[tuple[str, ...], ...] = ()

    def resolve(self, sizes: Mapping[str, int], precision: Precision) -> ComponentSpec:
        """The same component with one checkpoint's sizes and precision filled in.

        Of the optional inputs those stay whose sizes the checkpoint has.
        """
        return self.with_tensors(
            tuple(spec.resolve(sizes, precision) for spec in self.inputs if self._has(spec, sizes)),
            tuple(spec.resolve(sizes, precision) for spec in self.outputs),
        )

    def with_tensors(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ComponentSpec:
        """The component of one bundle: with just these tensors, none of them optional."""
        return replace(self, inputs=inputs, outputs=outputs, optional=frozenset())

    def _has(self, spec: TensorSpec, sizes: Mapping[str, int]) -> bool:
        named = {axis for axis in spec.shape if isinstance(axis, str)} - DYNAMIC_AXES
        return spec.name not in self.optional or named <= set(sizes)

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, if there is one."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output of that name, if there is one."""
        return next((spec for spec in self.outputs if spec.name == name), None)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A component that reads a text or a picture, and what the U-Net reads of what it gives.

    Attributes:
        component: Its name.
        gives: Input of the U-Net → the encoder's output. What several encoders give for one input stands side
            by side along the last axis, in the order of the encoders.
        tokenizer: Its tokenizer's name: of the bundle's file (with ``.json``), and
            of the checkpoint's folder. Empty for an encoder of pictures.
        embedding: What files of textual inversion for several encoders call the vectors of this one.
    """

    component: str
    gives: Mapping[str, str]
    tokenizer: str = ""
    embedding: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        name: As the manifest has it.
        title: As people call it.
        components: By name, in the order in which they are exported.
        encoders: What texts or a picture become, in the order in which they stand side by side. Either all
            have a tokenizer, or a single one reads a picture.
        told: Input of the U-Net, float [rows, n] → the options whose n numbers it is told.
        without: Options of a request that it has no use for, so that a request with one is refused.
        spare: Components that only some drawings need.
        zeros_for_no_text: Whether its checkpoints say if a negative prompt that was not given is zeros in
            place of the empty text's embeddings.
        strength: The share of the schedule that is run on a given picture where a request does not say it.
        refines: Families whose latents it draws on with, as the second of an ensemble of denoisers; each does
            those of its own.
        guided_rows: Rows of the U-Net's batch that a guided picture takes, the one of nothing first and that
            of all that is wanted last: 2, or 3 where a given picture guides beside the text.
        picture_input: Input of the U-Net that the given picture becomes. A request must have one, and what is
            drawn starts from noise. Empty where a picture, if any, is what is started from.
        picture_blank: Whether the row of nothing has zeros in place of the picture.
        picture_alone: Whether a picture without a prompt says what to draw.
        noise_level: How much noise is laid over the picture where a request does not say it; None where it is
            read as it is.
        own: Options of a request that only such families have.
    """

    name: str
    title: str
    components: Mapping[str, ComponentSpec]
    encoders: tuple[Encoder, ...]
    told: Mapping[str, tuple[ToldOption, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    spare: frozenset[str] = frozenset({"vae_encoder"})
    zeros_for_no_text: bool = False
    strength: float = 0.8
    refines: tuple[str, ...] = ()
    guided_rows: int = 2
    picture_input: str = ""
    picture_blank: bool = True
    picture_alone: bool = False
    noise_level: int | None = None
    own: tuple[str, ...] = ()

    @property
    def reads_text(self) -> bool:
        """Whether it draws from prompts, not from a picture alone."""
        return bool(self.tokenizers)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The names of the tokenizers, one for each text encoder; none in a family without text."""
        return tuple(encoder.tokenizer for encoder in self.encoders if encoder.tokenizer)

    @property
    def required(self) -> tuple[str, ...]:
        """The components without which nothing can be drawn."""
        return tuple(name for name in self.components if name not in self.spare)

    @property
    def told_options(self) -> tuple[ToldOption, ...]:
        """Every option of `told`, in the order in which the U-Net is told them."""
        return tuple(option for options in self.told.values() for option in options)

    def sources(self, name: str) -> tuple[tuple[int, str], ...]:
        """What gives an input of the U-Net: numbers of encoders, and their outputs."""
        encoders = enumerate(self.encoders)
        return tuple((index, encoder.gives[name]) for index, encoder in encoders if name in encoder.gives)
