"""The extension module. Its functions are ``moe_lora``'s own.

Sizes, as in the operator's contract: T tokens, k experts chosen a token (P = T·k pairs), E experts whose
adapters this device holds, L adapter slots, R the rank that the weights are allocated for, S slices of the
projection (two for gate and up, one for down, three for q, k and v), K the width of ``x``, N the width of a
slice of ``out``, which each slice may have of its own.

A *dense* layer has one expert, which is no choice: E = 1 and k = 1. It is called with ``topk_ids=None`` and
``token_lora``. Its tensors may leave the experts' dimension of ``a`` and ``b`` and the k of ``out`` out.

Every function raises ``ValueError`` for an argument that does not fit. Nothing was launched or written then.
The message names the tensor, what was expected and what came. ``RuntimeError`` means that there is no device,
or that the driver failed.
"""

from typing import Any, Literal, Protocol, final

from typing_extensions import Self

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
_Order = Literal["in_order", "reversed", "interleaved"]
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

class Table:
    """What calls read of a ``moe_lora.AdapterTable``: its entries, and the sizes of its adapters."""

    def __new__(
        cls,
        entries: object,
        *,
        dtype: str,
        slots: int,
        experts: int,
        max_rank: int,
        in_dim: int,
        out_dims: list[int],
        shared_a: bool = False,
        shared_b: bool = False,
    ) -> Self: ...

def route(
    topk_ids: _Tensor | None,
    token_lora: _Tensor,
    *,
    experts: int,
    slots: int,
    max_rank: int,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    tokens: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
) -> None:
    """Sorts the pairs of a layer by slot and expert, and keeps the result, the route, in the workspace.

    Later calls on the same workspace with the same T, k, E, L and R use it: they pass ``None`` for
    ``topk_ids`` and ``token_lora``. Without ``workspace`` it is that of the stream. ``forward``, ``shrink``
    and ``expand`` keep their route too.

    Ids are read on the device. An id that is out of range makes its pairs inactive.

    :param topk_ids: ``[T, k]`` int32 or int64, the global experts of each token. ``None`` of a dense layer.
    :param token_lora: ``[T or more]`` int32, the adapter slot of each token, -1 for none.
    :param experts: E.
    :param slots: L.
    :param max_rank: R.
    :param adapter_enabled: ``[L or more]`` int32, uint8 or bool: 0 switches a slot off.
    :param ranks: ``[L or more]`` int32, the rank that each slot uses; more than R counts as R. Left out: R.
    :param expert_map: ``[global experts]`` int32, the local number of each, -1 where another device holds it.
    :param tokens: T of a dense layer. Left out: as many as ``token_lora`` has elements.
    :param workspace: where the route is kept. Left out: that of the device and stream.
    :param stream: an address, a ``torch.cuda.Stream``, or an object with ``__cuda_stream__``. Left out:
        PyTorch's current stream, or the default stream where PyTorch is not imported.
    """

def forward(
    x: _Tensor,
    a: _Slices | None = None,
    b: _Slices | None = None,
    topk_ids: _Tensor | None = None,
    token_lora: _Tensor | None = None,
    out: _Tensor | None = None,
    *,
    table: Table | None = None,
    topk_weights: _Tensor | None = None,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    x_index: _Tensor | None = None,
    out_index: _Tensor | None = None,
    mul_routed_weight: bool = False,
    accumulate: bool = True,
    offset: int = 0,
    order: _Order = "in_order",
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """Adds the low-rank update of every active pair to ``out``.

    A pair is active when its token has an adapter, whose slot is on, and its expert is on this device.

    :param x: ``[T, K]`` (a row a token: gate and up) or ``[P, K]`` (a row a pair: down), bfloat16 or float16.
        Rows may lie further apart than K.
    :param a: S tensors ``[L, E or 1, R, K]`` of ``x``'s type; one tensor alone is one slice. Of a dense layer
        ``[L, R, K]`` too. A stride of 0 in the experts' dimension (PyTorch's ``expand``) is one matrix for
        all experts, as is a size of 1.
    :param b: S tensors ``[L, E or 1, N, R]`` of ``x``'s type, each of an N of its own; otherwise as ``a``.
    :param topk_ids: as for ``route``. ``None`` with ``token_lora``: a dense layer. ``None`` without it: the
        route that the workspace keeps.
    :param token_lora: as for ``route``.
    :param out: ``[T, k, ≥ offset + Σ N]`` of ``x``'s type; without ``topk_ids`` ``[T, ≥ offset + Σ N]`` too,
        for k = 1. Rows may lie further apart than they are wide. It must be given.
    :param table: an ``AdapterTable``, in place of ``a`` and ``b``.
    :param topk_weights: ``[T, k]`` float32, read with ``mul_routed_weight`` alone.
    :param adapter_enabled: as for ``route``.
    :param ranks: as for ``route``.
    :param expert_map: as for ``route``.
    :param x_index: ``[P]`` or ``[T, k]`` int32, the row of ``x`` of each pair; ``x`` then has any number of
        rows. A pair whose row is not there is inactive.
    :param out_index: the row of ``out`` of each pair, likewise; ``out`` is then ``[rows, ≥ offset + Σ N]``.
        A pair whose row is not there writes nothing. No two pairs may have one row. On the route that the
        workspace keeps, and with ``blocks``, it must be ``[T, k]``.
    :param mul_routed_weight: multiply each pair's update by its weight.
    :param accumulate: add to ``out``, leaving inactive pairs as they are; ``False``: overwrite, with zeros
        where a pair is inactive.
    :param offset: first column of ``out`` that is written.
    :param order: where the columns of the slices are: one slice behind another (``in_order``), from the last
        slice to the first (``reversed``: up before gate), or column by column (``interleaved``: column n of
        slice s at S·n + s, for slices of one width).
    :param experts: E, needed where neither ``a`` nor ``b`` has it as its second dimension. A table has it.
    :param workspace: as for ``route``.
    :param stream: as for ``route``.
    :param blocks: pairs sorted by ``align`` or by vLLM's ``moe_lora_align_block_size``, in place of
        ``topk_ids`` and what goes with it. Rows of pairs that they do not name stay as they are.
        ``moe_lora.vllm`` passes them.
    """

def shrink(
    x: _Tensor,
    a: _Slices | None = None,
    topk_ids: _Tensor | None = None,
    token_lora: _Tensor | None = None,
    h: _Tensor | None = None,
    *,
    table: Table | None = None,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    x_index: _Tensor | None = None,
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """The first half of ``forward``: ``h = a @ x``, zero for inactive pairs and above a slot's rank.

    For tensor parallelism, where ``h`` is reduced or gathered before ``expand``.

    What is not said here is as for ``forward``.

    :param table: in place of ``a``. Scalings are ``expand``'s.
    :param h: ``[S, T, k, R]`` or ``[S, P, R]`` of ``x``'s type, contiguous, written whole; it must be given.
        On the route that the workspace keeps, and with ``blocks``, only the first form will do.
    :param experts: E, needed where ``a`` is shared by all experts.
    """

def expand(
    h: _Tensor,
    b: _Slices | None = None,
    topk_ids: _Tensor | None = None,
    token_lora: _Tensor | None = None,
    out: _Tensor | None = None,
    *,
    table: Table | None = None,
    topk_weights: _Tensor | None = None,
    adapter_enabled: _Tensor | None = None,
    ranks: _Tensor | None = None,
    expert_map: _Tensor | None = None,
    out_index: _Tensor | None = None,
    mul_routed_weight: bool = False,
    accumulate: bool = True,
    offset: int = 0,
    order: _Order = "in_order",
    experts: int | None = None,
    workspace: Workspace | None = None,
    stream: _Stream | None = None,
    blocks: _Blocks | None = None,
) -> None:
    """The second half of ``forward``: ``out (+)= weight * b @ h``.

    What is not said here is as for ``forward``.

    :param h: as ``shrink`` leaves it.
    :param table: in place of ``b``.
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
    """Sorts pairs into blocks, as vLLM's ``moe_lora_align_block_size`` does. Tensors are int32.

    :param topk_ids: ``[T, k]``, int32 or int64.
    :param token_lora_mapping: ``[T or more]``.
    :param sorted_token_ids: ``max_loras * max_num_tokens_padded`` places, written in the rows of slots in
        use.
    :param expert_ids: ``max_loras * max_num_m_blocks`` places, likewise.
    :param num_tokens_post_pad: ``[max_loras]``, likewise.
    :param adapter_enabled: ``[max_loras or more]``.
    :param lora_ids: the slots in use, -1 for none.
    :param expert_map: as for ``route``.
    """
