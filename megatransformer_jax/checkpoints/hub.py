"""Models by their names on the Hugging Face hub: 'org/name', downloaded once into its cache.

Only what a model is read from is downloaded: its configuration, its weights as safetensors, its
tokenizer. Never code, and never pickles, which run code when they are read. The cache is that of
`huggingface_hub` (extra 'hub'), shared with other libraries; its environment variables apply, such
as HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import logging

from megatransformer_jax.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE
from megatransformer_jax.config.option import UserError
from megatransformer_jax.extras import import_extra
from megatransformer_jax.storage import (
    CHECKPOINTS,
    NO_CHECKPOINTS,
    AnyPath,
    as_path,
    check_reachable,
)

# Owner and name, as the hub allows them, perhaps with branch, tag or commit: 'org/name@v2'.
_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII
)
_ADDRESS = re.compile(r"https?://[^/]+/([^/]+/[^/?#]+).*")
# Where runs are by default: such a name is a path, also where there is no run yet.
_RUNS = "runs"
# What a model is read from; patterns of names in the top folder.
FILES = (
    "config.json",
    "generation_config.json",
    SINGLE_FILE,
    "model-*-of-*.safetensors",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Names that weights have if they are pickles.
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")


def find_model(
    name: str | os.PathLike[str],
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> AnyPath:
    """The folder of a model: of this machine, in a bucket (gs://), or of the hub, in the cache.

    A folder of this name wins. A name that is not one of the hub's, or whose first part is a folder
    here or 'runs', is returned as it is; who reads it says that there is no such folder.

    Args:
      name: a path, or owner and name on the hub, 'org/name' or 'org/name@revision'.
      revision: branch, tag or commit on the hub. With it or the other form of it, `name` is one of
        the hub's.
      endpoint: address of the hub. None: that of the library.
      cache_dir: where downloads are kept. None: where the library keeps them.

    Raises:
      UserError: if `revision` does not go with the name, the model cannot be downloaded, or the
        bucket is not served or cannot be reached.
    """
    if address := _ADDRESS.fullmatch(str(name)):
        raise UserError(
            f"{str(name)!r} is an address; name the model of the hub as {address[1]!r}, and a "
            "branch, tag or commit of it as its revision."
        )
    folder = as_path("model", name, CHECKPOINTS, NO_CHECKPOINTS)
    found = _NAME.fullmatch(str(name))
    if revision is not None and (found is None or folder.exists() or found["revision"]):
        what = "not a name on the hub, such as 'org/name'"
        if found is not None:
            what = "a folder here" if folder.exists() else "one with a revision"
        raise UserError(
            f"revision={revision!r} is for models of the hub, and {str(name)!r} is {what}; leave "
            "revision out, or name a model of the hub."
        )
    check_reachable("model", folder)
    if found is None or folder.exists():
        return folder
    revision = revision or found["revision"]
    is_local = folder.parent.is_dir() or folder.parts[:1] == (_RUNS,)
    if revision is None and is_local:
        return folder
    return download_model(found["name"], revision, endpoint=endpoint, cache_dir=cache_dir)


def download_model(
    name: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Downloads what the cache does not have of a model, and returns its folder there.

    A file whose connection breaks goes on where it stopped; files that are there are not asked for
    again. Without a connection, or with HF_HUB_OFFLINE, the cache alone is read.

    Args:
      name: owner and name, 'org/name'.
      revision: branch, tag or commit. None: the main branch.
      endpoint: see `find_model`.
      cache_dir: see `find_model`.

    Raises:
      UserError: if there is no such model or revision, it may not be read, it has no safetensors,
        or the hub cannot be reached and the cache does not have it.
    """
    hub = import_extra("huggingface_hub", "hub", f"{name}: no such folder; to read it from the hub")
    errors = import_extra("huggingface_hub.errors", "hub", name)
    where = endpoint or hub.HfApi().endpoint
    try:
        found = hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FILES),
            endpoint=endpoint,
            cache_dir=cache_dir,
        )
    except Exception as error:  # Of the library, of its HTTP client, or of the file system.
        raise _explained(error, errors, name, revision, where) from error
    folder = pathlib.Path(found)
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        raise _without_weights(hub, name, revision, endpoint)
    logging.info("%s of %s is in %s", _named(name, revision), where, folder)
    return folder


def _named(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at {revision!r}"


def _explained(
    error: Exception, errors: Any, name: str, revision: str | None, where: str
) -> UserError:
    """What went wrong in one screen."""
    here = f"{name}: no such folder in {pathlib.Path.cwd()}"
    reason = str(error).strip().partition("\n")[0]
    match error:
        case errors.GatedRepoError():
            return UserError(
                f"{name}: {where} gives it only to those who have accepted its terms; accept them "
                "on its page, then log in with `hf auth login` or set HF_TOKEN."
            )
        case errors.RepositoryNotFoundError():
            return UserError(
                f"{here}, and {where} has no model of this name, or not for you; correct the name, "
                "or log in with `hf auth login` if it is private."
            )
        case errors.RevisionNotFoundError():
            return UserError(
                f"revision={revision!r}: {name} has no such branch, tag or commit; its page lists "
                "them. Leave it out for the main branch."
            )
        case errors.LocalEntryNotFoundError():
            return UserError(
                f"{here}; {where} cannot be reached, and the cache does not have all of "
                f"{_named(name, revision)}. Name a folder that is there, or connect ("
                f"{_cause(error)})."
            )
        case errors.HFValidationError():
            return UserError(f"{here}, nor is it a name on the hub ({reason}).")
    return UserError(
        f"{_named(name, revision)} cannot be downloaded from {where} ({type(error).__name__}: "
        f"{reason}); run the same again, which goes on with the files that are missing."
    )


def _cause(error: BaseException) -> str:
    """The innermost reason, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def _without_weights(hub: Any, name: str, revision: str | None, endpoint: str | None) -> UserError:
    try:
        files: Sequence[str] = hub.HfApi(endpoint=endpoint).list_repo_files(name, revision=revision)
    except Exception:  # Without a connection what there would be is unknown.
        files = ()
    pickles = [file for file in files if _PICKLE.fullmatch(file)]
    if pickles:
        return UserError(
            f"{name} has its weights as pickles only ({', '.join(pickles[:3])}), which run code "
            "when they are read, so nothing of them was downloaded. Look on its page for a "
            "revision with safetensors (such as 'refs/pr/1'), or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER) of transformers "
            "writes safetensors; then name FOLDER."
        )
    there = f"it has {', '.join(sorted(files)[:8])}" if files else "nothing else is known of it"
    return UserError(
        f"{_named(name, revision)} has neither {SINGLE_FILE} nor {INDEX_FILE}; {there}. Name a "
        "model with weights as safetensors."
    )
