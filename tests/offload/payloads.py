"""Payloads of random bytes: storage must not care what they mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque:
    """A codec as far as storage sees one."""

    name: str = "opaque"
    payload_bytes: int = 48
