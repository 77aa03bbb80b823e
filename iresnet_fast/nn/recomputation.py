"""Forwards that a backward runs again (``torch.utils.checkpoint``): u and v must be those of the forward before."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch

_LOST = (
    "a layer under spectral_norm is recomputed in a backward, but its u and v have changed since its forward, whose "
    "weight is lost: by another training forward, another thread, eval() or settle. Run the backward of each forward "
    "before these; or fuse the model (irf.fuse) if one forward uses the layer several times; or, if an "
    "autograd.Function of your own recomputes it, use torch.utils.checkpoint with use_reentrant=False"
)


def is_recomputing() -> bool:
    """Return true inside a backward: a forward there repeats one that was."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Write(NamedTuple):
    """One time that u and v were written.

    Attributes:
        time: a number that orders the moment among the nodes of autograd's graph.
        grouped: whether the iteration before was one of a grouped update (:func:`iresnet_fast.fuse`).
        thread: that wrote; each counts nodes on its own.
    """

    time: int
    grouped: bool
    thread: int


class Writes:
    """Record when u and v of one layer were written. Copies and pickles start without a record."""

    def __init__(self) -> None:
        # The last two, the latest first; one if another thread wrote before.
        self._writes: tuple[_Write, ...] = ()

    @property
    def grouped(self) -> bool:
        """Whether the last iteration was one of a grouped update."""
        return bool(self._writes) and self._writes[0].grouped

    def note(self, *, grouped: bool) -> None:
        """Record that u and v were written just now."""
        if torch.compiler.is_compiling():
            return
        now = _Write(torch._C._autograd._get_sequence_nr(), grouped, threading.get_ident())
        self._writes = now, *(before for before in self._writes[:1] if before.thread == now.thread)

    def check(self, *, inside: bool, on_cpu: bool) -> None:
        """Raise where u and v were written since the forward that is recomputed in this backward.

        Args:
            inside: whether that forward wrote them inside of what is recomputed, or before it.
            on_cpu: whether the backward runs in the thread that called it, as it does on a CPU.

        Raises:
            RuntimeError: they were written again; the weight of that forward is lost.
        """
        node: Any = torch._C._current_autograd_node()
        if node is None or not self._writes:
            return
        last, *earlier = self._writes
        stale = on_cpu and last.thread != threading.get_ident()
        # The node is part of the recomputed forward. That of a reentrant checkpoint is older than all inside of it.
        if inside and node.name() == "CheckpointFunctionBackward":
            # Of a grouped write and one that is not, the forward may have had either.
            stale |= any(
                node._sequence_nr() < before.time or (before.grouped and not last.grouped) for before in earlier
            )
        else:
            stale |= node._sequence_nr() < last.time
        if stale or (inside and self._is_used_again()):
            raise RuntimeError(_LOST)

    def _is_used_again(self) -> bool:
        """Return true if this recomputation has used the layer before: its forward used it with several u and v."""
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:  # of a checkpoint, each recomputation has hooks of its own
            return False
        users = _users.setdefault(hooks[0], weakref.WeakSet())
        again = self in users
        users.add(self)
        return again

    def __reduce__(self) -> tuple[type[Writes], tuple[()]]:
        return Writes, ()


# What the recomputation of each checkpoint has used, by the hooks that it runs under.
_users: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Writes]] = weakref.WeakKeyDictionary()
