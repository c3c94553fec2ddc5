"""Each kind of change against its formula, as LyCORIS and PEFT have it, in PyTorch and float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.references.lora_files import write

from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.bundle.weight_map import CheckpointTensor, WeightMap
from sdrt.runtime.errors import UsageError
from sdrt.runtime.lora.file import read_lora
from sdrt.runtime.lora.merge import changes_by_tensor, merged_tensor
from sdrt.runtime.lora.names import TensorKey
from tolerances import LORA_FORMULA

Tensor = torch.Tensor
LINEAR, CONVOLUTION, POINT, NORM = "mid.to_q", "mid.conv", "mid.proj_in", "mid.norm"
SHAPES = {LINEAR: (12, 8), CONVOLUTION: (12, 8, 3, 3), POINT: (12, 8, 1, 1), NORM: (12,)}
WEIGHTS = WeightMap(
    {
        "unet": {
            **{f"{name}.weight": CheckpointTensor("float32", shape) for name, shape in SHAPES.items()},
            **{f"{name}.bias": CheckpointTensor("float32", shape[:1]) for name, shape in SHAPES.items()},
        }
    }
)
RANK, ALPHA = 4, 3.0
WEIGHT = 0.7


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(shape) % 1000))


def file_of(folder: Path, layer: str, parts: Mapping[str, Any], prefix: str = "lora_unet_") -> Path:
    name = layer.replace(".", "_") if prefix.startswith("lora_") else layer
    tensors = {f"{prefix}{name}.{part}": np.asarray(value) for part, value in parts.items()}
    return write(folder / "lora.safetensors", tensors)


def check(
    folder: Path, layer: str, file: Path, wanted: Tensor, tensor: str = "weight", weight: float = WEIGHT
) -> None:
    """What a file makes of a tensor of the layer is ``wanted``, in float64, but for rounding."""
    lora = read_lora(file, WEIGHTS, FAMILIES["sd"])
    ((key, changes),) = changes_by_tensor([(lora, weight)]).items()
    assert key == ("unet", f"{layer}.{tensor}")
    base = base_of(layer, tensor)
    for order in ("C", "F"):  # as a graph may have it
        found = merged_tensor(np.array(base, order=order), changes)
        assert found.dtype == np.float32
        error = np.abs(found - wanted.numpy()).max() / np.abs(wanted.numpy()).max()
        assert error < LORA_FORMULA


def base_of(layer: str, tensor: str = "weight") -> NDArray[np.float32]:
    shape = SHAPES[layer] if tensor == "weight" else SHAPES[layer][:1]
    return numbers(*shape, 1)[..., 0].numpy()


def wide(layer: str, tensor: str = "weight") -> Tensor:
    return torch.from_numpy(base_of(layer, tensor)).double()


@pytest.mark.parametrize("layer", [LINEAR, POINT])
def test_loha(tmp_path: Path, layer: str) -> None:
    a, b, c, d = numbers(12, RANK), numbers(RANK, 8), numbers(12, RANK) + 1, numbers(RANK, 8) + 1
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": ALPHA}
    delta = (a.double() @ b.double()) * (c.double() @ d.double()) * ALPHA / RANK
    check(
        tmp_path, layer, file_of(tmp_path, layer, parts), wide(layer) + WEIGHT * delta.reshape(SHAPES[layer])
    )


def test_loha_of_a_convolution(tmp_path: Path) -> None:
    a, b = numbers(12, RANK), numbers(RANK, 72)
    parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b + 1, "alpha": ALPHA}
    delta = (a.double() @ b.double()) * (a.double() @ (b.double() + 1)) * ALPHA / RANK
    wanted = wide(CONVOLUTION) + WEIGHT * delta.reshape(12, 8, 3, 3)
    check(tmp_path, CONVOLUTION, file_of(tmp_path, CONVOLUTION, parts), wanted)


def test_loha_with_a_kernel(tmp_path: Path) -> None:
    kernel, a, b = numbers(RANK, RANK, 3, 3), numbers(RANK, 12), numbers(RANK, 8)
    parts = {
        **{"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b + 1, "alpha": ALPHA},
        **{"hada_t1": kernel, "hada_t2": kernel + 1},
    }

    def rebuilt(kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ijkl,jr,ip->prkl", kernel.double(), b.double(), a.double())

    delta = rebuilt(kernel, a, b) * rebuilt(kernel + 1, a + 1, b + 1) * ALPHA / RANK
    check(tmp_path, CONVOLUTION, file_of(tmp_path, CONVOLUTION, parts), wide(CONVOLUTION) + WEIGHT * delta)


def test_locon_with_a_factor_in_the_middle(tmp_path: Path) -> None:
    up, middle, down = numbers(12, RANK, 1, 1), numbers(RANK, RANK, 3, 3), numbers(RANK, 8, 1, 1)
    parts = {"lora_up.weight": up, "lora_mid.weight": middle, "lora_down.weight": down, "alpha": ALPHA}
    # As the three convolutions one after the other: what they make of a picture of one lit pixel.
    pixels = torch.zeros(8, 8, 5, 5, dtype=torch.float64)
    pixels[range(8), range(8), 2, 2] = 1
    seen = torch.nn.functional.conv2d(pixels, down.double())
    seen = torch.nn.functional.conv2d(torch.nn.functional.conv2d(seen, middle.double()), up.double())
    delta = seen.flip(2, 3).permute(1, 0, 2, 3) * ALPHA / RANK
    check(tmp_path, CONVOLUTION, file_of(tmp_path, CONVOLUTION, parts), wide(CONVOLUTION) + WEIGHT * delta)


@pytest.mark.parametrize("left", ["whole", "factors"])
@pytest.mark.parametrize("right", ["whole", "factors"])
def test_lokr(tmp_path: Path, left: str, right: str) -> None:
    parts: dict[str, Any] = {"alpha": ALPHA}
    a, b = numbers(3, RANK), numbers(RANK, 2)
    c, d = numbers(4, RANK), numbers(RANK, 4)
    first, second = a.double() @ b.double(), c.double() @ d.double()
    parts |= {"lokr_w1": first.float()} if left == "whole" else {"lokr_w1_a": a, "lokr_w1_b": b}
    parts |= {"lokr_w2": second.float()} if right == "whole" else {"lokr_w2_a": c, "lokr_w2_b": d}
    scale = 1.0 if left == right == "whole" else ALPHA / RANK
    delta = torch.kron(first, second) * scale
    check(tmp_path, LINEAR, file_of(tmp_path, LINEAR, parts), wide(LINEAR) + WEIGHT * delta)


@pytest.mark.parametrize("kernel", [False, True])
def test_lokr_of_a_convolution(tmp_path: Path, kernel: bool) -> None:
    first = numbers(3, 2)
    if kernel:
        core, c, d = numbers(RANK, RANK, 3, 3), numbers(RANK, 4), numbers(RANK, 4)
        second = torch.einsum("ijkl,ip,jr->prkl", core.double(), c.double(), d.double()).contiguous()
        more = {"lokr_t2": core}
    else:
        c, d, more = numbers(4, RANK), numbers(RANK, 36), {}
        second = (c.double() @ d.double()).reshape(4, 4, 3, 3)
    parts = {"lokr_w1": first, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": ALPHA, **more}
    delta = torch.kron(first.double()[..., None, None], second) * ALPHA / RANK
    check(tmp_path, CONVOLUTION, file_of(tmp_path, CONVOLUTION, parts), wide(CONVOLUTION) + WEIGHT * delta)


def decomposed(base: Tensor, delta: Tensor, lengths: Tensor, axis: int) -> Tensor:
    changed = base + delta
    others = [index for index in range(base.ndim) if index != axis]
    given = changed.pow(2).sum(others, keepdim=True).sqrt()
    return changed / given * lengths.double().reshape(given.shape)


@pytest.mark.parametrize("layer", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_as_lycoris_writes_it(tmp_path: Path, layer: str, axis: int) -> None:
    shape = SHAPES[layer]
    ones = (1,) * (len(shape) - 2)
    up, down = numbers(12, RANK, *ones), numbers(RANK, *shape[1:])
    lengths = numbers(shape[axis]).abs().reshape((-1, 1, *ones) if axis == 0 else (1, -1, *ones))
    parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths, "alpha": ALPHA}
    delta = (up.double().reshape(12, RANK) @ down.double().reshape(RANK, -1)).reshape(shape) * ALPHA / RANK
    whole = decomposed(wide(layer), delta, lengths, axis)
    file = file_of(tmp_path, layer, parts)
    check(tmp_path, layer, file, whole, weight=1.0)
    check(tmp_path, layer, file, wide(layer) + WEIGHT * (whole - wide(layer)))


def network_of_linear() -> torch.nn.ModuleDict:
    """A network that has the layer `LINEAR`."""
    linear = torch.nn.Linear(8, 12)
    linear.weight.data = torch.from_numpy(base_of(LINEAR))
    linear.bias.data = torch.from_numpy(base_of(LINEAR, "bias"))
    return torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": linear})})


def test_dora_is_as_peft_merges_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    network = network_of_linear()
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["to_q"], use_dora=True, use_rslora=True)
    model = get_peft_model(network, config)
    layer: Any = model.base_model.model.mid.to_q
    layer.lora_B["default"].weight.data = numbers(12, RANK)
    layer.lora_magnitude_vector["default"].weight.data = numbers(12).abs()
    model.save_pretrained(tmp_path)  # with adapter_config.json, which says alpha and the root of the rank
    layer.merge()
    wanted = layer.base_layer.weight.detach().double()
    check(tmp_path, LINEAR, tmp_path / "adapter_model.safetensors", wanted, weight=1.0)


@pytest.mark.parametrize("rank", [1, 64])  # the second makes PEFT keep both factors whole
def test_lokr_is_as_peft_merges_it(tmp_path: Path, rank: int) -> None:
    from peft import LoKrConfig, get_peft_model

    model = get_peft_model(network_of_linear(), LoKrConfig(r=rank, alpha=8, target_modules=["to_q"]))
    layer: Any = model.base_model.model.mid.to_q
    for name, parameter in layer.named_parameters():
        if name.startswith("lokr_"):
            parameter.data = numbers(*parameter.shape)
    assert bool(layer.lokr_w2) == (rank == 64)
    model.save_pretrained(tmp_path)
    layer.merge()
    wanted = layer.base_layer.weight.detach().double()
    check(tmp_path, LINEAR, tmp_path / "adapter_model.safetensors", wanted, weight=1.0)


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_is_as_peft_merges_it(tmp_path: Path, on_input: bool) -> None:
    from peft import IA3Config, get_peft_model

    layers: dict[str, torch.nn.Module] = {"to_q": torch.nn.Linear(8, 12), "conv": torch.nn.Conv2d(8, 12, 3)}
    for own, name in zip(layers.values(), (LINEAR, CONVOLUTION), strict=True):
        own.load_state_dict({part: torch.from_numpy(base_of(name, part)) for part in ("weight", "bias")})
    network = torch.nn.ModuleDict({"mid": torch.nn.ModuleDict(layers)})
    names = ["to_q", "conv"]
    config = IA3Config(target_modules=names, feedforward_modules=names if on_input else [])
    model = get_peft_model(network, config)
    inside: Any = model.base_model.model.mid
    for layer in (inside.to_q, inside.conv):
        layer.ia3_l["default"].data = numbers(*layer.ia3_l["default"].shape)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", WEIGHTS, FAMILIES["sd"])
    changed = changes_by_tensor([(lora, 1.0)])
    for name, layer in ((LINEAR, inside.to_q), (CONVOLUTION, inside.conv)):
        layer.merge()
        for tensor in ("weight", "bias"):
            changes = changed.get(TensorKey("unet", f"{name}.{tensor}"))
            base = base_of(name, tensor)
            found = merged_tensor(base, changes) if changes else base
            wanted = getattr(layer.base_layer, tensor).detach().numpy()
            assert np.abs(found - wanted).max() / np.abs(wanted).max() < LORA_FORMULA


def test_ia3_of_a_square_convolution_does_not_say_of_which_side(tmp_path: Path) -> None:
    square = WeightMap({"unet": {"mid.conv.weight": CheckpointTensor("float32", (8, 8, 3, 3))}})
    file = file_of(tmp_path, CONVOLUTION, {"ia3_l": numbers(1, 8, 1, 1)}, "base_model.model.")
    with pytest.raises(UsageError, match="inputs or outputs, which are as many"):
        read_lora(file, square, FAMILIES["sd"])


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(tmp_path: Path, on_input: bool) -> None:
    shares = numbers(8 if on_input else 12)
    column = shares.double() if on_input else shares.double()[:, None]
    parts = {"weight": shares, "on_input": np.array(on_input)}
    wanted = wide(LINEAR) * (1 + WEIGHT * column)
    check(tmp_path, LINEAR, file_of(tmp_path, LINEAR, parts), wanted)


@pytest.mark.parametrize(
    ("layer", "part", "tensor"),
    [
        (CONVOLUTION, "diff", "weight"),
        (LINEAR, "diff_b", "bias"),
        (NORM, "w_norm", "weight"),
        (NORM, "b_norm", "bias"),
    ],
)
def test_differences(tmp_path: Path, layer: str, part: str, tensor: str) -> None:
    delta = numbers(*base_of(layer, tensor).shape)
    wanted = wide(layer, tensor) + WEIGHT * delta.double()
    check(tmp_path, layer, file_of(tmp_path, layer, {part: delta}), wanted, tensor)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F64", torch.float64),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_every_kind_of_storage_is_widened_exactly(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    # All numbers of eight bits but NaN and infinity; the others are made of more bits than they hold.
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn if dtype.itemsize > 1 else dtype)
    finite = bits.float()[torch.isfinite(bits.float())]
    stored = (finite if dtype.itemsize == 1 else finite * 1.234567)[:96].reshape(12, 8).to(dtype)
    save_file({f"lora_unet_{LINEAR.replace('.', '_')}.diff": stored}, tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors", WEIGHTS, FAMILIES["sd"])
    (change,) = lora.changes.values()
    found = change.added(np.zeros((12, 8), np.float32), 1.0)
    assert np.array_equal(found, stored.float().numpy())
