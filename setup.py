"""Maps <repo>/plugins/* and <repo>/kernels/* into hf_quant.plugins.* and hf_quant.kernels.*; the rest: pyproject.toml.

The two folders hold no `__init__.py` of their own: a top-level package `kernels` would shadow Hugging Face's.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithoutTests(build_py):
    """Unit tests live beside what they test and stay out of the wheel."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if not m[1].endswith("_test") and m[1] != "conftest"]


packages = find_packages(include=["hf_quant", "hf_quant.*"])
package_dir = {"hf_quant": "hf_quant"}
for top in ("plugins", "kernels"):
    for package in find_packages(top):
        packages.append(f"hf_quant.{top}.{package}")
        package_dir[f"hf_quant.{top}.{package}"] = f"{top}/{package.replace('.', '/')}"

setup(
    packages=packages,
    package_dir=package_dir,
    py_modules=["hf_quant_autoload"],
    cmdclass={"build_py": BuildWithoutTests},
)
