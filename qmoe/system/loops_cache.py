"""Where numba keeps compiled loops if it can write neither beside the package nor into the user's
cache: read-only containers, another user's installation, no home. Without a place it would refuse
to define them at all.

Imported with the package, before numba: standard library only.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

_VARIABLE = "NUMBA_CACHE_DIR"


def settle_loops_cache() -> None:
    """Points numba at a private folder for temporary files if its own two places do not serve."""
    if os.environ.get(_VARIABLE) or _writable(Path(__file__).parent) or _writable(_user_cache()):
        return
    try:
        os.environ[_VARIABLE] = _private()
    except OSError:
        return  # nowhere to write: numba says so itself
    numba = sys.modules.get("numba")
    if numba is not None:  # it has read the variable already
        numba.config.CACHE_DIR = os.environ[_VARIABLE]


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches"))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _writable(path: Path) -> bool:
    """Whether a folder can be written, or made."""
    while not path.exists() and path.parent != path:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _private() -> str:
    """A folder that only this user can write, the same in every process: numba loads code from
    it."""
    path = Path(tempfile.gettempdir()) / f"qmoe-loops-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if ours and not found.st_mode & 0o077:
        return str(path)
    return tempfile.mkdtemp(prefix="qmoe-loops-")
