"""Installs the modules for `import model`, `import generate`, …; the scripts run from a clone."""

from pathlib import Path

from setuptools import setup

requirements = Path(__file__).with_name("requirements.txt").read_text().splitlines()

setup(
    name="tokenbus",
    version="0.1.0",
    description="Llama-family text generation in plain PyTorch, as fast as the memory bus allows",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=[""],  # every module here
    package_data={"": ["kernels.cpp", "presets.json"]},
    install_requires=[line.split("#")[0].strip() for line in requirements],
)
