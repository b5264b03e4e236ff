"""What a message takes from an error of the system or of a package. Nothing but Python is needed here."""

from __future__ import annotations

from pathlib import Path


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text without its full stop, or the name of its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def cannot_write(folder: Path, error: OSError) -> OSError:
    """Return an error of the same kind and cause that names the folder, and says what to do."""
    said = type(error)(
        f"{folder}: cannot write there ({error.strerror}); let its owner do it, get the right to, or work on a "
        "copy of it."
    )
    said.strerror = error.strerror  # for callers with words of their own
    return said
