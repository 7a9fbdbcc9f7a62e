"""Which commit the code is of."""

import os
import subprocess
from pathlib import Path

DIRTY = "-dirty"
# Tracked, but no code: lineage holds the settings in their own right, and `dvc repro` writes dvc.lock as it goes.
_NO_CODE = (":(top,exclude,glob)**/params.yaml", ":(top,exclude,glob)**/dvc.lock")


def git_commit(place: Path | None = None) -> str | None:
    """The commit of the code at `place` (this file's folder), with `-dirty` behind it where a tracked file has changed since.

    In an image, which has no repository, what it was built from ($LONGTRAIL_COMMIT). None where neither is known.
    """
    built = os.environ.get("LONGTRAIL_COMMIT", "unknown")
    if built != "unknown":
        return built
    place = place or Path(__file__).parent
    commit = _git(place, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(place, "status", "--porcelain", "--untracked-files=no", "--", ":/", *_NO_CODE)
    return commit if changed == "" else f"{commit}{DIRTY}"


def short_commit(commit: str) -> str:
    """Its first 12 digits, and the mark where it has one."""
    return commit.removesuffix(DIRTY)[:12] + (DIRTY if commit.endswith(DIRTY) else "")


def _git(place: Path, *arguments: str) -> str | None:
    """What git answers; None where it fails or is not there."""
    command = ["git", "--no-optional-locks", *arguments]  # reading must not write an index that another process may be writing
    try:
        return subprocess.run(command, cwd=place, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
