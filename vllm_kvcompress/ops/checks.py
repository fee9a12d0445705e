"""Argument checks that every op shares."""

from __future__ import annotations


def check(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_backend(backend: str, *names: str) -> str:
    """The backend's name, if it is 'reference' or one of `names`.

    Raises:
        ValueError: if not.
    """
    known = (*names, "reference")
    check(backend in known, f"unknown ops backend {backend!r}; known: {', '.join(known)}")
    return backend
