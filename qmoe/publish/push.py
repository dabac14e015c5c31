"""``qmoe push``: a compressed checkpoint to the Hugging Face hub, verified, with a model card.

One commit, so that the repository is never half of an old and half of a new checkpoint. Files whose
bytes the hub has already are not sent again, so an upload that was cut off goes on. The directory
itself is not changed: the card exists only in the repository.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import CONFIG_MAPPING, AutoConfig

from qmoe.errors import HubError, QmoeError, reason
from qmoe.inference.structure import build
from qmoe.models.auto import auto_class
from qmoe.models.code import FILE, loading_code
from qmoe.publish.card import model_card
from qmoe.publish.verify import verify
from qmoe.store.inspect import inspect
from qmoe.store.manifest import MANIFEST, read_manifest, sealed
from qmoe.store.reader import Container
from qmoe.system.files import canonical_json
from qmoe.system.hub import FAILURES

CARD = "README.md"
_OURS = ("qmoe*.safetensors", "qmoe*.safetensors.index.json", MANIFEST)
_PLAIN = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        repo: "owner/name".
        url: of the commit.
        commit: its hash.
        files: names of the files of the checkpoint, and the card.
        stored_bytes: their bytes.
    """

    repo: str
    url: str
    commit: str
    files: list[str]
    stored_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `qmoe push`."""
        return asdict(self)


def push(
    directory: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base: str | None = None,
    license_id: str | None = None,
    score: str | os.PathLike[str] | None = None,
    with_code: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Pushed:
    """Uploads a checkpoint; makes the repository or branch if there is none.

    A README.md in the directory is uploaded in place of the generated card.

    Args:
        directory: a compressed checkpoint.
        repo: "owner/name", or a name of one's own.
        private: make the repository private; refuse one that is public.
        revision: branch; None for the default one.
        message: of the commit.
        base: id of the model that was compressed; default: what the manifest says, if it came from
            the hub.
        license_id: the hub's name of the license, for the card.
        score: file with the output of ``qmoe eval --json``.
        with_code: add the file that lets ``trust_remote_code=True`` load the checkpoint without an
            ``import qmoe``, see `qmoe.models.code`.
        progress: called with bytes as they are found sound, see `qmoe.publish.verify.verify`.

    Raises:
        CorruptError: the checkpoint is not sound; nothing was sent.
        HubError: no connection, no permission, or a repository with something else in it.
    """
    where = Path(directory)
    scored = read_score(Path(score)) if score is not None else None
    verify(where, progress)
    manifest, found = read_manifest(where), inspect(where)
    changed = _with_code(where, manifest) if with_code else {}
    files = sorted({*manifest["files"], MANIFEST, *changed})
    auto = _auto(where, found.model_type)
    base = base or _hub_id(manifest["source"])

    def card(name: str) -> bytes:
        made = model_card(name, auto, found, manifest, base, scored, license_id)
        return _own_card(where) or made.encode("utf-8")

    text, api = message or f"Experts at {found.bits_per_weight:.3f} bits per weight", HfApi()
    try:
        name = _repository(api, repo, private, revision)
        stale = _stale(api, name, revision, files)
        operations: list[Any] = [CommitOperationAdd(CARD, card(name))]
        operations += [CommitOperationAdd(f, changed.get(f, where / f)) for f in files]
        operations += [CommitOperationDelete(f) for f in stale]
        done = api.create_commit(name, operations, commit_message=text, revision=revision)
    except (*FAILURES, RuntimeError) as e:  # a RuntimeError says which file, its cause says why
        raise HubError(_refusal(repo, e)) from e
    size = sum(len(changed[f]) if f in changed else (where / f).stat().st_size for f in files)
    return Pushed(name, str(done.commit_url), str(done.oid), [*files, CARD], size)


def _hub_id(origin: dict[str, Any]) -> str | None:
    """Of the source, if it came from the hub."""
    return str(origin["name"]) if "revision" in origin else None


def _own_card(where: Path) -> bytes | None:
    return (where / CARD).read_bytes() if (where / CARD).is_file() else None


def _with_code(where: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The files that ``--with-code`` adds or changes, the manifest among them; none if the
    checkpoint has them already."""
    if FILE in manifest["files"]:
        return {}
    container = Container.open(where, check=False)
    model = build(container)
    changed, auto = loading_code(model.config, type(model))
    changed["config.json"] = canonical_json({**container.config, "auto_map": auto})
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in changed.items()
    }
    changed[MANIFEST] = sealed({**manifest, "files": {**manifest["files"], **entries}})
    return changed


def _repository(api: HfApi, repo: str, private: bool, revision: str | None) -> str:
    """The full name of the repository; it and the branch are made if there is none."""
    name: str = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise HubError(f"{name} exists and is public; make it private first or leave --private")
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return name


def _stale(api: HfApi, name: str, revision: str | None, files: list[str]) -> list[str]:
    """Files of an earlier checkpoint that the new one does not have."""
    there = api.list_repo_files(name, revision=revision)
    if plain := [f for f in there if any(fnmatch(f, p) for p in _PLAIN)]:
        raise HubError(
            f"{name} holds {plain[0]}, weights that transformers would load in place of these; "
            "push to another repository or remove them"
        )
    return [f for f in there if any(fnmatch(f, p) for p in _OURS) and f not in files]


def read_score(path: Path) -> dict[str, Any]:
    """The figures that ``qmoe eval --json`` printed, from its last line.

    Raises:
        QmoeError: the file holds something else.
    """
    try:
        lines = path.read_text("utf-8").strip().splitlines() or [""]
        found = json.loads(lines[-1])
    except (OSError, ValueError) as e:
        raise QmoeError(f"{path} cannot be read as the output of `qmoe eval --json` ({e})") from e
    numbers = {"perplexity", "tokens"}
    if isinstance(found, dict) and "reference_perplexity" in found:
        numbers |= {"reference_perplexity", "kl", "top1_agreement"}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(k), int | float) for k in numbers
    ):
        raise QmoeError(
            f"{path} is not the output of `qmoe eval --json`: its last line lacks one of "
            f"{', '.join(sorted(numbers))}"
        )
    return found


def _auto(where: Path, model_type: str) -> str:
    """The class of transformers that loads the checkpoint. Code that it brings along is not run."""
    if model_type not in CONFIG_MAPPING:
        return "AutoModelForCausalLM"
    name: str = auto_class(AutoConfig.from_pretrained(where)).__name__
    return name


def _refusal(repo: str, error: BaseException) -> str:
    cause: BaseException = error
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        cause = error.__cause__
    response = getattr(cause, "response", None)
    if isinstance(cause, HfHubHTTPError) and getattr(response, "status_code", 0) in (401, 403):
        return (
            f"the hub does not let us write {repo!r}; log in with `hf auth login`, or set HF_TOKEN "
            "to a token that may write there"
        )
    return (
        f"{repo!r} cannot be pushed ({reason(cause)}); check the name and the connection, then run "
        "the same command again"
    )
