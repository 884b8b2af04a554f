"""`l2e-ds export --push REPO`: upload an exported folder to the Hugging Face Hub, which needs a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l2e_ds.errors import ConfigError, L2EError
from l2e_ds.system.files import one_line


def check_push(repository: str) -> None:
    """Check all that can be known before anything is pushed: the name's form, and a token that the hub accepts.

    Raises ConfigError, and L2EError if the hub cannot be reached or refuses the token.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

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
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(f"; {folder} is complete, push it by: hf upload {repository} {folder}"):
        address = api.create_repo(repository, private=private or None, exist_ok=True)  # None: the owner's default
        # The full name, as a repository without an owner belongs to the token's.
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="l2e-ds export")
    return str(address)


@contextmanager
def _explained(then: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    where = constants.ENDPOINT
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        meaning = {401: "the token is not valid", 403: "the token may not do this"}.get(status)
        reason = meaning or one_line(error)
        raise L2EError(f"--push: {where} answers {status}: {reason}{then}") from None
    except (HTTPError, OSError) as error:
        raise L2EError(f"--push: cannot reach {where}: {one_line(error)}{then}") from None
