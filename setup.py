"""Build the native kernels with CMake and ninja.

What cannot be built, for want of a C++17 compiler or of nvcc, is left out, and the package installs
all the same: it runs on the backends that are there, and `nabla info` shows the reason that is
recorded here. NABLA_SKIP_CPU=1 and NABLA_SKIP_CUDA=1 leave kernels out on request. The emulated
CUDA kernels are a tool of development: editable installations have them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SKIPPED_BY = {
    "_cpu": "NABLA_SKIP_CPU",
    "_cuda": "NABLA_SKIP_CUDA",
    "_cuda_emulated": "NABLA_SKIP_CUDA",
}


class BuildKernels(build_ext):
    """Build the modules into the package; of each that fails, write down why."""

    def run(self) -> None:
        """Build in place for an editable installation, else into the wheel."""
        editable = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if editable else Path(self.build_lib).resolve()) / "nabla"
        package.mkdir(parents=True, exist_ok=True)
        for module in SKIPPED_BY:
            if module == "_cuda_emulated" and not getattr(self, "editable_mode", False):
                continue
            reason = package / f"{module}_build.txt"
            reason.unlink(missing_ok=True)
            try:
                self.build_module(module, package)
            except BuildError as error:
                for built in package.glob(f"{module}.*.so"):
                    built.unlink()
                reason.write_text(f"{error}\n")
                print(f"nabla: installing without nabla.{module}: {error}", file=sys.stderr)

    def build_module(self, module: str, package: Path) -> None:
        """Configure and build with the Python that installs."""
        if os.environ.get(SKIPPED_BY[module], "0") != "0":
            raise BuildError(f"{SKIPPED_BY[module]} was set when nabla was installed")
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 was missing when nabla was installed") from error
        build = Path(self.build_temp).resolve() / module
        # pip builds in a new environment each time: what was found in the last one is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DNABLA_MODULE={module}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DNABLA_SANITIZE={os.environ.get('NABLA_SANITIZE', 'OFF')}",
        )
        run("cmake", "--build", str(build))

    def get_outputs(self) -> list[str]:
        """The modules that could be built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to move: an editable build is in place already."""
        return {}


class BuildError(Exception):
    """Why a module is not there, in one line."""


def run(*command: str) -> None:
    """Run a build step; its failure is a BuildError with the first error that it prints."""
    try:
        result = subprocess.run(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} was missing when nabla was installed") from error
    print(result.stdout)
    if result.returncode:
        # CMake's errors are sentences over several lines, a compiler's are a line.
        (cmake, compiler), *_ = re.findall(
            r"CMake Error.*\n([\s\S]+)|(.*error: .*)", result.stdout
        ) or [(f"exit status {result.returncode}", "")]
        message = compiler or " ".join(cmake.split()).split(". ")[0]
        raise BuildError(f"the build failed when nabla was installed: {message}")


setup(
    ext_modules=[Extension(f"nabla.{module}", sources=[]) for module in SKIPPED_BY],
    cmdclass={"build_ext": BuildKernels},
)
