"""Generated code and compiled kernels; everything else is in pyproject.toml."""

import shutil
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = [f"cext/{name}.c" for name in ("kernels", "kernels_avx2", "kernels_avx512", "limits")]

#: Files that live beside the packages in a checkout and inside one when installed; the code looks in both places.
SHIPPED = {"supervisord.conf": "gateway_shim/supervisord.conf", "examples/workflows/*.json": "gateway_shim/workflows"}


class BuildPackages(build_py):
    """Generates ``proto/engine_pb2*`` with the repository root as include path, so that the generated import reads
    ``from proto import engine_pb2``. Runs before the package's files are collected; editable installs run it too."""

    def run(self) -> None:
        from grpc_tools import protoc

        arguments = ["protoc", f"-I{ROOT}", f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
        if protoc.main([*arguments, str(ROOT / "proto" / "engine.proto")]) != 0:
            raise SystemExit("protoc could not generate code from proto/engine.proto")
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs + ([] if self.editable_mode else [str(target) for _, target in self._shipped()])

    def _shipped(self) -> list[tuple[Path, Path]]:
        built = Path(self.build_lib)
        return [
            (source, built / target if "*" not in pattern else built / target / source.name)
            for pattern, target in SHIPPED.items()
            for source in sorted(ROOT.glob(pattern))
        ]


commands: dict[str, Any] = {"build_py": BuildPackages}

setup(
    cmdclass=commands,
    ext_modules=cythonize(
        [
            Extension(
                "cext._pixels",
                ["cext/_pixels.pyx", *KERNELS],
                depends=["cext/kernels.h"],
                # No -march: the kernels choose their instructions at run time. -ffast-math would break the NaN rule.
                extra_compile_args=["-O3", "-fno-trapping-math", "-fno-math-errno"],
            )
        ],
        compiler_directives={"language_level": 3},
    ),
)
