"""Lies and garbage by multicast DNS, packed by hand: false announcements, packets that hurt parsers."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tests.swarm.lab import PORT, Host

GROUP: Final = "224.0.0.251"
MDNS_PORT: Final = 5353
SERVICE: Final = "_mycoswarm._tcp.local"
_PTR, _TXT, _SRV, _A = 12, 16, 33, 1
_IN, _FLUSH = 1, 0x8001
_RESPONSE = 0x8400


def name(text: str) -> bytes:
    """Pack a name."""
    labels = [label.encode() for label in text.rstrip(".").split(".")]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def record(owner: str, kind: int, klass: int, data: bytes, ttl_s: int = 120) -> bytes:
    return name(owner) + struct.pack("!HHIH", kind, klass, ttl_s, len(data)) + data


def announcement(instance: str, ip: str, *, port: int = PORT, txt: Mapping[str, str] | None = None) -> bytes:
    """Pack "such a node is at this address"."""
    owner, target = f"{instance}.{SERVICE}", f"{instance[:60]}.local"
    pairs = [f"{key}={value}".encode() for key, value in (txt or {}).items()]
    text = b"".join(bytes([len(pair)]) + pair for pair in pairs) or b"\0"
    answers = [
        record(SERVICE, _PTR, _IN, name(owner)),
        record(owner, _SRV, _FLUSH, struct.pack("!HHH", 0, 0, port) + name(target)),
        record(owner, _TXT, _FLUSH, text),
        record(target, _A, _FLUSH, socket.inet_aton(ip)),
    ]
    return struct.pack("!HHHHHH", 0, _RESPONSE, 0, len(answers), 0, 0) + b"".join(answers)


def speak(host: Host, packets: Sequence[bytes], *, port: int = MDNS_PORT) -> None:
    """Send packets to everybody on the machine's network."""
    with host.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host.ip))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
    with sock:
        for packet in packets:
            sock.sendto(packet, (GROUP, MDNS_PORT))


def pointer_chain() -> bytes:
    """Return 3 kB in which each name points at the next: deep recursion in a careless parser."""
    head = struct.pack("!HHHHHH", 0, _RESPONSE, 0, 1, 0, 0)
    chain = b"".join(struct.pack("!BcH", 1, b"a", 0xC000 | (12 + 4 * (index + 1))) for index in range(750))
    return head + chain + name("end")


def self_pointer() -> bytes:
    """Return a name that points at itself."""
    return struct.pack("!HHHHHH", 0, 0, 1, 0, 0, 0) + struct.pack("!HHH", 0xC00C, _PTR, _IN)


def garbage(count: int, seed: int) -> list[bytes]:
    """Return malformed packets: noise, lies about counts and lengths, good ones with damage."""
    chance = random.Random(seed)
    good = announcement("node", "10.77.0.99", txt={"id": "a" * 26, "v": "1"})
    packets: list[bytes] = []
    for index in range(count):
        match index % 6:
            case 0:
                packets.append(chance.randbytes(chance.randrange(1, 1400)))
            case 1:
                packets.append(pointer_chain())
            case 2:
                packets.append(self_pointer())
            case 3:
                packets.append(good[: chance.randrange(len(good))])
            case 4:
                damaged = bytearray(good)
                for _ in range(chance.randrange(1, 20)):
                    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
                packets.append(bytes(damaged))
            case _:
                packets.append(struct.pack("!HHHHHH", 0, _RESPONSE, 65535, 65535, 65535, 65535) + good[12:])
    return packets


@contextlib.contextmanager
def flood(host: Host, packets: Sequence[bytes], *, per_second: int = 2000) -> Iterator[list[int]]:
    """Send the packets again and again while the context lasts; yields a list whose length says how many."""
    stop, sent = threading.Event(), [0]

    def run() -> None:
        batch = max(1, per_second // 50)
        start = 0
        while not stop.wait(0.02):
            chosen = [packets[(start + step) % len(packets)] for step in range(batch)]
            speak(host, chosen)
            start += batch
            sent[0] += batch

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()
