"""What an installed copy holds."""

import re
import subprocess
import sys

from tests.processes import REPOSITORY


def test_an_installed_copy_has_every_file_of_the_package(tmp_path):
    """An installed copy has templates, tasks, DeepSpeed configurations, recipes and studies, which a checkout finds by
    itself."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    ours = [path for path in (REPOSITORY / "l2e_ds").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wanted = {str(path.relative_to(REPOSITORY)) for path in ours}
    for folder, pattern in (
        ("ds_configs", "*.json"),
        ("launch/recipes", "*.yaml"),
        ("launch/studies", "*.yaml"),
        ("launch/studies/small", "*.yaml"),
    ):
        files = list((REPOSITORY / folder).glob(pattern))
        assert files
        wanted |= {f"l2e_ds/{path.relative_to(REPOSITORY)}" for path in files}
    assert wanted <= built, wanted - built


def test_container_files_copy_what_the_package_is_made_of():
    """Both container files copy the same files of this repository: those that `launch/install.sh` and setup.py read."""
    folder = REPOSITORY / "launch/containers"
    copied = re.findall(r"^COPY (.*) \S+$", (folder / "Dockerfile").read_text(), re.M)
    docker = {word for words in copied for word in words.split()}
    apptainer = dict(re.findall(r"^    (\S+) /opt/l2e-ds/(\S+)$", (folder / "l2e-ds.def").read_text(), re.M))
    assert docker == set(apptainer) == set(apptainer.values())
    assert docker == {"README.md", "setup.py", "pyproject.toml", "launch", "ds_configs", "l2e_ds"}
    assert all((REPOSITORY / name).exists() for name in docker)
