"""Generated code and compiled kernels; everything else is in pyproject.toml."""

from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildProto(build_py):
    """Generates ``proto/engine_pb2*`` with the repository root as include path, so that the generated import reads
    ``from proto import engine_pb2``. Runs before the package's files are collected; editable installs run it too."""

    def run(self) -> None:
        from grpc_tools import protoc

        arguments = ["protoc", f"-I{ROOT}", f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
        if protoc.main([*arguments, str(ROOT / "proto" / "engine.proto")]) != 0:
            raise SystemExit("protoc could not generate code from proto/engine.proto")
        super().run()


commands: dict[str, Any] = {"build_py": BuildProto}

setup(
    cmdclass=commands,
    ext_modules=cythonize(
        [
            Extension(
                "cext._pixels",
                ["cext/_pixels.pyx", "cext/kernels.c"],
                depends=["cext/kernels.h"],
                # No -march: the kernels choose their instructions at run time. -ffast-math would break the NaN rule.
                extra_compile_args=["-O3", "-fno-trapping-math", "-fno-math-errno"],
            )
        ],
        compiler_directives={"language_level": 3},
    ),
)
