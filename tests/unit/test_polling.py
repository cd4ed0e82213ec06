"""gRPC reads what ``proto.polling`` chose only if that was there before it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("program", ["engine.__main__", "gateway_shim.__main__"])
def test_grpc_is_imported_after_the_choice(program: str) -> None:
    names = subprocess.run(
        [sys.executable, "-c", f"import sys, {program}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "grpc._cython.cygrpc" in names
    assert names.index("proto.polling") < names.index("grpc")
