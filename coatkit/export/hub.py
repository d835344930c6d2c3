"""Uploading an export to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from coatkit.errors import RunError

# What an earlier export may have left there, and would be loaded in place of this one.
_OURS = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"]


def check_name(repository: str) -> None:
    """Whether a name is one the hub could have.

    Raises:
        RunError: If it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RunError(f"--push {repository}: {error}") from None
    if "/" not in repository:
        raise RunError(f"--push {repository}: say whose it is: OWNER/{repository}")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload an export; gives the commit's address. Weights and configurations of an earlier one are replaced.

    The token is huggingface_hub's own business: the variable HF_TOKEN, or `hf auth login`.

    Args:
        folder: What `coatkit export` wrote.
        repository: OWNER/NAME; made if it is not there.
        private: Make it a private one.

    Raises:
        RunError: If the name is none, or the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    check_name(repository)
    again = f"  {folder} is complete; upload it with: hf upload {repository} {folder}"
    api = HfApi(library_name="coatkit")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:  # there before, and asking for it changes nothing
            raise RunError(
                f"--push {repository}: is a public repository already; name another, or make it private there"
            )
        message = "Export of a coatkit run"
        done = api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message, delete_patterns=_OURS)
    except LocalTokenNotFoundError:
        raise RunError(f"--push: there is no token; set HF_TOKEN, or run: hf auth login\n{again}") from None
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).partition("\n")[0]
        raise RunError(f"--push {repository}: the hub refused: {reason}\n{again}") from None
    except (HTTPError, OSError) as error:
        raise RunError(f"--push {repository}: the hub cannot be reached: {error}\n{again}") from None
    return str(done.commit_url)
