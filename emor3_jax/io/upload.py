"""A folder onto the Hugging Face hub, with the hub's errors as one sentence each."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from emor3_jax.errors import RunError, UserError, os_error_number


def check_name(name: str) -> None:
    """Raises UserError for what is no name of a repository, "owner/name"."""
    rule = "must be owner/name, as the hub spells it; your own is what `hf auth whoami` says"
    if name.count("/") != 1:
        raise UserError(f"name={name!r}: {rule}")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"name={name!r}: {rule} ({_line(error)})") from error


def check_token(api: HfApi) -> None:
    """Raises UserError where nobody is logged in."""
    with _told(api, "", None):
        token = api.token if api.token is not None else _stored_token()
    if not token:
        raise UserError(
            f"token: there is none for {api.endpoint}; log in by `hf auth login`, or set HF_TOKEN "
            f"to one of {api.endpoint}/settings/tokens with the right to write"
        )


def upload(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a policy of emor3_jax",
    api: HfApi | None = None,
) -> str:
    """Uploads a folder into a repository of models, which is made if it is not there.

    What the hub has already is not sent again, so an upload that broke off goes on.

    Args:
      folder: on disk.
      name: "owner/name".
      private: make a repository that only its owner sees; one that is there must be so.
      revision: branch, made if it is not there; None is "main".
      message: of the commit.
      api: of the hub; None takes `HF_ENDPOINT`, else https://huggingface.co.

    Returns:
      Its address.

    Raises:
      UserError: before any upload, for a name, a token or a right that does not do; and for what
        the hub refuses.
      RunError: if the hub or the network fails.
    """
    api = api or HfApi()
    check_name(name)
    check_token(api)
    with _told(api, name, revision):
        is_new = _make_repository(api, name, private)
        if private and not is_new and not api.repo_info(name).private:
            raise UserError(
                f"name={name!r}: --private, but this repository is there and public; make it "
                f"private at {api.endpoint}/{name}/settings, or take another name"
            )
        if revision and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            revision=revision,
        )
    return f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision else "")


def _make_repository(api: HfApi, name: str, private: bool) -> bool:
    """Makes a repository of models; returns whether it was not there before."""
    try:
        api.create_repo(name, private=private or None)
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        # A token may write to a repository without the right to make one.
        if status != 409 and not (status in (401, 402, 403) and api.repo_exists(name)):
            raise
        return False
    return True


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


@contextlib.contextmanager
def _told(api: HfApi, name: str, revision: str | None) -> Iterator[None]:
    """Turns errors of the hub and of the way to it into those of the package."""
    try:
        yield
    except UserError:
        raise
    except hub_errors.OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except (OSError, RuntimeError, ValueError, hub_errors.HTTPError) as error:
        raise _of_hub(error, api, name, revision) from error


def _of_hub(error: Exception, api: HfApi, name: str, revision: str | None) -> Exception:
    """Returns the package's error for one of the hub, which may be the cause of another."""
    refused, link = None, error
    while link is not None:
        refused = link if isinstance(link, hub_errors.HfHubHTTPError) else refused
        link = link.__cause__
    if refused is None:
        number = os_error_number(error)
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            return UserError(f"name={name!r}: the upload is refused: {_line(error)}")
        if isinstance(error, OSError) and number is not None and error.filename is not None:
            # A file of the folder: told as that of any other program.
            return error
        return RunError(
            f"{api.endpoint} cannot be reached, or broke off ({_line(error)}); start again: what "
            "was uploaded is not sent twice"
        )
    status, said = refused.response.status_code, _line(refused.server_message or refused)
    where = f"revision={revision!r}" if revision else f"name={name!r}"
    rule = {
        400: f"name={name!r}: the hub refuses the files ({said}); mend them",
        401: f"token: {api.endpoint} does not accept it ({said}); make a new one at "
        f"{api.endpoint}/settings/tokens, and log in by `hf auth login` or set HF_TOKEN",
        402: f"name={name!r}: the hub asks for payment ({said})",
        403: f"name={name!r}: the token may not write there ({said}); give a name under an owner "
        f"that you may write to, and a token with that right ({api.endpoint}/settings/tokens)",
        404: f"{where}: {api.endpoint} has no such place, or does not show it to this token "
        f"({said}); check the name, and that the token may write",
        409: f"{where}: another upload changed it meanwhile ({said}); start again",
        412: f"{where}: another upload changed it meanwhile ({said}); start again",
        413: f"name={name!r}: the hub has no room for so much ({said})",
    }.get(status)
    if rule is None or status in (409, 412):
        told = rule or f"{api.endpoint} answers {status} ({said}); try again later: what was "
        return RunError(told if rule else told + "uploaded is not sent twice")
    return UserError(rule)


def _line(error: object) -> str:
    """Returns a message on one line, cut."""
    return " ".join(str(error).split())[:300]
