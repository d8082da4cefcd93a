"""Builds the kernel library of the native backend. Everything else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("backends/native/src")
# Files for one instruction set guard themselves and set their own target: one set of flags serves all.
sources = sorted(str(p) for pattern in ("*.c", "*.cpp") for p in SOURCE.glob(pattern))

setup(
    ext_modules=[
        Extension(
            "fxcompress.backends.native._kernels",
            sources,
            depends=[str(p) for pattern in ("*.h", "*.inc") for p in SOURCE.glob(pattern)],
            extra_compile_args=["-O3", "-fopenmp", "-fvisibility=default", "-fno-math-errno"],
            extra_link_args=["-fopenmp"],
        )
    ]
)
