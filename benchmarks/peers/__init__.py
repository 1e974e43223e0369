"""The peers: other implementations that ours is measured against, one small file each.

A peer is used where it is installed and the device is one that it runs on, and is listed with the
reason where not. What it computes is checked as ours is: wrong output gets no time.
"""

from __future__ import annotations

from benchmarks.peers import (
    cudnn_frontend,
    fastvideo,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    flashinfer,
    flex,
    natten,
    sage,
    sdpa,
    sorting,
)
from benchmarks.peers.peer import Peer

PEERS: tuple[Peer, ...] = (
    *sdpa.PEERS,
    *flash_attention_2.PEERS,
    *flash_attention_3.PEERS,
    *flash_attention_4.PEERS,
    *flex.PEERS,
    *sorting.PEERS,
    *fastvideo.PEERS,
    *cudnn_frontend.PEERS,
    *flashinfer.PEERS,
    *sage.PEERS,
    *natten.PEERS,
)
NAMES = [peer.name for peer in PEERS]


def chosen(names: list[str] | None) -> list[Peer]:
    """The peers of these names; all of them for None.

    Raises:
        ValueError: If a name is that of no peer.
    """
    if names is None:
        return list(PEERS)
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(
            f"--peers {', '.join(unknown)} are unknown: give some of {', '.join(NAMES)}"
        )
    return [peer for peer in PEERS if peer.name in names]
