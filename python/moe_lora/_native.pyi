"""The extension module. Its functions are ``moe_lora``'s own.

Sizes, as in the operator's contract: T tokens, k experts chosen a token (P = T·k pairs), E experts whose
adapters this device holds, L adapter slots, R the rank that the weights are allocated for, S slices of the
projection (two for gate and up, one for down), K the width of ``x``, N the width of a slice of ``out``.

Every function raises ``ValueError`` for an argument that does not fit. Nothing was launched or written then.
The message names the tensor, what was expected and what came. ``RuntimeError`` means that there is no device,
or that the driver failed.
"""

from typing import Any, Protocol, final

__version__: str

class _Dlpack(Protocol):
    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

class _CudaArray(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

class _TorchStream(Protocol):
    @property
    def cuda_stream(self) -> int: ...

class _CudaStream(Protocol):
    def __cuda_stream__(self) -> tuple[int, int]: ...

_Tensor = _Dlpack | _CudaArray
_Slices = _Tensor | list[Any] | tuple[Any, ...]
_Stream = int | _TorchStream | _CudaStream

# sorted_token_ids, expert_ids, num_tokens_post_padded, lora_ids, num_active_loras, adapter_enabled,
# block_size.
_Blocks = tuple[_Tensor, _Tensor, _Tensor, _Tensor, int, _Tensor | None, int]

@final
class Workspace:
    """Scratch memory of calls, and the route of the last one.

    It has room for calls of up to ``max_tokens`` tokens on projections of up to these sizes. It does not
    grow: a call that needs more is refused. Calls that name no workspace use one of their device and stream,
    which grows.

    - A call on another stream than the last one's waits for that one's work.
    - The work must have ended when the workspace is freed.
    - A graph that was captured with a workspace needs it as long as the graph is replayed.
    - A route that was found during a capture is valid in that capture alone.

    :param max_tokens: largest T.
    :param top_k: k.
    :param experts: E.
    :param slots: L.
    :param max_rank: R.
    :param slices: largest S.
    :param device: number of the CUDA device.
    """

    def __new__(
        cls,
        max_tokens: int,
        *,
        top_k: int,
        experts: int,
        slots: int,
        max_rank: int,
        slices: int = 2,
        device: int = 0,
    ) -> Workspace: ...
    @property
    def device(self) -> int:
        """Number of the CUDA device."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""

def route(
    topk_ids: _Tensor,
    token_lora: _Tensor,
    *,
    experts: int,
    slots: int,
    max_rank: int,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
) -> None:
    """Sorts the pairs of a layer by slot and expert, and keeps the result, the route, in the workspace.

    Later calls on the same workspace with the same T, k, E, L and R use it: they pass ``None`` for
    ``topk_ids`` and ``token_lora``. Without ``workspace`` it is that of the stream. ``forward``, ``shrink``
    and ``expand`` keep their route too.

    Ids are read on the device. An id that is out of range makes its pairs inactive.

    :param topk_ids: ``[T, k]`` int32, the global experts of each token.
    :param token_lora: ``[T or more]`` int32, the adapter slot of each token, -1 for none.
    :param experts: E.
    :param slots: L.
    :param max_rank: R.
    :param adapter_enabled: ``[L or more]`` int32, uint8 or bool: 0 switches a slot off.
    :param ranks: ``[L or more]`` int32, the rank that each slot uses; more than R counts as R. Left out: R.
    :param expert_map: ``[global experts]`` int32, the local number of each, -1 where another device holds it.
    :param workspace: where the route is kept. Left out: that of the device and stream.
    :param stream: an address, a ``torch.cuda.Stream``, or an object with ``__cuda_stream__``. Left out:
        PyTorch's current stream, or the default stream where PyTorch is not imported.
    """

def forward(
    x: _Tensor,
    a: _Slices,
    b: _Slices,
    topk_ids: _Tensor | None,
    token_lora: _Tensor | None,
    out: _Tensor,
    *,
    topk_weights: _Tensor | None = None,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    mul_routed_weight: bool = False,
    accumulate: bool = True,
    offset: int = 0,
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """Adds the low-rank update of every active pair to ``out``.

    A pair is active when its token has an adapter, whose slot is on, and its expert is on this device.

    :param x: ``[T, K]`` (a row a token: gate and up) or ``[P, K]`` (a row a pair: down), bfloat16 or float16.
        Rows may lie further apart than K.
    :param a: S tensors ``[L, E or 1, R, K]`` of ``x``'s type; one tensor alone is one slice.
    :param b: S tensors ``[L, E or 1, N, R]`` of ``x``'s type.
    :param topk_ids: as for ``route``. ``None``, as ``token_lora`` then is too: the route that the workspace
        keeps.
    :param token_lora: as for ``route``.
    :param out: ``[T, k, ≥ offset + S·N]`` of ``x``'s type. Rows may lie further apart than they are wide.
    :param topk_weights: ``[T, k]`` float32, read with ``mul_routed_weight`` alone.
    :param adapter_enabled: as for ``route``.
    :param ranks: as for ``route``.
    :param expert_map: as for ``route``.
    :param mul_routed_weight: multiply each pair's update by its weight.
    :param accumulate: add to ``out``, leaving inactive pairs as they are; ``False``: overwrite, with zeros
        where a pair is inactive.
    :param offset: first column of ``out`` that is written.
    :param experts: E, needed where neither ``a`` nor ``b`` has it as its second dimension.
    :param workspace: as for ``route``.
    :param stream: as for ``route``.
    :param blocks: pairs sorted by ``align`` or by vLLM's ``moe_lora_align_block_size``, in place of
        ``topk_ids`` and what goes with it. Rows of pairs that they do not name stay as they are.
        ``moe_lora.vllm`` passes them.
    """

def shrink(
    x: _Tensor,
    a: _Slices,
    topk_ids: _Tensor | None,
    token_lora: _Tensor | None,
    h: _Tensor,
    *,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """The first half of ``forward``: ``h = a @ x``, zero for inactive pairs and above a slot's rank.

    For tensor parallelism, where ``h`` is reduced or gathered before ``expand``.

    :param h: ``[S, T, k, R]`` or ``[S, P, R]`` of ``x``'s type, contiguous, written whole. Without
        ``topk_ids`` only the first form will do.
    :param experts: E, needed where ``a`` is shared by all experts.
    """

def expand(
    h: _Tensor,
    b: _Slices,
    topk_ids: _Tensor | None,
    token_lora: _Tensor | None,
    out: _Tensor,
    *,
    topk_weights: _Tensor | None = None,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    mul_routed_weight: bool = False,
    accumulate: bool = True,
    offset: int = 0,
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """The second half of ``forward``: ``out (+)= weight * b @ h``.

    :param h: as ``shrink`` leaves it.
    :param experts: E, needed where ``b`` is shared by all experts.
    """

def align(
    topk_ids: _Tensor,
    token_lora_mapping: _Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: _Tensor,
    expert_ids: _Tensor,
    num_tokens_post_pad: _Tensor,
    adapter_enabled: _Tensor,
    lora_ids: _Tensor,
    expert_map: _Tensor | None = None,
    *,
    stream: _Stream | None = None,
) -> None:
    """Sorts pairs into blocks, as vLLM's ``moe_lora_align_block_size`` does. All tensors are int32.

    :param topk_ids: ``[T, k]``.
    :param token_lora_mapping: ``[T or more]``.
    :param sorted_token_ids: ``max_loras * max_num_tokens_padded`` places, written in the rows of slots in
        use.
    :param expert_ids: ``max_loras * max_num_m_blocks`` places, likewise.
    :param num_tokens_post_pad: ``[max_loras]``, likewise.
    :param adapter_enabled: ``[max_loras or more]``.
    :param lora_ids: the slots in use, -1 for none.
    :param expert_map: as for ``route``.
    """
