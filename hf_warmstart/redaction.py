"""Tokens and signed addresses stay out of everything that is shown, written or sent: messages, logs, records, cards, files.

A message may quote what somebody typed, a server's own words or an address, and each of them can hold a token. Every
`WarmstartError` and everything that the command line says goes through `redact`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# As the Hub makes them (`hf_...`, and `api_org_...` of organisations), and the part of an address that signs it.
TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}\b")
SIGNED = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]*")
LOGGED_IN = re.compile(r"(https?://)[^\s/@'\"<>]+@")
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HIDDEN = "<token>"
SHORTEST = 8  # a shorter one could be any word
# Names under which recipes and arguments hold one.
TOKEN_NAME = re.compile(r"(?:.*_)?(?:token|password|secret|api_key)", re.IGNORECASE)


def redact(words: object) -> str:
    """Words without tokens, names and passwords in addresses, and what signs an address.

    Args:
        words: a text, or an error.

    Returns:
        The text. What stands for a token: anything of the form of one, and the token that is in use, whatever its form.

    Example:

        >>> redact("GET https://host/file?Signature=abc with hf_" + "a" * 30)
        'GET https://host/file with <token>'
    """
    text = SIGNED.sub(r"\1", LOGGED_IN.sub(r"\1", str(words)))
    for own in _own_tokens():
        text = text.replace(own, HIDDEN)
    return TOKEN.sub(HIDDEN, text)


def redacted(error: BaseException) -> BaseException:
    """An error in whose message, and in those of its causes, nothing stands that `redact` takes out; changed in place.

    For `raise ... from`: a traceback prints the whole chain.
    """
    seen: BaseException | None = error
    while seen is not None:
        seen.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in seen.args)
        seen = seen.__cause__ or seen.__context__
    return error


def _own_tokens() -> Iterator[str]:
    """The tokens that this process would use: of the environment, and of the file that a login wrote."""
    for name in TOKEN_VARIABLES:
        own = os.environ.get(name, "").strip()
        if len(own) >= SHORTEST:
            yield own
    hub = sys.modules.get("huggingface_hub")  # where nobody imported it, nobody used its token
    own = (hub.get_token() if hub is not None else None) or ""
    if len(own) >= SHORTEST:
        yield own


def token_places(data: Any, path: str = "") -> list[str]:
    """Where plain data hold a token: by an entry's name, or by the form of its text.

    Example:

        >>> token_places({"push": {"token": "abc"}, "note": ["hf_" + "a" * 30], "max_tokens": 5})
        ['note[0]', 'push.token']
    """
    found = []
    if isinstance(data, Mapping):
        for name, value in data.items():
            place = f"{path}.{name}" if path else str(name)
            if isinstance(value, str) and TOKEN_NAME.fullmatch(str(name)):
                found.append(place)
            else:
                found += token_places(value, place)
    elif isinstance(data, (list, tuple)):
        for k, value in enumerate(data):
            found += token_places(value, f"{path}[{k}]")
    elif isinstance(data, str) and redact(data) != data and HIDDEN in redact(data):
        found.append(path)
    return sorted(found)


class UnsavedToken(str):
    """A token that works as one and is not saved with what holds it: pickled, it is None; shown, it is hidden."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(None), ()

    def __copy__(self) -> UnsavedToken:
        return self

    def __deepcopy__(self, memo: dict) -> UnsavedToken:
        return self

    def __repr__(self) -> str:
        return repr(HIDDEN)
