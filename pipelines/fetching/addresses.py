"""Which addresses are of the open internet, and which others a user allows."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The translated (RFC 6052) and the mapped form of an IPv4 address: it is the inner address that is reached.
_TRANSLATED: Final = ipaddress.ip_network("64:ff9b::/96")
_UNICAST: Final = ipaddress.ip_network("2000::/3")
# Not every Python counts these out: protocol assignments (RFC 6890, 2928), 6to4 and its relays, which lead to
# an IPv4 address that is not looked at (RFC 3056, 3068), and documentation (RFC 9637).
_SPECIAL: Final[tuple[Network, ...]] = (
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("192.88.99.0/24"),
    ipaddress.ip_network("2001::/23"),
    ipaddress.ip_network("2002::/16"),
    ipaddress.ip_network("3fff::/20"),
)


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks such as 10.20.0.0/16 or single addresses.

    Raises:
        ValueError: for one that is not written so.
    """
    return tuple(ipaddress.ip_network(text) for text in texts)


def may_connect(address: Address, *, allowed: Sequence[Network] = ()) -> bool:
    """Whether the address is global unicast, or in a network that is allowed."""
    inner = _inner(address)
    if any(inner in network for network in allowed):
        return True
    if inner.version == 6 and inner not in _UNICAST:
        return False
    if any(inner in network for network in _SPECIAL):
        return False
    return inner.is_global and not (inner.is_multicast or inner.is_reserved)


def _inner(address: Address) -> Address:
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _TRANSLATED:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address
