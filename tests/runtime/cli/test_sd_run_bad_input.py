"""``sd-run`` with bad input: the documented exit status, one line that helps, and no file left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.manifests import edit_manifest
from support.runs.command_here import run_here
from support.runs.folders import listing
from support.runs.sd_run_terminal import SD_RUN

from sdrt.runtime import errors
from sdrt.runtime.bundle.families.registry import FAMILIES
from sdrt.runtime.cli.main import main
from sdrt.runtime.cli.options import EPILOG
from sdrt.runtime.samplers.registry import SAMPLERS

USAGE, BUNDLE, NUMERICS, BACKEND, OUTPUT = 2, 3, 6, 7, 8
Refuse = Callable[..., str]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an older picture in it that must survive."""
    folder = tmp_path / "work"
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("a file")
    (folder / "old.png").write_text("old")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(work: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the command, checks all that every refusal has in common, and gives the line."""

    def refuse(status: int, *arguments: str, bundle: Path | str = tiny_bundle) -> str:
        before = listing(work)
        given = ["--bundle", str(bundle), "--steps", "2", "--backend", "onnxruntime-cpu", *arguments]
        result, out, line = run_here(main, ["a red apple", *given], capsys)
        assert (result, out) == (status, ""), line
        assert line.startswith("sd-run: ")
        assert line.count("\n") == 1
        assert line.endswith("\n")
        assert len(line) < 800  # a name of 300 characters may be in it twice
        assert listing(work) == before
        return line.removeprefix("sd-run: ").rstrip("\n")

    return refuse


def test_statuses_are_those_of_the_documentation() -> None:
    statuses = {
        errors.SdrtError: 1,
        errors.UsageError: USAGE,
        errors.BundleError: BUNDLE,
        errors.CheckpointError: 4,
        errors.ParityError: 5,
        errors.NumericsError: NUMERICS,
        errors.BackendError: BACKEND,
        errors.OutputError: OUTPUT,
    }
    for error, status in statuses.items():
        assert error.exit_status == status
        assert f"{error.__name__} " in (errors.__doc__ or "")
    for status in (USAGE, BUNDLE, NUMERICS, BACKEND, OUTPUT, errors.EXIT_INTERRUPTED):
        assert f"{status} " in EPILOG


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "many"], "argument --steps/--num-inference-steps: invalid int value: 'many'"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--guidance-scale", "strong"], "invalid number or list of numbers value: 'strong'"),
        (["--eta"], "expected one argument"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--no-such\noption"], "unrecognized arguments: --no-such option"),
        (["--interactive"], "--interactive takes its prompts from standard input: leave PROMPT out"),
        (["--warm-up"], "--warm-up goes with --interactive"),
        (["--guid=3"], "unrecognized arguments: --guid=3 (did you mean --guidance-scale?)"),
        (["--no_lower_order_finale"], "(did you mean --no-lower-order-final?)"),
        (["--model", "sd15"], "(did you mean --bundle, a folder that sd-export made?)"),
        (["--steps", "0"], "num_inference_steps is 0: allowed are whole numbers from 1 to 1000"),
        (["--steps", "-3"], "num_inference_steps is -3: allowed are whole numbers from 1 to 1000"),
        (["--steps", "1000000"], "num_inference_steps is 1000000: allowed are whole numbers from 1 to 1000"),
        (["--guidance-scale", "nan"], "guidance_scale is nan: a finite number is wanted"),
        (["--guidance-scale", "inf"], "guidance_scale is inf: a finite number is wanted"),
        (["--guidance-scale", "-1"], "guidance_scale is -1.0: allowed are numbers from 0 to 1000"),
        (["--height", "18"], "height is 18: this bundle draws multiples of 4 from 16 to 32 pixels"),
        (["--width", "17"], "width is 17: this bundle draws multiples of 4 from 16 to 32 pixels"),
        (["--width", "512"], "width is 512: this bundle draws multiples of 4 from 16 to 32 pixels"),
        (["--height", "0"], "height is 0"),
        (["--height", "-16"], "height is -16"),
        (["--sampler", "eular"], "unknown sampler 'eular': did you mean euler?"),
        (["--sampler", "DPM++ 2N"], "did you mean dpmpp_2m? allowed are ddim, "),
        (["--sampler", "DDIM Karras"], "the sampler ddim has no sigma_schedule: use it with "),
        (["--sampler", "Euler Karras", "--sigma-schedule", "beta"], "they contradict each other"),
        (["--sampler", ""], "allowed are ddim, "),
        (["--sampler", "ddim", "--karras"], "the sampler ddim has no karras: use it with "),
        (["--sampler", "euler", "--eta", "0.5"], "the sampler euler has no eta: use it with ddim"),
        (["--sampler", "ddim", "--eta", "2"], "eta is 2.0: allowed are numbers from 0 to 1"),
        (["--sampler", "ddim", "--eta", "nan"], "eta is nan"),
        (["--seed", "-2"], "seed is -2; it must be at least 0 and below 2**64"),
        (["--seed", str(2**64)], "below 2**64"),
        (["--rng", "gpu"], "rng is 'gpu'; choose one of philox, cpu"),
        (["--num-images", "0"], "num_images_per_prompt is 0: a whole number of at least 1"),
        (["--num-images", "-1"], "at least 1"),
        (["--num-images", "1000000"], "1000000 images in one call: at most 1000"),
        (["--backend", "cuda"], "unknown backend 'cuda'; there is auto, "),
        (["--device", "0"], "device is 0, the number of a GPU: the backend onnxruntime-cpu runs on the CPU"),
        (["--device", "-1"], "device is -1: allowed are whole numbers from 0 to"),
        (["--threads", "0"], "threads is 0: allowed are whole numbers from 1 to"),
        (["--threads", "1000000"], "threads is 1000000"),
        (["--output", "picture.gif"], "ends in .png, .jpg, .jpeg or .webp, or a folder"),
        (["--output", "-", "--num-images", "2"], "--output is -"),
        (["--output", "-", "--json"], "--json does not go with --output -"),
        (["--negative-prompt", "a\udcff"], "not Unicode text"),
    ],
    ids=lambda value: (
        " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else None
    ),
)
def test_usage(refuse: Refuse, arguments: list[str], words: str) -> None:
    assert words in refuse(USAGE, *arguments)


def test_no_prompt(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == USAGE
    expected = "sd-run: the following arguments are required: PROMPT (see sd-run --help)\n"
    assert capsys.readouterr().err == expected


# --- the bundle


def missing(bundle: Path) -> None:
    (bundle / "unet" / "model.onnx.data").unlink()


def truncated(bundle: Path) -> None:
    os.truncate(bundle / "unet" / "model.onnx.data", 1000)


def altered(bundle: Path) -> None:
    file = bundle / "unet" / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)


def newer(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(format_version=99))


def outside(bundle: Path) -> None:
    (bundle.parent / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes())
    edit_manifest(bundle, lambda document: document["tokenizers"][0]["file"].update(path="../tokenizer.json"))


def absolute(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document["tokenizers"][0]["file"].update(path="/etc/passwd"))


def linked_outside(bundle: Path) -> None:
    (bundle / "tokenizer.json").rename(bundle.parent / "elsewhere.json")
    (bundle / "tokenizer.json").symlink_to(bundle.parent / "elsewhere.json")


def half_a_manifest(bundle: Path) -> None:
    file = bundle / "manifest.json"
    os.truncate(file, file.stat().st_size // 2)


def without_unet(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document["components"].pop("unet"))


def unlisted(bundle: Path) -> None:
    """The weights of a graph, no longer named: nothing would compare them with anything."""
    files = ("components", "unet", "files")

    def drop(document: dict[str, Any]) -> None:
        entries = document[files[0]][files[1]][files[2]]
        entries[:] = [entry for entry in entries if not entry["path"].endswith(".data")]

    edit_manifest(bundle, drop)


def of_another_family(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(family="flux"))


def with_another_graph(bundle: Path) -> None:
    """The decoder's graph in the U-Net's place, hashes and all."""

    def exchange(document: dict[str, Any]) -> None:
        document["components"]["unet"]["files"] = document["components"]["vae_decoder"]["files"]
        document["components"]["unet"]["model"] = document["components"]["vae_decoder"]["model"]

    edit_manifest(bundle, exchange)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unlisted, "unet/model.onnx.data is not in the manifest"),
        (
            of_another_family,
            f"family 'flux', this sdrt draws {', '.join(FAMILIES)}: upgrade sdrt",
        ),
        (with_another_graph, "is not the graph that the manifest describes: sample should be float32"),
        (missing, "unet/model.onnx.data is missing"),
        (truncated, "unet/model.onnx.data has 1000 bytes, the manifest says"),
        (altered, "unet/model.onnx.data does not have the SHA-256"),
        (newer, "format version 99, this sdrt reads version 4 alone"),
        (outside, "'../tokenizer.json', which lies outside the bundle"),
        (absolute, "'/etc/passwd', which lies outside the bundle"),
        (linked_outside, "tokenizer.json leads outside the bundle"),
        (half_a_manifest, "not valid JSON"),
        (without_unet, "lacks the component unet"),
    ],
)
def test_bundle(refuse: Refuse, bundle_copy: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(bundle_copy)
    assert words in refuse(BUNDLE, bundle=bundle_copy)
    if damage is not altered:  # the one that only hashing can see
        assert words in refuse(BUNDLE, "--no-verify", bundle=bundle_copy)


def test_usage_is_checked_before_anything_is_hashed_or_loaded(refuse: Refuse, bundle_copy: Path) -> None:
    altered(bundle_copy)
    for arguments in (["--steps", "0"], ["--sampler", "eular"], ["--guidance-scale", "nan"], ["--rng", "x"]):
        refuse(USAGE, *arguments, bundle=bundle_copy)


def test_a_fault_of_our_own_is_one_line_too(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("sdrt.runtime.pipeline.Pipeline.load", fail)
    assert "internal error: ZeroDivisionError: division by zero (SDRT_TRACEBACK=1" in refuse(1)
    monkeypatch.setenv("SDRT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        refuse(1)


def test_negative_prompt_that_is_not_unicode(refuse: Refuse) -> None:
    assert "not Unicode text" in refuse(USAGE, "--negative-prompt", "\udcff", "--guidance-scale", "1")


@pytest.mark.parametrize("name", ["nowhere", "file", "folder", ""])
def test_no_bundle(refuse: Refuse, work: Path, name: str) -> None:
    assert "make one with `sd-export MODEL OUT`" in refuse(BUNDLE, bundle=work / name)


def test_bundle_name_too_long(refuse: Refuse) -> None:
    assert "too long" in refuse(BUNDLE, bundle="x" * 300)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_names_the_component(refuse: Refuse, bundle_copy: Path, component: str) -> None:
    file = bundle_copy / component / "model.onnx.data"
    file.write_bytes((b"\xff\x7f" * file.stat().st_size)[: file.stat().st_size])
    assert f"the {component} gave NaN or infinity" in refuse(NUMERICS, "--no-verify", bundle=bundle_copy)


def test_missing_backend(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'sdrt[cpu]'" in refuse(BACKEND)


# --- the output


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("missing/a.png", "the folder missing does not exist; make it first"),
        ("missing", "the folder missing does not exist; make it first"),
        ("file/a.png", "file is not a folder"),
        ("file", "file is not a folder"),
        ("x" * 300 + "/a.png", "does not exist"),
        ("x" * 300 + ".png", "the file name is too long"),
        ("/proc/a.png", "cannot write /proc/a.png"),
        ("/proc", "cannot write /proc"),
    ],
)
def test_output(refuse: Refuse, output: str, words: str) -> None:
    assert words in refuse(OUTPUT, "--output", output)


def test_output_is_looked_at_before_anything_is_loaded(refuse: Refuse) -> None:
    refuse(OUTPUT, "--output", "missing/a.png", bundle="no bundle either")


def test_folder_without_permission(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user; root, who may be running this, is never refused."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write in folder" in refuse(OUTPUT, "-o", "folder", bundle="none")
    assert "no permission to write in ." in refuse(OUTPUT, bundle="none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_for_real(refuse: Refuse, work: Path) -> None:
    (work / "folder").chmod(0o500)
    assert "no permission" in refuse(OUTPUT, "-o", "folder")


@pytest.mark.parametrize("arguments", [["-o", "old.png"], []], ids=str)
def test_full_disk(refuse: Refuse, work: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    def fsync(file: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to(work):  # a cache that is full is no error
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert "the disk is full" in refuse(OUTPUT, *arguments)


def test_full_disk_for_real(work: Path, tiny_bundle: Path) -> None:
    """The kernel lets no file grow over 100 bytes, which is less than the picture."""
    before = listing(work)
    result = subprocess.run(
        [SD_RUN, "x", "--bundle", str(tiny_bundle), "--steps", "1", "-o", "old.png", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        cwd=work,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert result.returncode == OUTPUT
    assert result.stdout == ""
    assert result.stderr == f"sd-run: cannot write old.png: {os.strerror(errno.EFBIG)}\n"
    assert listing(work) == before


def test_whole_process(work: Path, tiny_bundle: Path) -> None:
    """The line and the status as a shell sees them."""
    result = subprocess.run(
        [SD_RUN, "x", "--bundle", str(tiny_bundle), "--sampler", "eular"],
        capture_output=True,
        text=True,
        check=False,
        cwd=work,
    )
    allowed = ", ".join(sorted(SAMPLERS))
    expected = f"sd-run: unknown sampler 'eular': did you mean euler? allowed are {allowed}\n"
    assert (result.returncode, result.stdout, result.stderr) == (USAGE, "", expected)
