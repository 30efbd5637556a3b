"""A wheel that carries the C library (make python-wheel) fits this processor, but any Python 3."""

from pathlib import Path

from setuptools import setup
from wheel.bdist_wheel import bdist_wheel

CARRIED = Path(__file__).parent / "src/qcow2_snapshot/libqcow2_snapshot.so.0"


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not CARRIED.exists()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"bdist_wheel": Wheel})
