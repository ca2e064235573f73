"""Publishes a run on the Hugging Face hub.

The token is the one that `huggingface_hub.get_token` finds: HF_TOKEN, or the token of a login. It is sent in requests
to the hub, and goes nowhere else.
"""

import io
import re
import shlex
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from alignprop.evaluation.pictures import read_grid
from alignprop.lora.files import LORA_FILE
from alignprop.publish.card import model_card, picture_name
from alignprop.publish.run_folder import RunFolder, read_run
from alignprop.settings.errors import ConfigError

FILES = ("config.json", "metrics.jsonl", "curves.png", "before_after.png")  # Uploaded if the run folder has them.
MAX_PICTURES = 8  # The largest number of pictures in the card's gallery.
PATIENCE = 120.0  # The number of seconds without a byte after which a connection counts as lost.


def check_hub(repo: str, private: bool, field: str = "hub.repo") -> None:
    """Checks whether an upload is possible, without changing anything.

    Args:
        repo: the repository, a well-formed "user/name".
        private: whether the repository has to be private.
        field: the setting that names the repository, for error messages.

    Raises:
        ConfigError: there is no token, it is not valid, or it may not write there; the hub does not answer; or the
            repository is public although it has to be private.
    """
    with _plain_errors(f"{field} = {repo!r}") as token:
        api, owner = HfApi(token=token), repo.split("/")[0]
        me = api.whoami()
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ConfigError(f"{field} = {repo!r}: the token may only read; make one that may write")
        # A fine-grained token is not checked here, because the organisations that it lists depend on its rights.
        names = [me["name"], *(organisation["name"] for organisation in me.get("orgs", ()))]
        if role == "write" and owner.lower() not in map(str.lower, names):
            raise ConfigError(f"{field} = {repo!r}: the token belongs to {', '.join(names)}, not to {owner!r}")
        if private:
            _refuse_public(api, repo, field)


def push(folder: Path, repo: str, private: bool, field: str = "hub.repo") -> str:
    """Uploads the best weights of a run, or else its last, with all files that describe them, in one commit.

    The run folder is not changed.

    Args:
        folder: the folder of a run, finished or not.
        repo: the repository, a well-formed "user/name". It is created if it does not exist. Files of the same names
            are replaced.
        private: whether a new repository is private; an existing one that is public is then refused.
        field: the setting that names the repository, for error messages.

    Returns:
        The repository's address.

    Raises:
        ConfigError: there is nothing to upload, or the upload failed.
    """
    run = read_run(folder)
    with _plain_errors(f"{field} = {repo!r}") as token:
        contents = contents_of(run, repo)
        if any(isinstance(content, bytes) and token.encode() in content for content in contents.values()):
            raise ConfigError(f"{field} = {repo!r}: the run's configuration or metrics contain the token itself")
        api = HfApi(token=token)
        # None keeps an organisation's default, which may be private; False would ask for a public repository.
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private:
            _refuse_public(api, repo, field)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo, operations, commit_message=f"{folder.name}, optimizer step {run.step}")
    return str(url)


def push_finished(folder: Path, repo: str, private: bool) -> str:
    """Calls `push` after training. Its ConfigError says that nothing is lost, and how to repeat the upload."""
    try:
        return push(folder, repo, private)
    except ConfigError as error:
        command = ["python", "-m", "alignprop", "push", str(folder), "--repo", repo] + ["--private"] * private
        raise ConfigError(
            f"training is done and {str(folder)!r} is complete, but it was not uploaded: {error}; repeat the upload "
            f"with: {shlex.join(command)}"
        ) from None


def contents_of(run: RunFolder, repo: str) -> dict[str, Path | bytes]:
    """Returns {name in the repository: file or content} of everything that is published of a run."""
    weights = [run.checkpoint / LORA_FILE] if run.has_lora else sorted((run.checkpoint / "denoiser").glob("*"))
    if not weights:
        raise ConfigError(f"{str(run.checkpoint)!r} holds neither {LORA_FILE} nor a denoiser")
    contents = {str(path.relative_to(run.checkpoint)): path for path in weights}
    # These files are read now, because a run that is still going on writes to them.
    contents |= {name: (run.folder / name).read_bytes() for name in FILES if (run.folder / name).exists()}
    if run.has_own_grid:
        contents[f"samples/{run.grid.name}"] = run.grid.read_bytes()
    pictures = _gallery(run)
    contents |= {picture_name(n): picture for n, picture in enumerate(pictures.values())}
    contents["README.md"] = model_card(run, repo, list(pictures)).encode()
    return contents


def _gallery(run: RunFolder) -> dict[str, bytes]:
    """Returns {prompt: PNG} of the checkpoint's first pictures, with one picture for each prompt."""
    files = {}
    for label, picture in read_grid(run.grid) if run.grid.exists() else ():
        prompt = label.rpartition("\n")[0]
        if prompt not in files and len(files) < MAX_PICTURES:
            picture.save(file := io.BytesIO(), format="PNG")
            files[prompt] = file.getvalue()
    return files


def _refuse_public(api: HfApi, repo: str, field: str) -> None:
    try:
        is_public = not api.repo_info(repo).private
    except RepositoryNotFoundError:
        return
    if is_public:
        raise ConfigError(f"{field} = {repo!r} exists and is public; make it private on the hub, or name another")


@contextmanager
def _plain_errors(what: str):
    """Yields the token. Turns every error inside the context into a one-line ConfigError without the token in it."""
    token, session = "", get_session()
    before, session.timeout = session.timeout, PATIENCE
    try:
        token = get_token() or ""
        if not token:
            raise ConfigError(f"{what} needs a token: set HF_TOKEN, or log in with `hf auth login`")
        # RFC 6750, 2.1. The client's error quotes other characters escaped, so that `replace` would not find the token.
        if not re.fullmatch(r"[\w.~+/-]+=*", token, re.ASCII):
            raise ConfigError(f"{what}: HF_TOKEN or the login has characters that no token has")
        yield token
    except ConfigError:
        raise
    except Exception as error:  # The hub, the network, the disk and the hub's client raise all kinds of errors.
        reason = _reason(error)
        # The cause is dropped, because the client's or the hub's message may quote the request with the token.
        raise ConfigError(f"{what}: {reason.replace(token, '…') if token else reason}") from None
    finally:
        session.timeout = before


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = " ".join(str(getattr(error, "server_message", None) or error).split())
    if status == 401:
        return "the hub does not accept the token; set HF_TOKEN to a valid one, or log in again with `hf auth login`"
    if status == 403:
        return f"the token may not write there: {answer}"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub cannot be reached: HF_HUB_OFFLINE is set"
    if status is None:
        return f"the hub cannot be reached, or the upload was not possible: {type(error).__name__}: {answer}"
    return f"the hub answers {status}: {answer}"
