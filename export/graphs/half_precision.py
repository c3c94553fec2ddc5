"""What of an fp16 export cannot be fp16, and what is done about it.

A tensor over 65,504 becomes infinity in fp16, and the picture NaN. Before a graph is compared its tensors
are measured (`sdrt.export.graphs.range_audit`), and what is too large, or near to it, computes in fp32: as
islands inside of the graph (`sdrt.export.passes.fp32_islands`), which leave its inputs and outputs fp16; or,
of a VAE, as a component that is fp32 as a whole, as diffusers runs such a VAE. For the loop converts latents
and pixels from and to whatever the VAE takes and gives, while text encoders and the U-Net hand fp16 to each
other.

A calibration run does not see every picture. Where the checkpoint itself says that its VAE does not fit into
fp16 (``force_upcast`` of an SDXL checkpoint; diffusers' pipelines of Stable Diffusion 1.x and 2.x do not read
it), the VAE is fp32 whatever is measured.
"""

from __future__ import annotations

from typing import Final

from sdrt.export.checkpoint.checkpoint import Checkpoint
from sdrt.export.checkpoint.weights import HalfOverflowError
from sdrt.export.graphs.range_audit import RangeAudit, TensorRange
from sdrt.export.options import ExportOptions
from sdrt.runtime.bundle.families.record import ComponentSpec, Precision
from sdrt.runtime.errors import NumericsError

VAE: Final = frozenset({"vae_decoder", "vae_encoder"})
_UPCAST: Final = 'vae/config.json says "force_upcast": true (--vae-dtype fp16 overrules it)'


def planned_precision(checkpoint: Checkpoint, options: ExportOptions, component: str) -> Precision:
    """The precision that a component is to have before anything is measured."""
    if options.precision != "fp16" or component not in VAE:
        return options.precision
    return options.vae_precision or ("fp32" if is_upcast(checkpoint) else "fp16")


def is_upcast(checkpoint: Checkpoint) -> bool:
    """Whether diffusers' pipeline runs the checkpoint's VAE in fp32 when all else is fp16."""
    # AutoencoderKL's own default where the file does not say it.
    read = "force_upcast" in checkpoint.kind.vae_fields
    return read and bool(checkpoint.configs["vae"].get("force_upcast", True))


def why_planned(checkpoint: Checkpoint, options: ExportOptions, component: str) -> str:
    """Why a component is to have another precision than was asked for; empty if it has not."""
    planned = planned_precision(checkpoint, options, component)
    return "" if options.vae_precision or planned == options.precision else _UPCAST


def may_be_fp32(options: ExportOptions, component: str) -> bool:
    """Whether a component of an fp16 export may be fp32 as a whole."""
    return component in VAE and options.vae_precision is None


def islands(audit: RangeAudit, spec: ComponentSpec, *, whole: bool) -> tuple[str, ...]:
    """The tensors of a graph to keep in fp32.

    Args:
        audit: Of the fp16 graph.
        spec: Its component.
        whole: Whether the component may be fp32 as a whole; then tensors over the limit are no islands.

    Raises:
        HalfOverflowError: Islands are not the remedy: an output is over the limit, or anything is and the
            component may be fp32 as a whole.
    """
    ends = {entry.name for entry in (*spec.inputs, *spec.outputs)}
    beyond = [entry for entry in audit.over if whole or entry.tensor in ends]
    if beyond:
        worst = max(beyond, key=TensorRange.rank)
        # What only passes values on, as a choice of a text encoder's states does, is in no layer.
        makers = [entry for entry in audit.over if entry.layer and entry.rank() >= worst.rank()]
        origin = worst if worst.layer or not makers else makers[0]
        raise HalfOverflowError(f"the values of {origin.where}", worst.largest)
    return audit.islands


def refusal(component: str, error: HalfOverflowError) -> NumericsError:
    """The error of an export where neither islands nor fp32 for the component are left."""
    own = "--vae-dtype fp32, " if component in VAE else ""
    return NumericsError(
        f"{component} does not fit into fp16: {error}; export with {own}--dtype fp32 (with --fp16-weights it "
        "takes half the disk), or take weights that were made for fp16; nothing was written"
    )
