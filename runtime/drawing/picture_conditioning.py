"""A picture's CLIP embedding, in place of a text's or beside it (Ramesh et al. 2022, sections 2 and 3.1)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.executor import Executor
from sdrt.runtime.bundle.families.components import NOISE_LEVEL, PIXEL_VALUES
from sdrt.runtime.bundle.families.stable_unclip import LABEL_MEAN, LABEL_STD
from sdrt.runtime.bundle.manifest import Manifest
from sdrt.runtime.devices.arena import Arena
from sdrt.runtime.devices.device import Device
from sdrt.runtime.drawing.faults import Faults
from sdrt.runtime.drawing.loop import DenoiseLoop
from sdrt.runtime.drawing.vae import Posterior
from sdrt.runtime.errors import NumericsError
from sdrt.runtime.request.picture import PictureTask
from sdrt.runtime.request.variations import ClipImage
from sdrt.runtime.samplers.table import SamplerTable


class ImageEncoder:
    """The image encoder, with the embedding of the picture that was encoded last."""

    def __init__(self, encoder: Executor, gives: Mapping[str, str], device: Device, *, batch: int) -> None:
        """Allocate the encoder's buffers and bind it to them.

        Args:
            encoder: On the device.
            gives: Input of the U-Net → its output, see `sdrt.runtime.bundle.families.record.Encoder`.
            device: Owns the buffers.
            batch: The smallest batch that the graph admits; every row of it holds the same picture.

        Raises:
            DeviceMemoryError: The buffers do not fit.
        """
        self._device, self._name, self._batch = device, encoder.spec.name, batch
        (source,), (result,) = encoder.spec.inputs, encoder.spec.outputs
        (self._target,) = gives
        axes = {"batch": batch}
        arena = Arena(device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in (source, result)})
        self._pixels, self._embeddings = arena[source.name], arena[result.name]
        self._row = arena.rows(result.name)[0]
        self._evaluate = encoder.bind({source.name: self._pixels}, {result.name: self._embeddings})
        self._latest: ClipImage | None = None

    def chunks(self, condition: Hashable) -> int:  # noqa: ARG002 - of the protocol
        """A picture is one."""
        return 1

    def lend_embeddings(self, embeddings: Mapping[str, Sequence[NDArray[np.float32]]]) -> None:
        """There are no words."""

    def forget(self) -> None:
        """Encode the picture anew: the encoder has other weights."""
        self._latest = None

    def write(self, rows: Sequence[Hashable], loop: DenoiseLoop, chunks: int) -> None:  # noqa: ARG002
        """Put embeddings into the rows of a loop's conditioning; zeros for None, as in training.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
        """
        for target, fault, condition in zip(
            loop.conditioning[self._target], loop.text_faults, rows, strict=True
        ):
            self._device.clear(fault)
            if condition is None:
                self._device.clear(target)
                continue
            assert isinstance(condition, ClipImage)
            self._encode(condition)
            self._device.copy(self._row, target)

    def raise_faults(self, faults: Faults, table: SamplerTable, rows: Sequence[Hashable]) -> None:
        """See `PromptEncoder.raise_faults` in `text_conditioning`; the encoder's were raised by `write`."""
        faults.raise_if_any(table, ["" for _ in rows], [self._name])

    def _encode(self, picture: ClipImage) -> None:
        if picture == self._latest:
            return
        self._latest = None
        self._device.upload(np.repeat(picture.pixels, self._batch, axis=0), self._pixels)
        self._evaluate()
        if not np.isfinite(self._device.download(self._embeddings)).all():
            raise NumericsError(f"the {self._name} gave NaN or infinity for the image")
        self._latest = picture


class LabelEncoder:
    """The image encoder of Stable unCLIP: a picture to what class_labels may be at some level of noise."""

    def __init__(self, encoder: Executor, device: Device, manifest: Manifest) -> None:
        """Allocate the encoder's buffers and bind it to them.

        Args:
            encoder: On the device.
            device: Owns the buffers.
            manifest: The bundle's.

        Raises:
            DeviceMemoryError: The buffers do not fit.
        """
        assert manifest.image_processor is not None  # by the manifest's rules
        self._device, self._name, self._processor = device, encoder.spec.name, manifest.image_processor
        self._batch = manifest.limits.min_batch
        spec, axes = encoder.spec, {"batch": self._batch}
        entries = (*spec.inputs, *spec.outputs)
        self._arena = Arena(device, {entry.name: (entry.concrete(axes), entry.dtype) for entry in entries})
        self._evaluate = encoder.bind(
            {entry.name: self._arena[entry.name] for entry in spec.inputs},
            {entry.name: self._arena[entry.name] for entry in spec.outputs},
        )

    def encode(self, picture: PictureTask) -> Posterior:
        """The labels of a picture, float32 [1, 2 · width]: the embedding and what tells its noise; waits.

        Raises:
            NumericsError: The encoder gave NaN or infinity.
        """
        from sdrt.runtime.pictures.canvas import clip_pixels

        assert picture.noise_level is not None  # of its family
        pixels = clip_pixels(picture.canvas.image, self._processor)
        # Every row of the smallest batch holds the same picture.
        self._device.upload(np.repeat(pixels, self._batch, axis=0), self._arena[PIXEL_VALUES])
        self._device.upload(np.full(self._batch, picture.noise_level, np.int64), self._arena[NOISE_LEVEL])
        self._evaluate()
        labels = Posterior(
            *(
                np.asarray(self._device.download(self._arena[name])[:1], np.float32)
                for name in (LABEL_MEAN, LABEL_STD)
            )
        )
        if not (np.isfinite(labels.mean).all() and np.isfinite(labels.std).all()):
            raise NumericsError(f"the {self._name} gave NaN or infinity for the image")
        return labels
