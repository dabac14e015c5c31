"""Weight files on the Hugging Face hub, downloaded when first read.

Headers come by range requests, so names and shapes of a model of a terabyte cost a few megabytes.
Files that are already in the hub's cache are used from there, also with HF_HUB_OFFLINE=1.
"""

import contextlib
import fcntl
import hashlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from torch import Tensor

from qmoe.errors import SourceError, reason
from qmoe.source.selection import Selection
from qmoe.source.shards import SafetensorsShard
from qmoe.system.hub import FAILURES
from qmoe.system.tensors import Entry, check_header

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.ckpt*",
)


class Repository:
    """One revision of a model on the hub.

    Args:
        repo: "owner/name".
        revision: branch, tag or commit; None for the default branch. Resolved once to a commit, so
            that a push to the repository in the middle of a run changes nothing.
        cache: directory for the weight files of this run, in a folder named by the commit, each
            deleted by `HubShard.discard`; None for the hub's own cache, where files stay.

    Raises:
        SourceError: there is no such repository or revision, or it cannot be reached and is not
            cached.
    """

    def __init__(self, repo: str, revision: str | None, cache: Path | None) -> None:
        self.repo = repo
        self._coming: dict[str, threading.Thread] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._one_download = threading.Lock()
        try:  # without a connection this falls back to what is cached
            snapshot = snapshot_download(repo, revision=revision, ignore_patterns=list(WEIGHTS))
        except FAILURES as e:
            raise SourceError(
                f"{repo!r} is neither a local directory nor a model that the hub gives us "
                f"({reason(e)}); check the name, the connection and, for a gated model, `hf auth "
                "login`"
            ) from e
        self.directory = Path(snapshot)
        self.revision = self.directory.name  # snapshots are named by commit
        # files of another commit may have the same names
        self.cache = cache / self.revision if cache is not None else None
        try:
            info = HfApi().model_info(repo, revision=self.revision, files_metadata=True)
            self.sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        except FAILURES:  # offline: what is here must do
            self.sizes = {p.name: p.stat().st_size for p in self.directory.iterdir() if p.is_file()}

    def files(self) -> list[str]:
        """Names of all files at the top level."""
        return [f for f in self.sizes if "/" not in f]

    def cached(self, file: str) -> Path | None:
        """The file's path if it is on this machine."""
        if self.cache is not None and (self.cache / file).is_file():
            return self.cache / file
        found = try_to_load_from_cache(self.repo, file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: str) -> Path:
        """The file's path, downloaded if needed.

        Raises:
            SourceError: the download failed.
        """
        coming = self._coming.pop(file, None)
        if coming is not None:
            coming.join()  # if it failed, the download below tries again and says why
        local = self.cached(file)
        if local is not None:
            return local
        try:
            return self._download(file)
        except FAILURES as e:
            raise SourceError(
                f"{file} of {self.repo!r} cannot be downloaded ({reason(e)}); run again to continue"
            ) from e

    def fetch_later(self, file: str) -> None:
        """Download in the background, one file at a time; a failure shows when it is fetched."""
        if file not in self._coming:
            # a daemon: an interrupted run does not wait for gigabytes that nobody will read
            self._coming[file] = threading.Thread(target=self._try, args=(file,), daemon=True)
            self._coming[file].start()

    def drop(self, file: str) -> None:
        """Delete a file from this run's own cache directory."""
        coming = self._coming.pop(file, None)
        if coming is not None:
            coming.join()
        if self.cache is not None:
            (self.cache / file).unlink(missing_ok=True)

    def _try(self, file: str) -> None:
        with self._one_download, contextlib.suppress(*FAILURES):
            self._download(file)

    @contextlib.contextmanager
    def _alone(self, file: str) -> Iterator[None]:
        """Of two threads or processes that want a file, the second must not replace it under the
        reads of the first. The hub's client sees to that in its own cache alone.
        """
        with self._locks.setdefault(file, threading.Lock()):
            if self.cache is None:
                yield
                return
            self.cache.mkdir(parents=True, exist_ok=True)
            with open(self.cache / f".{file}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    def _download(self, file: str) -> Path:
        with self._alone(file):
            here = self.cached(file)
            if here is not None:
                return here
            path = hf_hub_download(self.repo, file, revision=self.revision, local_dir=self.cache)
            return Path(path)


class HubShard(SafetensorsShard):
    """A safetensors file of a repository; downloaded by the first `read`, not by looking at names
    and shapes.
    """

    def __init__(self, repository: Repository, file: str) -> None:
        super().__init__(Path(file))
        self.name = f"{repository.repo}/{file}"
        self.file = file
        self._repository = repository
        self._remote: Mapping[str, Entry] | None = None

    def path(self) -> Path:
        return self._repository.fetch(self.file)

    @property
    def size(self) -> int:
        return self._repository.sizes.get(self.file) or super().size

    @property
    def entries(self) -> Mapping[str, Entry]:
        if self._entries is not None or self._repository.cached(self.file) is not None:
            return super().entries
        if self._remote is None:
            r = self._repository
            try:
                meta = HfApi().parse_safetensors_file_metadata(
                    r.repo, self.file, revision=r.revision
                )
            except (*FAILURES, NotASafetensorsRepoError, SafetensorsParsingError) as e:
                raise SourceError(
                    f"the header of {self.name} cannot be read ({reason(e)}); run again to continue"
                ) from e
            header = {
                k: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
                for k, t in meta.tensors.items()
            }
            data = max((t.data_offsets[1] for t in meta.tensors.values()), default=0)
            self._remote = check_header(header, data, self.name, SourceError)
        return self._remote

    def read(self, tensor: str, selection: Selection = ...) -> Tensor:
        if self._entries is None:
            self._load()  # downloads, and reads the header of what came
        return super().read(tensor, selection)

    def prefetch(self, tensor: str) -> None:
        if self._repository.cached(self.file) is None:
            self._repository.fetch_later(self.file)

    def digest(self) -> bytes:
        """The commit names the content, so nothing needs to be downloaded."""
        return hashlib.sha256(f"{self.name}@{self._repository.revision}".encode()).digest()

    @property
    def temporary(self) -> bool:
        """Whether the file, once downloaded, lies in this run's own cache directory."""
        return self._repository.cache is not None

    def forget(self) -> None:
        """Look at the file anew at the next read: another process may have downloaded it again."""
        if self._entries is not None:
            self._remote, self._entries = self._entries, None

    def discard(self) -> None:
        """Delete the downloaded file if it lies in this run's own cache directory."""
        if self.temporary:
            self.forget()
            self._repository.drop(self.file)
