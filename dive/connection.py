"""Whether the Hugging Face hub can be reached, known in seconds."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

CONNECT_SECONDS = 3.0
"""Longest wait for the hub before the cache is asked; ``huggingface_hub`` itself retries for many seconds."""


@cache
def hub_answers() -> bool:
    """Whether the hub can be reached; asked once, and taken for granted behind a proxy."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if {"all", "http", "https"} & set(getproxies()):
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
