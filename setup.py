"""Where the packages lie; everything else is in pyproject.toml.

`kernels/` stands at the root of the repository and is installed inside the package, as `tfm.kernels`: a top-level
package of that name would shadow Hugging Face's.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tfm", "tfm.*"]),
        "tfm.kernels",
        *(f"tfm.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"tfm": "tfm", "tfm.kernels": "kernels"},
    package_data={"tfm": ["py.typed"]},
)
