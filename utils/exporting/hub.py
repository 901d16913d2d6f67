"""Exported folders on the Hugging Face hub, or on the server that HF_ENDPOINT names."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


def check_hub(name: str) -> None:
    """Before anything is written. Raises: ValueError: the name has another form, or there is no token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push_to_hub {name}: {error}; give a name such as my_user/my_model") from error
    if not get_token():
        raise ValueError(
            f"--push_to_hub {name} needs an access token with write permission: run `hf auth login`, or set HF_TOKEN"
        )


def is_unreached(error: Exception) -> bool:
    """Whether an error says that no server answered: of httpx with huggingface_hub 1, of httpx2 with 2."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OfflineModeIsEnabled) or "TransportError" in names


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as a new repository; returns its address.

    Raises: OSError: the server refuses, or is not reached; the folder stays, and the message says how to go on.
    """
    api, server = HfApi(), constants.ENDPOINT
    again = f"the export is in {folder}; once that is solved, `hf upload {name} {folder}` uploads it"
    try:
        repo = api.create_repo(name, private=private)
        # COMPLETE.json and the card too: a copy is a checkpoint.
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Export")
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the access token is not valid: run `hf auth login`, or set HF_TOKEN",
            403: "the access token may not write there: give one with write permission, or a name of your own",
            409: "the name is taken: give another one, or `hf upload` a new version on purpose",
        }.get(status, "see the server's answer")
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        raise OSError(f"--push_to_hub {name}: {server} answers {status} ({reason}); {remedy}; {again}") from error
    except Exception as error:
        if not is_unreached(error):
            raise
        raise OSError(
            f"--push_to_hub {name}: {server} is not reached ({error}); check the network; {again}"
        ) from error
    return str(repo)
