"""The runtime draws where torch, diffusers, transformers and onnx are not installed, and imports little."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import sdrt.runtime
from sdrt.runtime.bundle.verified_files import SETTLED_SECONDS

FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "sdrt.export")

DRAW = """
    import sdrt.runtime
    from sdrt.runtime import Pipeline
    pipeline = Pipeline.load(sys.argv[1])
    output = pipeline("a red apple, 🍎", negative_prompt="x", seed=1, num_inference_steps=2)
    sdrt.runtime.save_png(output.images[0], Path(sys.argv[2]), output.recipes[0])
"""


def run(code: str, *arguments: object) -> str:
    """Run lines in a process of their own and give what they print."""
    prelude = "import json, sys\nfrom pathlib import Path\n"
    result = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def modules(code: str, *arguments: object) -> set[str]:
    """Every module that those lines load."""
    return set(json.loads(run(textwrap.dedent(code) + "\nprint(json.dumps(list(sys.modules)))", *arguments)))


def test_drawing_loads_nothing_of_the_export(tiny_bundle: Path, tmp_path: Path) -> None:
    loaded = modules(DRAW, tiny_bundle, tmp_path / "a.png")
    assert "onnxruntime" in loaded
    for name in FORBIDDEN:
        assert not {module for module in loaded if module == name or module.startswith(f"{name}.")}
    assert (tmp_path / "a.png").stat().st_size > 0


def test_drawing_works_where_nothing_of_the_export_is_installed(tiny_bundle: Path, tmp_path: Path) -> None:
    block = f"""
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name in {FORBIDDEN!r} or name.split(".")[0] in {FORBIDDEN!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Missing())
    try:
        import torch
    except ImportError:
        print("no torch")
    """
    printed = run(textwrap.dedent(block) + textwrap.dedent(DRAW), tiny_bundle, tmp_path / "a.png")
    assert printed == "no torch\n"
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("statement", ["import sdrt", "import sdrt.runtime", "import sdrt.runtime.cli.main"])
def test_names_alone_load_not_even_numpy(statement: str) -> None:
    slow = {"numpy", "PIL", "tokenizers", "onnxruntime", "rich", "dataclasses", "inspect"}
    assert not modules(statement) & slow


# What pixels from a plain prompt do without, once the bundle was drawn before: image library, progress bar
# and repair of text are 20 to 100 ms each, the others 1 to 8.
NOT_FOR_A_PICTURE = {
    *("PIL", "rich", "ftfy", "hashlib", "secrets", "random", "difflib", "shutil", "subprocess", "fractions"),
    *(f"sdrt.runtime.pictures.{name}" for name in ("animation", "canvas", "preview", "reading")),
    *(f"sdrt.runtime.bundle.{name}" for name in ("engine_search", "engines")),
    *("sdrt.runtime.cli.interactive", "sdrt.runtime.drawing.picture_conditioning"),
    *("sdrt.runtime.request.interpolation", "sdrt.runtime.text.textual_inversion"),
    *("sdrt.kernels.compile", "sdrt.kernels.host_build"),
}


@pytest.mark.parametrize("name", sorted(NOT_FOR_A_PICTURE))
def test_what_is_not_loaded_exists(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def wait_until_settled(folder: Path) -> None:
    """Files that were changed a moment ago, as a copy is, are hashed at every load."""
    newest = max(file.stat().st_ctime for file in folder.rglob("*"))
    time.sleep(max(0.0, newest + SETTLED_SECONDS + 0.1 - time.time()))


def test_a_plain_picture_loads_little(tiny_bundle: Path, tmp_path: Path) -> None:
    """As pixels from the pipeline; and `sd-run` loads Pillow besides, which writes the PNG."""
    python = """
    from sdrt.runtime import Pipeline
    Pipeline.load(sys.argv[1])("x", num_inference_steps=1, output_type="numpy")
    """
    command = """
    from sdrt.runtime.cli.main import main
    assert main(["x", "--bundle", sys.argv[1], "--steps", "1", "--quiet", "--output", sys.argv[2]]) == 0
    """
    for changed in (tiny_bundle, Path(os.environ["SDRT_CACHE"])):  # the first run prepares graphs there
        wait_until_settled(changed)
        run(python, tiny_bundle)
    assert not modules(python, tiny_bundle) & NOT_FOR_A_PICTURE
    ours = {name for name in NOT_FOR_A_PICTURE if name.startswith("sdrt.")} | {"rich", "ftfy"}
    assert not modules(command, tiny_bundle, tmp_path / "a.png") & ours
    assert (tmp_path / "a.png").stat().st_size > 0


def test_public_names() -> None:
    for name in sdrt.runtime.__all__:
        assert getattr(sdrt.runtime, name).__name__ == name
    assert dir(sdrt.runtime) == sdrt.runtime.__all__
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sdrt.runtime.nonsense  # noqa: B018
