"""Broken files: each is converted to exactly what its bytes say, or ends in one clear line."""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.converters.mutants import write_seeds

pytestmark = pytest.mark.heavy

MEGABYTES = 2000
"""No file may make the converter larger."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants") / "seeds"
    folder.mkdir()
    write_seeds(folder)
    return folder


def try_mutants(seeds, first: int, count: int) -> None:
    """In a process of its own, which a mutant may hang, crash or bloat; it also checks each."""
    canary = seeds.parent / "canary"
    done = subprocess.run(
        [sys.executable, "-m", "tests.converters.mutants", str(seeds), str(first), str(count)],
        env=os.environ | {"CANARY": str(canary)},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if re.match(r"\d+ FAILED: ", line)]
    assert not failed, failed[0]
    assert done.returncode == 0, f"died of mutant {lines[-1] if lines else ''}\n{done.stderr}"
    assert len(lines) == count + 1
    converted = sum(line.endswith(" done") for line in lines)
    assert 0.05 * count < converted < 0.5 * count  # else these are no tests of both ways
    assert int(lines[-1].removeprefix("peak ")) < MEGABYTES
    assert not canary.exists()


def test_a_hundred_broken_files(seeds):
    try_mutants(seeds, 0, 100)


@pytest.mark.slow
def test_ten_thousand_broken_files_in_half_an_hour(seeds):
    """About four minutes on a machine with nothing else to do."""
    began = time.monotonic()
    for first in range(100, 10_100, 2500):
        try_mutants(seeds, first, 2500)
    assert time.monotonic() - began < 1800
