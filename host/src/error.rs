//! One error type for everything that can be wrong with a call.

use crate::dtype::DType;
use thiserror::Error;

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Nothing was launched and nothing was written, but after [`Error::Driver`] and
/// `Error::KernelFault`: these are found while the call is under way, and part of it may have been done.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that must be at least one is zero.
    #[error("{what} is 0, expected at least 1")]
    ZeroSize {
        /// Name of the size, as in [`crate::ProjectionSizes`].
        what: &'static str,
    },
    /// A size is over what the operator supports.
    #[error("{what} is {got}, expected at most {limit}")]
    SizeTooLarge {
        /// Name of the size.
        what: &'static str,
        /// Largest value supported.
        limit: usize,
        /// Value given.
        got: usize,
    },
    /// A size is under what the operator supports.
    #[error("{what} is {got}, expected at least {limit}")]
    SizeTooSmall {
        /// Name of the size.
        what: &'static str,
        /// Smallest value supported.
        limit: usize,
        /// Value given.
        got: usize,
    },
    /// The sizes of a tensor multiply to more elements than can be addressed.
    #[error("{tensor} of {shape} has more elements than can be addressed")]
    SizeOverflow {
        /// Name of the tensor, as in the operator's contract.
        tensor: &'static str,
        /// Its shape, written out.
        shape: String,
    },
    /// A size is no multiple of what it must be one of.
    #[error("{what} is {got}, expected a multiple of {of}")]
    NotMultiple {
        /// Name of the size.
        what: &'static str,
        /// What it must be a multiple of.
        of: usize,
        /// Value given.
        got: usize,
    },
    /// A number is infinite or none.
    #[error("{what} is {got}, expected a finite number")]
    NotFinite {
        /// Name of the number.
        what: &'static str,
        /// Value given.
        got: String,
    },
    /// A list of per-slice tensors has the wrong length.
    #[error("{tensor} has {got} slices, expected {expected}")]
    SliceCount {
        /// `a` or `b`.
        tensor: &'static str,
        /// The projection's slices.
        expected: usize,
        /// Tensors given.
        got: usize,
    },
    /// A buffer holds fewer elements than its shape says.
    #[error("{tensor} holds {got} elements, expected at least {expected} for {shape}")]
    TooShort {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape, written out.
        shape: String,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// Rows overlap: the stride between them is less than their width.
    #[error("{tensor} has a row stride of {got} elements, expected at least {expected}")]
    RowStride {
        /// `x` or `out`.
        tensor: &'static str,
        /// Width of a row.
        expected: usize,
        /// Stride given.
        got: usize,
    },
    /// A pointer is null although its tensor has elements.
    #[error("{tensor} is a null pointer, expected {expected} elements")]
    NullPointer {
        /// Name of the tensor.
        tensor: &'static str,
        /// Elements needed.
        expected: usize,
    },
    /// A pointer is not aligned to its element.
    #[error("{tensor} at {address:#x} is not aligned to its {expected}-byte elements")]
    Misaligned {
        /// Name of the tensor.
        tensor: &'static str,
        /// Alignment needed, in bytes.
        expected: usize,
        /// Address given.
        address: u64,
    },
    /// The weights of an adapter by address do not begin on the boundary that kernels load them by.
    #[error("{tensor} at {address:#x} is not on a boundary of {expected} bytes")]
    OffBoundary {
        /// `a` or `b`.
        tensor: &'static str,
        /// The boundary, in bytes.
        expected: usize,
        /// Address given.
        address: u64,
    },
    /// A table of adapters was made for a projection whose matrices are of other sizes.
    #[error("the adapters are of {table}, this call is of {call}")]
    OtherTable {
        /// Sizes of the table's matrices.
        table: String,
        /// Sizes of the call's.
        call: String,
    },
    /// Slices of different widths cannot be interleaved column by column.
    #[error("interleaved slices have the widths {out_dims}, expected one width")]
    UnequalSlices {
        /// The widths.
        out_dims: String,
    },
    /// `topk_ids` is left out where tokens choose among experts.
    #[error(
        "topk_ids may be left out of a dense layer alone (E = 1, k = 1), this one has E = {experts}, \
         k = {top_k}"
    )]
    NoTopkIds {
        /// E.
        experts: usize,
        /// k.
        top_k: usize,
    },
    /// `expert_map` is given where there is no `topk_ids`.
    #[error("expert_map has nothing to map, as topk_ids is left out")]
    NothingToMap,
    /// The tensors are of another type than the projection was made for.
    #[error("{tensor} is {got}, expected {expected}")]
    DTypeMismatch {
        /// Name of the tensor.
        tensor: &'static str,
        /// Type of the projection.
        expected: DType,
        /// Type of the call.
        got: DType,
    },
    /// A type that the operator does not exist for (from a file or a foreign caller).
    #[error("{tensor} is {got}, expected {expected}")]
    UnsupportedDType {
        /// Name of the tensor.
        tensor: String,
        /// Types that would do.
        expected: &'static str,
        /// Type found.
        got: String,
    },
    /// A slot's rank is over the rank that the stacked weights are allocated for.
    #[error("ranks[{slot}] is {rank}, expected at most max_rank = {max_rank}")]
    RankTooLarge {
        /// The adapter slot.
        slot: usize,
        /// Its rank.
        rank: i32,
        /// The projection's `max_rank`.
        max_rank: usize,
    },
    /// The call is larger than the workspace was made for.
    #[error("workspace has room for {what} = {limit}, this call needs {got}")]
    WorkspaceTooSmall {
        /// What ran out.
        what: &'static str,
        /// What the workspace was made for.
        limit: usize,
        /// What the call needs.
        got: usize,
    },
    /// The [`Route`](crate::Route) that a call was to be made on is not valid, or not for this call.
    #[error("the route is not valid: {reason}")]
    StaleRoute {
        /// Why not.
        reason: String,
    },
    /// A call on a route says of its routing what belongs to the call that finds it.
    #[error(
        "{what} belongs to the call that finds the route, and this call is made on a route that was found"
    )]
    PartOfRoute {
        /// What was said.
        what: &'static str,
    },
    /// Memory or a workspace of another device than the call runs on.
    #[error("{what} is on {got}, expected {expected}")]
    OtherDevice {
        /// The tensor, or `workspace`.
        what: &'static str,
        /// The device that the call runs on.
        expected: String,
        /// The device that it is on.
        got: String,
    },
    /// The driver library is not there, or there is no device.
    #[error("no CUDA device: {reason}")]
    NoDevice {
        /// What the driver said.
        reason: String,
    },
    /// The device is too old, or no embedded module fits it.
    #[error("device {device} has compute capability {capability}, the kernels need at least {needed}")]
    UnsupportedDevice {
        /// Name of the device.
        device: String,
        /// Its compute capability, for example "7.5".
        capability: String,
        /// The least that is supported.
        needed: &'static str,
    },
    /// A file of tuned calls cannot be read or written, is of another format, or was measured with other
    /// kernels.
    #[error("{path}: {reason}")]
    Tuning {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of tuned calls was measured on another kind of device.
    #[error("the tuning is of {tuned}, the device is {device}: make one with `moe-lora tune`")]
    TunedElsewhere {
        /// Name of the device that it was measured on.
        tuned: String,
        /// Name of this device.
        device: String,
    },
    /// An emulated kernel did what no kernel may. It is found while the call runs: what it had written by
    /// then stays.
    #[cfg(feature = "emulate")]
    #[error("fault of a kernel: {report}")]
    KernelFault {
        /// Kernel, block, thread, line, and what was wrong.
        report: String,
    },
    /// A function of the CUDA driver failed. Launches that came before it in the call are queued.
    #[error("{call} failed: {name} ({code}): {reason}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The value of the `CUresult`.
        code: u32,
        /// Its name, `CUDA_ERROR_OUT_OF_MEMORY` for example.
        name: String,
        /// What the driver says of it.
        reason: String,
    },
    /// What cannot be part of a graph was asked of a stream while one is recorded there.
    #[error("{what} cannot be part of a graph: do it before or after the recording")]
    NotRecordable {
        /// What was asked for.
        what: &'static str,
    },
    /// The driver is older than the kernels need.
    #[error("the driver is for CUDA {version}, expected CUDA {needed} or newer: update the NVIDIA driver")]
    DriverTooOld {
        /// The newest CUDA version that it knows.
        version: String,
        /// The oldest that will do.
        needed: &'static str,
    },
}
