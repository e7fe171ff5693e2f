"""Addresses that a server of ours listens at, and those that its clients name."""

import ipaddress
import os
import socket
from urllib.parse import urlsplit

from flowtilt.errors import UserError

THIS_MACHINE = "this machine"


def host_of(url: str) -> str:
    """The name or address of a URL's host, `THIS_MACHINE` for all of its own, "" where there is none."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return ""
    return THIS_MACHINE if is_loopback(host) else host


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int, command: str) -> socket.socket:
    """A socket that has its port and does not listen yet, so that nobody waits for what still loads.

    Args:
        port: 0 takes a free one.
        command: what listens, for the message.

    Raises:
        UserError: the port is taken, or there is no such address.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"{command}: --port {port}: ports go up to 65535")
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        if os.name != "nt":  # there it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        if listener:
            listener.close()
        raise taken(host, port, command, error) from None
    return listener


def taken(host: str, port: int, command: str, error: Exception) -> UserError:
    """The error of a port that can't be had."""
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{command}: can't listen on {host} port {port}: {reason}; choose another with --port")


def in_url(host: str) -> str:
    """A host as it stands in a URL; the machine's name for all of its addresses."""
    if host in ("", "0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
