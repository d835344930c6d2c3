"""Uploading an export to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from coatkit.errors import RunError


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload an export; gives the commit's address.

    The token is huggingface_hub's own business: the variable HF_TOKEN, or `hf auth login`.

    Args:
        folder: What `coatkit export` wrote.
        repository: OWNER/NAME; made if it is not there.
        private: Make it a private one.

    Raises:
        RunError: If the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    again = f"  {folder} is complete; upload it with: hf upload {repository} {folder}"
    api = HfApi(library_name="coatkit")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:  # there before, and asking for it changes nothing
            raise RunError(
                f"--push {repository}: is a public repository already; name another, or make it private there"
            )
        done = api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export of a coatkit run")
    except HFValidationError as error:
        raise RunError(f"--push {repository}: {error}") from None
    except LocalTokenNotFoundError:
        raise RunError(f"--push: there is no token; set HF_TOKEN, or run: hf auth login\n{again}") from None
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).partition("\n")[0]
        raise RunError(f"--push {repository}: the hub refused: {reason}\n{again}") from None
    except (HTTPError, OSError) as error:
        raise RunError(f"--push {repository}: the hub cannot be reached: {error}\n{again}") from None
    return str(done.commit_url)
