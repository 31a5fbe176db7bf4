"""Results on the hub: which files of them are published, and the one commit that does it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import CheckpointError
from qwenft.models.adapter import CONFIG
from qwenft.models.checkpoint import INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_KINDS = (".safetensors", ".json", ".jinja", ".txt", ".md", ".png")
_TERMS = ("LICENSE", "NOTICE")
#: What AutoTokenizer reads of a folder.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def files_of_model(folder: Path) -> dict[str, Path | bytes]:
    """By name what is published of a folder: all of it but hidden files.

    Raises:
        CheckpointError: it holds something else than safetensors, JSON, templates, text and pictures.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # of git and of file managers, no part of a model
            continue
        if not path.is_file() or (path.suffix not in _KINDS and path.name not in _TERMS):
            kinds = ", ".join((*_KINDS, *_TERMS))
            raise CheckpointError(
                f"{folder} holds {path.name}; what is published is {kinds}",
                fix=f"move {path} to another folder",
                path=path,
            )
        files[path.name] = path
    return files


def files_of_adapter(folder: Path, base: Path, base_name: str) -> dict[str, Path | bytes]:
    """By name what is published of an adapter: its files and the tokenizer's, so that it needs no other folder.

    Args:
        folder: of the adapter.
        base: the folder of the checkpoint that it was trained on.
        base_name: what the adapter's config calls that checkpoint; the paths of a machine are nobody else's.

    Raises:
        CheckpointError: the folder holds something else than safetensors, JSON, templates, text and pictures.
    """
    files = files_of_model(folder)
    files |= {name: base / name for name in _TOKENIZER_FILES if (base / name).is_file()}
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["base_model_name_or_path"] != base_name:
        config["base_model_name_or_path"] = base_name
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def terms_of(folder: Path) -> dict[str, str]:
    """The license that a checkpoint's own model card states, under the names of such a card."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return {}
    stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {name: stated[name] for name in ("license", "license_name", "license_link") if name in stated}


@attrs.frozen
class Repository:
    """A branch of a model repository on the hub.

    Args:
        repo_id: "name/model".
        revision: the branch.
        held: names of the files that it holds.
    """

    repo_id: str
    revision: str | None
    held: frozenset[str]

    @classmethod
    def claim(cls, repo_id: str, *, private: bool, revision: str | None) -> Repository:
        """Make the repository and the branch, where they are not there yet.

        Raises:
            CheckpointError: the id is none, the hub gives no right to it or cannot be reached, or the repository
                is there and can be seen by others than asked.
        """
        from huggingface_hub import HfApi

        hub = HfApi()
        if repo_id.count("/") != 1:
            raise CheckpointError(f"{repo_id!r} is no id of a repository", fix=_ID, path=repo_id)
        with _explained(repo_id):
            hub.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                hub.create_branch(repo_id, branch=revision, exist_ok=True)
            found = hub.model_info(repo_id, revision=revision)
        if found.private != private:
            is_private, asked = ("private", "public") if found.private else ("public", "private")
            raise CheckpointError(
                f"{repo_id} is {is_private} already, and {asked} was asked for",
                fix=f"push(..., private={found.private}), or another repository",
                path=repo_id,
            )
        return cls(repo_id, revision, frozenset(file.rfilename for file in found.siblings or ()))

    def commit(self, files: Mapping[str, Path | bytes], message: str) -> str:
        """Upload files in one commit.

        Args:
            files: by their names in the repository; a path is read as it is uploaded.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: weights of something else lie there, or the hub refuses or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        others = sorted(name for name in self.held - files.keys() if _is_loaded(name))
        if others:
            raise CheckpointError(
                f"{self.repo_id} holds {', '.join(others)}, beside which this would load as something else",
                fix="another repository, or remove them there",
                path=self.repo_id,
            )
        with _explained(self.repo_id):
            done = HfApi().create_commit(
                self.repo_id,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message,
                revision=self.revision,
            )
        return str(done.commit_url)


_ID = 'an id such as "your-name/support-bot"'


def _is_loaded(name: str) -> bool:
    """Whether loaders look for a file by its name, so that one of another model would be taken for this one's."""
    return "/" not in name and (name.endswith(".safetensors") or name in {INDEX, CONFIG})


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the hub's client raises into an error that says what to do."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload
        reason, fix = _reason(cause, repo_id)
        raise CheckpointError(
            f"{repo_id} was not published, and nothing here has changed: {reason}", fix=fix, path=repo_id
        ) from error


def _reason(error: BaseException, repo_id: str) -> tuple[str, str | None]:
    """What went wrong at the hub, and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return str(error), _ID
    if isinstance(error, ValueError):  # the hub does not take the card's metadata, or its answer is not understood
        return str(error), None
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {error}", "check the network, then push again"
    said: Any = error.server_message or str(error).strip().splitlines()[0]
    status = error.response.status_code
    fixes = {
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        403: f"a token that may write to {repo_id.partition('/')[0]}, or a name of your own before the slash",
    }
    return f"{status}, {said}", fixes.get(status, "push again; see https://status.huggingface.co if it stays so")
