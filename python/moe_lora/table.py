"""Adapters by address: a table of each slot's own weights, which may be exchanged between two calls.

Importing this module does not import PyTorch. Making a table does.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_lora import _native

if TYPE_CHECKING:
    import torch

# An entry: rank, the rank that the matrices are allocated for, scaling, 0, address of a, address of b.
_ENTRY = struct.Struct("<iIfIQQ")
# What kernels load by: rows of b begin on 16-byte boundaries, and matrices too.
_RANK_MULTIPLE, _BOUNDARY = 8, 16


def _shape(sizes: Sequence[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


class AdapterTable(_native.Table):
    """A table of adapters in device memory, for ``table=`` of ``forward``, ``shrink`` and ``expand``.

    Each slot and slice has tensors of its own, with a rank and a scaling of its own. ``set`` and ``remove``
    exchange an adapter between two calls, or between two replays of a graph that has captured a call on the
    table. They queue a copy on PyTorch's current stream and wait for nothing.

    - Work that reads the table on another stream is ordered by the caller, as for any tensor that is
      written: the current stream waits for calls before ``set``, and calls after it wait for the current
      stream.
    - The table keeps the tensors that it names. PyTorch's allocator does not use those that were replaced
      again until the work has ended that the current stream had queued by then. Memory that is not
      PyTorch's own is the caller's to keep as long.
    - They must not be written while a call reads them.
    - A graph that has captured a call on the table needs the table for as long as it is replayed. Work on
      streams other than those that the tensors were allocated on must have ended when the table is freed.

    :param slots: L.
    :param out_dims: N of each slice.
    :param in_dim: K.
    :param experts: E; 1 for a dense layer.
    :param dtype: ``torch.bfloat16`` or ``torch.float16``, or its name.
    :param device: where the table and all it names are.
    :param max_rank: R, the largest rank that an adapter may use.
    :param shared_a: all experts of a slot share one ``a``.
    :param shared_b: all experts of a slot share one ``b``.
    """

    slots: int
    out_dims: tuple[int, ...]
    in_dim: int
    experts: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    #: ``[slots, S, 32]`` uint8.
    entries: torch.Tensor
    _experts_of: dict[str, int]
    _kept: list[list[torch.Tensor]]

    def __new__(
        cls,
        slots: int,
        *,
        out_dims: Sequence[int],
        in_dim: int,
        experts: int = 1,
        dtype: torch.dtype | str = "bfloat16",
        device: torch.device | str | int = "cuda",
        max_rank: int,
        shared_a: bool = False,
        shared_b: bool = False,
    ) -> AdapterTable:
        """Makes a table in which every slot is off."""
        import torch

        name = str(dtype).removeprefix("torch.")
        sizes: dict[str, Any] = {
            "dtype": name,
            "slots": slots,
            "experts": experts,
            "max_rank": max_rank,
            "in_dim": in_dim,
            "out_dims": list(out_dims),
            "shared_a": shared_a,
            "shared_b": shared_b,
        }
        # Checked before there is memory to take.
        _native.Table(None, **sizes)
        # One that was made in inference mode could be written in inference mode alone.
        with torch.inference_mode(False):
            entries = torch.zeros(slots, len(out_dims), _ENTRY.size, dtype=torch.uint8, device=device)
        self = super().__new__(cls, entries, **sizes)
        self.slots, self.out_dims, self.in_dim = slots, tuple(out_dims), in_dim
        self.experts, self.max_rank = experts, max_rank
        self.dtype, self.device, self.entries = getattr(torch, name), entries.device, entries
        self._experts_of = {"a": 1 if shared_a else experts, "b": 1 if shared_b else experts}
        self._kept = [[] for _ in range(slots)]
        return self

    def set(
        self,
        slot: int,
        a: Sequence[torch.Tensor | None] | torch.Tensor,
        b: Sequence[torch.Tensor | None] | torch.Tensor,
        *,
        scaling: float | Sequence[float] = 1.0,
        rank: int | Sequence[int | None] | None = None,
    ) -> None:
        """Puts an adapter into a slot, in the place of what was there.

        Calls that were queued before still use what was there. A tensor is taken as it is when its rank is a
        multiple of 8, it is contiguous and it begins on a 16-byte boundary. Otherwise it is copied, with
        zeros above its rank; what is written to it later does not reach the copy.

        :param slot: 0 to L - 1.
        :param a: S tensors ``[E, r, K]``, ``None`` for a slice that the adapter leaves alone. ``[1, r, K]``
            with ``shared_a``, and ``[r, K]`` where there is one matrix. One tensor alone is one slice.
        :param b: S tensors ``[E, N, r]``, likewise.
        :param scaling: multiplies what a slice adds; one for all slices, or one each.
        :param rank: how much of r is in use; one for all slices, or one each. Left out: r, R at most.
        :raises ValueError: when something does not fit. The table is as before.
        """
        import torch

        slot = self._slot(slot)
        matrices = {"a": self._slices("a", a), "b": self._slices("b", b)}
        scalings, ranks = self._each("scaling", scaling), self._each("rank", rank)
        entries, kept = [], []
        with torch.no_grad():
            for s, (first, second) in enumerate(zip(matrices["a"], matrices["b"], strict=True)):
                if first is None and second is None:
                    entries.append(bytes(_ENTRY.size))
                    continue
                for name, factor, other in (("a", first, "b"), ("b", second, "a")):
                    if factor is None:
                        raise ValueError(f"{name}[{s}]: expected a tensor as {other}[{s}] is, got None")
                first, width = self._matrix("a", s, first, ("r", self.in_dim))
                second, _ = self._matrix("b", s, second, (self.out_dims[s], width))
                used = self._rank(ranks[s], width)
                room = -(-width // _RANK_MULTIPLE) * _RANK_MULTIPLE
                first, second = _placed(first, -2, room), _placed(second, -1, room)
                kept += [first, second]
                entries.append(self._entry(used, room, scalings[s], first, second))
            self._write(slot, b"".join(entries), kept)

    def remove(self, slot: int) -> None:
        """Switches a slot off, and lets its tensors go."""
        self._write(self._slot(slot), bytes(_ENTRY.size * len(self.out_dims)), [])

    def _slot(self, slot: int) -> int:
        slot = operator.index(slot)
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot: expected 0 to {self.slots - 1}, got {slot}")
        return slot

    def _slices(self, name: str, given: Any) -> list[Any]:
        """The tensors of an argument."""
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        if len(listed) != len(self.out_dims):
            raise ValueError(f"{name}: expected {len(self.out_dims)} slices, got {len(listed)}")
        return listed

    def _each(self, name: str, given: Any) -> list[Any]:
        """One value for each slice."""
        if not isinstance(given, (list, tuple)):
            return [given] * len(self.out_dims)
        if len(given) != len(self.out_dims):
            raise ValueError(f"{name}: expected one or {len(self.out_dims)} values, got {len(given)}")
        return list(given)

    def _matrix(
        self, name: str, s: int, tensor: Any, sizes: tuple[int | str, int]
    ) -> tuple[torch.Tensor, int]:
        """An argument's tensor in three dimensions, and the size of its last but one."""
        import torch

        what, experts = f"{name}[{s}]", self._experts_of[name]
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{what}: expected a tensor of PyTorch's, got {type(tensor).__name__}")
        if tensor.dtype != self.dtype:
            types = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, tensor.dtype)]
            raise ValueError(f"{what}: expected {types[0]}, got {types[1]}")
        if tensor.device != self.device:
            raise ValueError(f"{what}: expected a tensor on {self.device}, got one on {tensor.device}")
        got = list(tensor.shape)
        whole = tensor.detach()
        if whole.dim() == 2 and experts == 1:
            whole = whole.unsqueeze(0)
        if whole.dim() == 3 and experts == 1 and whole.shape[0] == self.experts and whole.stride(0) == 0:
            # One matrix, as `expand` leaves it.
            whole = whole[:1]
        rows, columns = sizes
        fits = whole.dim() == 3 and whole.shape[0] == experts and whole.shape[2] == columns
        if not fits or (rows != "r" and whole.shape[1] != rows):
            raise ValueError(f"{what}: expected shape {_shape((experts, *sizes))}, got shape {_shape(got)}")
        most = -(-self.max_rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
        if rows == "r" and not 0 < whole.shape[1] <= most:
            raise ValueError(f"{what}: expected a rank of 1 to {most}, got shape {_shape(got)}")
        return whole, whole.shape[1]

    def _rank(self, given: Any, width: int) -> int:
        """The rank in use, of `width` that there is."""
        most = min(width, self.max_rank)
        rank = most if given is None else operator.index(given)
        if not 0 <= rank <= most:
            raise ValueError(f"rank: expected 0 to {most}, got {rank}")
        return rank

    def _entry(self, rank: int, room: int, scaling: Any, a: torch.Tensor, b: torch.Tensor) -> bytes:
        try:
            if not math.isfinite(scaling):
                raise OverflowError
            return _ENTRY.pack(rank, room, scaling, 0, a.data_ptr(), b.data_ptr())
        except OverflowError:
            raise ValueError(f"scaling: expected a finite number of 32 bits, got {scaling}") from None

    def _write(self, slot: int, entries: bytes, kept: list[torch.Tensor]) -> None:
        """Replaces a slot's entries in the order of the current stream."""
        import torch

        target = self.entries[slot]
        host = torch.frombuffer(bytearray(entries), dtype=torch.uint8).view_as(target)
        if not target.is_cuda:
            target.copy_(host)
            self._kept[slot] = kept
            return
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "slot: expected to be written outside the capture of a graph, whose replays would write "
                    "it again"
                )
            # From pinned memory nobody waits for the copy, and PyTorch keeps it until the copy is done.
            target.copy_(host.pin_memory(), non_blocking=True)
            stream = torch.cuda.current_stream()
            for tensor in self._kept[slot]:
                tensor.record_stream(stream)
            self._kept[slot] = kept


def _placed(tensor: torch.Tensor, dim: int, room: int) -> torch.Tensor:
    """The tensor itself where kernels can load it, otherwise a copy with `room` ranks."""
    if tensor.shape[dim] == room and tensor.is_contiguous() and tensor.data_ptr() % _BOUNDARY == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = room
    copy = tensor.new_zeros(shape)
    copy.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return copy
