"""Numbers of what a cache is asked for: a block, or a block in another form than the first.

A cache of one form is asked for blocks, by their numbers. A cache of several (`longtake.offload.forms`) is asked for
pages: page 0..n of the first form are the blocks themselves.
"""

from __future__ import annotations

_STRIDE = 1 << 40


def page(form: int, block: int) -> int:
    """The number of a block in a form."""
    return form * _STRIDE + block


def form_and_block(number: int) -> tuple[int, int]:
    """Undo :func:`page`."""
    return divmod(number, _STRIDE)
