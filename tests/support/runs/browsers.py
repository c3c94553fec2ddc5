"""A headless Chromium, for tests of what a page looks like."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def find_browser() -> str:
    """A Chromium. On a continuous-integration machine it must be there; elsewhere the reason is told."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium: .ci/run installs it")
    if found is None:
        pytest.skip("no Chromium here (on Debian: apt-get install chromium)")
    return found


def chromium(browser: str, folder: Path, *arguments: str) -> str:
    """What a headless Chromium prints."""
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}",
    )
    done = subprocess.run([browser, *options, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
