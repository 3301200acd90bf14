"""Addresses such as https://host/name and s3://bucket/name, and the credentials that they must not hold.

A recipe is stored with its run, in its checkpoints and by trackers. So an address in it may refer to credentials, as in
https://${LOGIN}@host/name, but not hold them.
"""

import os
import re

from addp_core.base.errors import UserError

TEMPORARY_STATUS = {408, 425, 429}  # of HTTP, as are those from 500 on; any other error stays what it is
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
VARIABLE = re.compile(r"\$\{(\w+)\}")
# What stands before the @ of a host, and values of a query whose names say that they are secret, as in signed links.
LOGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^/?#\s]*)@")
SECRET_IN_QUERY = re.compile(r"[?&;][^=&\s]*(?:sig|token|secret|passw|credential|key)[^=&\s]*=([^&\s]+)", re.IGNORECASE)
CREDENTIALS_FIX = (
    "the address holds credentials, which would be stored with the run; expected the name of an environment variable "
    "in their place, as in 'https://${LOGIN}@host/train-{00..09}.tar' with LOGIN=user:password"
)


def is_address(text: str) -> bool:
    """Check whether a text begins with a scheme, such as https://."""
    return ADDRESS.match(text) is not None


def refuse_address(text: str, key: str) -> None:
    """Raise UserError with the recipe's key if a text is an address where only a folder or file can be read."""
    if is_address(text):
        raise UserError(
            f"{key}: {text} is an address; expected a path on this machine (only images in .tar shards are read over "
            "the network: for pretraining, classification and FID)"
        )


def has_credentials(text: str) -> bool:
    """Check whether an address in the text holds a user, a password or a token, other than as ${VARIABLE}."""
    found = [*LOGIN.findall(text), *SECRET_IN_QUERY.findall(text)]
    return any(VARIABLE.sub("", secret).strip(":") for secret in found)


def fill_variables(text: str, key: str) -> str:
    """Replace each ${NAME} by the environment's value. Raises UserError with the recipe's key if there is none."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{key}: the environment has no variable {match[1]}, which {text} names; export it")
        return os.environ[match[1]]

    return VARIABLE.sub(value, text)


def without_secrets(text: str) -> str:
    """Return a text of another library without the logins and queries of the addresses in it, for messages."""
    text = re.sub(r"(://)[^/?#\s'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\")]*", r"\1", text)
