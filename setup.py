"""Says which folders are packages; everything else about the package is in pyproject.toml.

ds_configs/ and launch/ lie at the top of the repository; their JSON and YAML files are installed inside the package.
"""

from setuptools import find_packages, setup

DATA = ("ds_configs", "launch/recipes", "launch/studies", "launch/studies/small")

setup(
    packages=[
        *find_packages(include=["l2e_ds", "l2e_ds.*"]),
        *(f"l2e_ds.{folder.replace('/', '.')}" for folder in DATA),
    ],
    package_dir={f"l2e_ds.{folder.replace('/', '.')}": folder for folder in DATA},
    package_data={
        "l2e_ds.evaluation": ["tasks/*.yaml"],  # no package: it holds no Python
        "l2e_ds.analysis": ["neuron_page.html"],
        "l2e_ds.export": ["card.md"],
        "l2e_ds.report": ["page.html"],
        "l2e_ds.run_directory": ["metric_table.yaml"],
        **{f"l2e_ds.{folder.replace('/', '.')}": ["*.json", "*.yaml"] for folder in DATA},
    },
)
