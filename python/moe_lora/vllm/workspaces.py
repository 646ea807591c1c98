"""Scratch memory of the calls that vLLM makes, made once for each stream.

vLLM measures how much memory a step of the most tokens takes before it gives the rest to its KV cache. The
first call on a stream makes a workspace for that many, so that nothing grows while it serves.
"""

import torch

from moe_lora import Workspace


class Room:
    """The workspace of a stream's calls on layers of one kind, and whose route it keeps."""

    def __init__(self, workspace: Workspace, tokens: int) -> None:
        self.workspace = workspace
        self.tokens = tokens
        #: What was made when the route was: who still has it may use the route.
        self.route: object | None = None


_ROOMS: dict[tuple[int, ...], Room] = {}
# A graph that was captured with a workspace needs it as long as it is replayed.
_OUTGROWN: list[Workspace] = []


def room(
    device: torch.device,
    tokens: int,
    most_tokens: int,
    *,
    top_k: int,
    experts: int,
    slots: int,
    rank: int,
    slices: int,
) -> Room:
    """The workspace of the current stream for layers of these sizes; for ``most_tokens`` when it is made."""
    index = device.index or 0
    key = (index, torch.cuda.current_stream(device).cuda_stream, top_k, experts, slots, rank, slices)
    found = _ROOMS.get(key)
    if found is None or found.tokens < tokens:
        # A graph is captured for few tokens, on a stream of its own.
        capturing = torch.cuda.is_current_stream_capturing()
        most = 1 << (tokens - 1).bit_length() if capturing else max(tokens, most_tokens)
        workspace = Workspace(
            most, top_k=top_k, experts=experts, slots=slots, max_rank=rank, slices=slices, device=index
        )
        if found is not None:
            _OUTGROWN.append(found.workspace)
        found = _ROOMS[key] = Room(workspace, most)
    return found


def nbytes() -> int:
    """Bytes of device memory of all workspaces of this process."""
    kept = [room.workspace for room in _ROOMS.values()]
    return sum(workspace.nbytes for workspace in kept + _OUTGROWN)
