"""Draw inside a PyCUDA program: its stream, its array for the initial latents, its array of the pictures.

    pip install 'sdrt[rtx]' pycuda
    python examples/pycuda_interop.py BUNDLE "a red apple" apple.png

A PyCUDA kernel softens the initial latents, the pipeline draws from them, and another PyCUDA kernel inverts
the pictures. All of it is queued in one stream, so nothing has to wait in between, and nothing passes through
main memory before the pictures are saved.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from PIL import Image

import sdrt.runtime


def gpuarray_from(array: Any) -> Any:
    """A device array of sdrt's as a PyCUDA ``GPUArray`` of the same memory, which it keeps alive."""
    from pycuda import gpuarray

    interface = array.__cuda_array_interface__
    address, _read_only = interface["data"]
    return gpuarray.GPUArray(interface["shape"], np.dtype(interface["typestr"]), gpudata=address, base=array)


def draw(bundle: str, prompt: str, *, backend: str = "auto", seed: int = 0) -> Any:
    """One picture as a ``GPUArray``, uint8 [1, H, W, 3], in the colours of a negative.

    Args:
        bundle: Folder of the bundle.
        prompt: What to draw.
        backend: One that draws on the GPU.
        seed: Of the initial latents.
    """
    # The context that TensorRT and the CUDA runtime use too. pycuda.autoinit would make another one.
    import pycuda.autoprimaryctx
    import pycuda.driver
    from pycuda import gpuarray
    from pycuda.elementwise import ElementwiseKernel

    soften = ElementwiseKernel("float *x, float share", "x[i] *= share", "soften")
    invert = ElementwiseKernel("unsigned char *x", "x[i] = 255 - x[i]", "invert")

    stream = pycuda.driver.Stream()  # a default stream could not be captured into a graph
    with sdrt.runtime.Pipeline.load(bundle, backend=backend, stream=stream) as pipeline:
        latents = gpuarray.to_gpu_async(pipeline.initial_latents(seed), stream=stream)
        soften(latents, np.float32(0.95), stream=stream)
        output = pipeline(prompt, latents=latents, output_type="device")
        pictures = gpuarray_from(output.images)
        invert(pictures, stream=stream)
        stream.synchronize()
    return pictures  # may outlive the pipeline


def main() -> int:
    """Draw and save."""
    if len(sys.argv) != 4:
        sys.stderr.write(f"usage: {sys.argv[0]} BUNDLE PROMPT PICTURE.png\n")
        return 2
    bundle, prompt, target = sys.argv[1:]
    Image.fromarray(draw(bundle, prompt).get()[0]).save(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
