"""`l2e-ds export --push REPO`: upload exported folders to the Hugging Face Hub, which needs a token."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import validate_repo_id

from l2e_ds.errors import ConfigError, L2EError
from l2e_ds.run_directory.manifest import sha256
from l2e_ds.system.files import one_line

AGAIN = "; the same command resumes"
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str) -> None:
    """Check the name's form, and that there is a token that the hub accepts. Raises ConfigError, L2EError."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; unset it")
    if get_token() is None:
        raise ConfigError("--push: there is no token; run `hf auth login`, or set HF_TOKEN")
    with _explained(""):
        HfApi().whoami()


def push(folder: Path, repository: str, private: bool) -> str:
    """Create the repository, if there is none, and upload the folder in one commit. Returns the repository's address.

    private: whether a new repository is private. Raises L2EError, which says how to push again.
    """
    with _explained(f"; {folder} is complete, push it by: hf upload {repository} {folder}"):
        address = HfApi().create_repo(repository, private=private or None, exist_ok=True)  # None: the owner's default
        # The full name, as a repository without an owner belongs to the token's.
        HfApi().upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="l2e-ds export")
    return str(address)


def open_repository(repository: str, private: bool) -> tuple[str, str, list[str]]:
    """Create the repository, if there is none; return its full name, its address, and its branches named `stepN`.

    private: whether a new repository is private. Raises L2EError.
    """
    with _explained(AGAIN):
        address = HfApi().create_repo(repository, private=private or None, exist_ok=True)
        names = [branch.name for branch in HfApi().list_repo_refs(address.repo_id).branches]
    return address.repo_id, str(address), [name for name in names if re.fullmatch(r"step\d+", name)]


def push_branch(folder: Path, repository: str, branch: str, exists: bool, others_stay: bool = False) -> bool:
    """Make a branch hold what a folder holds, and nothing else. Return whether anything had to be pushed.

    repository: its full name; exists: whether it has the branch; others_stay: keep files of other names, but for
    weights, such as a license or pictures that someone put there. Raises L2EError.
    """
    api = HfApi()
    with _explained(AGAIN):
        if exists and _holds(api.list_repo_tree(repository, recursive=True, revision=branch), folder, others_stay):
            return False
        if not exists:
            api.create_branch(repository, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message="l2e-ds export",
            # of the main branch, from which this one was made, or of an earlier export
            delete_patterns=WEIGHTS if others_stay else "*",
        )
    return True


def _holds(tree: Iterable[RepoFile | RepoFolder], folder: Path, others_stay: bool) -> bool:
    """Return whether a listing of the hub has the files of a folder with the same content, and no others to remove."""
    theirs = {file.path: file for file in tree if isinstance(file, RepoFile) and file.path != ".gitattributes"}
    ours = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if others_stay:
        theirs = {name: file for name, file in theirs.items() if name in ours or any(map(Path(name).match, WEIGHTS))}
    return theirs.keys() == ours.keys() and all(_is_same(theirs[name], path) for name, path in ours.items())


def _is_same(file: RepoFile, path: Path) -> bool:
    if file.lfs is not None:
        return file.lfs.sha256 == sha256(path)
    content = path.read_bytes()  # a small file has the id that git gives to its content
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(then: str) -> Iterator[None]:
    """Turn an error of the hub or of the network into an L2EError of one line, which ends in `then`."""
    where = constants.ENDPOINT
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        meaning = {401: "the token is not valid", 403: "the token may not do this"}.get(status)
        raise L2EError(f"--push: {where} answers {status}: {meaning or one_line(error)}{then}") from None
    except (HTTPError, OSError) as error:
        raise L2EError(f"--push: cannot reach {where}: {one_line(error)}{then}") from None
