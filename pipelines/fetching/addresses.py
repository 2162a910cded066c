"""Decides which IP addresses may be connected to: the open internet's, and networks that a user allows."""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The prefix of translated IPv4 addresses (RFC 6052).
_TRANSLATED: Final = ipaddress.ip_network("64:ff9b::/96")
_UNICAST: Final = ipaddress.ip_network("2000::/3")


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks such as 10.20.0.0/16, or single addresses.

    Raises:
        ValueError: for a text that is neither.
    """
    return tuple(ipaddress.ip_network(text) for text in texts)


# Ranges that not every Python version excludes from `is_global`: protocol assignments (RFC 6890, 2928), 6to4
# and its relays, which embed an IPv4 address that would go unchecked (RFC 3056, 3068), and documentation
# (RFC 9637).
_SPECIAL: Final = parse_networks(["192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20"])


def may_connect(address: Address, *, allowed: Sequence[Network] = ()) -> bool:
    """Whether the address is global unicast, or in an allowed network."""
    inner = _inner(address)
    if any(inner in network for network in allowed):
        return True
    if (inner.version == 6 and inner not in _UNICAST) or any(inner in network for network in _SPECIAL):
        return False
    return inner.is_global and not (inner.is_multicast or inner.is_reserved)


def _inner(address: Address) -> Address:
    """The IPv4 address that a mapped or translated IPv6 address reaches."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _TRANSLATED:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address
