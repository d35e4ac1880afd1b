"""Only the compiled part: the metadata stand in pyproject.toml, the compilation in
_build/native.py."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))
import native  # noqa: E402

REASON = "_no_native.txt"  # read by dfkernels/_torch/native.py


class BuildNative(build_ext):
    """Puts _C into the package; where that cannot be done, puts the reason there instead."""

    def run(self):
        package = Path("dfkernels") if self.inplace else Path(self.build_lib) / "dfkernels"
        try:
            self.built = native.build(
                package, Path("build") / f"native-{sys.implementation.cache_tag}"
            )
            (package / REASON).unlink(missing_ok=True)
        except native.NoNative as why:
            stale = package / Path(self.get_ext_filename("_C")).name
            stale.unlink(missing_ok=True)
            if os.environ.get("DFKERNELS_REQUIRE_NATIVE") == "1":
                raise SystemExit(
                    f"DFKERNELS_REQUIRE_NATIVE=1 and the compiled part cannot be built: {why}"
                ) from None
            print(f"dfkernels: installing without the compiled part: {why}", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            self.built = package / REASON
            self.built.write_text(f"{why}\n", encoding="utf-8")

    def get_outputs(self):
        return [str(self.built)]

    def get_output_mapping(self):
        return {}


setup(ext_modules=[Extension("dfkernels._C", sources=[])], cmdclass={"build_ext": BuildNative})
