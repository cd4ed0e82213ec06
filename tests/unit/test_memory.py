"""Blocks of a picture's size are used again."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from proto import memory
if sys.argv[1] == "kept":
    memory.keep_large_blocks()
def blocks():
    for _ in range(50):
        one = bytearray(b"x" * 3_000_000)
        two = bytes(one)
        del one, two
blocks()
began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_picture_s_block_is_not_mapped_afresh() -> None:
    result = subprocess.run([sys.executable, "-c", FAULTS, "kept"], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 50 * 730 / 10, "a block of 3 MB has 730 pages"
