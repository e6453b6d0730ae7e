"""The command line that the recipes share: names, --check, --path."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager

from undiffuse.types import InputError


def given(
    about: str | None, known: Iterable[str], check: str, path: str
) -> tuple[argparse.Namespace, Callable[[], AbstractContextManager[None]]]:
    """What was asked for, `names` being all where none was given, and a context that ends in one line for mistakes."""
    known = list(known)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}; all if none is given")
    parser.add_argument("--check", action="store_true", help=check)
    parser.add_argument("--path", help=f"{path}; with one name")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(known):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if asked.path and len(asked.names) != 1:
        parser.error("--path belongs to one name")
    asked.names = asked.names or known

    @contextmanager
    def mistakes():  # type: ignore[no-untyped-def]
        try:
            yield
        except InputError as error:
            parser.error(str(error))

    return asked, mistakes
