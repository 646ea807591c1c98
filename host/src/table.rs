//! Adapters by address: a table of each slot's own weights, which may be exchanged between two calls.

use crate::backend::{Backend, Buffer};
use crate::check::check_view;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::projection::{OutDims, Projection, ProjectionSizes};
use crate::tensor::{Host, Space, View};
use bytemuck::{Pod, Zeroable};
use std::fmt;

/// A row of a table of adapters: the weights of one slot and slice. All zeros is no adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct AdapterEntry {
    /// Rank in use. At 0 or less the slice contributes nothing.
    pub rank: i32,
    /// r: the rank that both are allocated for. Rows of `b` are as many elements apart.
    pub max_rank: u32,
    /// Multiplies what the slice adds.
    pub scaling: f32,
    /// 0.
    pub reserved: u32,
    /// Address of `[E or 1, r, K]`.
    pub a: u64,
    /// Address of `[E or 1, N_s, r]`.
    pub b: u64,
}

/// An entry is read by kernels: it has their layout.
const _: () = {
    use moe_lora_kernels::params::AdapterEntry as Kernels;
    use std::mem::offset_of;
    assert!(offset_of!(AdapterEntry, rank) == offset_of!(Kernels, rank));
    assert!(offset_of!(AdapterEntry, max_rank) == offset_of!(Kernels, max_rank));
    assert!(offset_of!(AdapterEntry, scaling) == offset_of!(Kernels, scaling));
    assert!(offset_of!(AdapterEntry, a) == offset_of!(Kernels, a));
    assert!(offset_of!(AdapterEntry, b) == offset_of!(Kernels, b));
    assert!(size_of::<AdapterEntry>() == size_of::<Kernels>());
};

impl AdapterEntry {
    /// Rank in use of a slot whose rank is `limit` at most.
    pub fn rank_in_use(&self, limit: usize) -> usize {
        (self.rank.max(0) as usize).min(self.max_rank as usize).min(limit)
    }
}

/// A table of adapters: `[L, S]` entries.
///
/// A slot and slice are of rank min(entry's `rank`, its `max_rank`, R, the slot's of the call's `ranks`), and
/// their delta is multiplied by the entry's `scaling`. Of rank 0, a slice contributes nothing; its pairs are
/// active for their other slices.
#[derive(Clone, Copy, Debug)]
pub struct Adapters<'a, S: Space> {
    entries: View<'a, S, AdapterEntry>,
    /// What they were checked to be of; `None` where whoever made the table has promised that of each call.
    projection: Option<&'a Projection>,
}

impl<'a, S: Space> Adapters<'a, S> {
    /// Adapters at the addresses of a table.
    ///
    /// # Safety
    /// For every entry with a rank over 0, and for all of `'a` (every replay of a graph that records the
    /// table among it):
    /// - `a` and `b` are addresses in space `S` of matrices of the call's element type, `[E or 1, r, K]` and
    ///   `[E or 1, N_s, r]` as the call's projection has them, that nobody writes meanwhile;
    /// - both are on 16-byte boundaries, and r = `max_rank` is a multiple of 8.
    pub unsafe fn new(entries: View<'a, S, AdapterEntry>) -> Self {
        Adapters { entries, projection: None }
    }

    /// The table.
    pub fn entries(&self) -> View<'a, S, AdapterEntry> {
        self.entries
    }

    /// Refuses a table that is too short, or of matrices of other sizes than the call's.
    pub(crate) fn check(&self, projection: &Projection) -> Result<()> {
        if let Some([table, call]) = self.projection.map(|own| [Matrices::of(own), Matrices::of(projection)])
            && table != call
        {
            return Err(Error::OtherTable { table: table.to_string(), call: call.to_string() });
        }
        check_view("adapters", &self.entries, &[projection.sizes().slots, projection.slices()])
    }
}

/// All that the sizes of an adapter's matrices depend on, but its rank.
#[derive(PartialEq)]
struct Matrices {
    dtype: DType,
    in_dim: usize,
    out_dims: OutDims,
    experts: [usize; 2],
}

impl Matrices {
    fn of(projection: &Projection) -> Self {
        let &ProjectionSizes { dtype, in_dim, out_dims, .. } = projection.sizes();
        Matrices { dtype, in_dim, out_dims, experts: [projection.a_experts(), projection.b_experts()] }
    }
}

impl fmt::Display for Matrices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Matrices { dtype, in_dim, out_dims, experts: [a, b] } = self;
        write!(f, "{dtype} K={in_dim} N={out_dims} S={}, {a} matrices of a and {b} of b", out_dims.len())
    }
}

impl<'a> Adapters<'a, Host> {
    /// The entry of a slot and slice of a checked call.
    pub(crate) fn entry(&self, projection: &Projection, slot: usize, slice: usize) -> AdapterEntry {
        self.entries.as_slice()[slot * projection.slices() + slice]
    }

    /// `[r, K]`: the `a` of an expert.
    pub(crate) fn a<T: Element>(
        &self,
        projection: &Projection,
        entry: &AdapterEntry,
        expert: usize,
    ) -> &'a [T] {
        let matrix = entry.max_rank as usize * projection.sizes().in_dim;
        let first = expert % projection.a_experts() * matrix;
        // SAFETY: whoever made the table has promised E or 1 matrices there, and an expert is below E.
        unsafe { elements(entry.a, first, matrix) }
    }

    /// `[N_s, r]`: the `b` of an expert.
    pub(crate) fn b<T: Element>(
        &self,
        projection: &Projection,
        slice: usize,
        entry: &AdapterEntry,
        expert: usize,
    ) -> &'a [T] {
        let matrix = projection.sizes().out_dims.get(slice) * entry.max_rank as usize;
        let first = expert % projection.b_experts() * matrix;
        // SAFETY: as for `a`.
        unsafe { elements(entry.b, first, matrix) }
    }
}

/// # Safety
/// `first + len` elements of `T` are at `address` for as long as `'a`, and nobody writes them.
unsafe fn elements<'a, T: Pod>(address: u64, first: usize, len: usize) -> &'a [T] {
    // SAFETY: as the caller promises.
    unsafe { std::slice::from_raw_parts((address as *const T).add(first), len) }
}

/// The weights of one slot and slice in an [`AdapterTable`].
pub struct AdapterSlice<B: Backend, T: Pod> {
    /// `[E or 1, max_rank, K]`, zero or anything above `rank`.
    pub a: B::Buffer<T>,
    /// `[E or 1, N_s, max_rank]`, likewise.
    pub b: B::Buffer<T>,
    /// Rank in use.
    pub rank: usize,
    /// The rank that both are allocated for, a multiple of 8.
    pub max_rank: usize,
    /// Multiplies what the slice adds.
    pub scaling: f32,
}

/// A table of adapters that owns their weights.
///
/// An adapter may be exchanged between any two calls, and between any two replays of a graph that records
/// the table: [`AdapterTable::set`] waits until no queued work reads what it replaces. A recorded graph that
/// outlives the table finds every slot off.
///
/// ```
/// use half::bf16;
/// use moe_lora::{AdapterSlice, AdapterTable, Backend, Operator, ProjectionSizes, RoutingTensors, cpu::Cpu};
///
/// // q, k and v of an attention layer. Slot 1 has an adapter of q and v, of rank 2.
/// let sizes = ProjectionSizes { slots: 2, max_rank: 8, ..ProjectionSizes::dense(4, &[4, 2, 2]) };
/// let [qkv] = Operator::builder(&Cpu).max_tokens(2).build([sizes])?;
/// let mut table = AdapterTable::new(&Cpu, qkv.projection())?;
/// let slice = |n: usize| -> moe_lora::Result<_> {
///     let (a, b) = (Cpu.upload(&vec![bf16::ONE; 8 * 4])?, Cpu.upload(&vec![bf16::ONE; n * 8])?);
///     Ok(Some(AdapterSlice { a, b, rank: 2, max_rank: 8, scaling: 0.5 }))
/// };
/// table.set(1, vec![slice(4)?, None, slice(2)?])?;
///
/// let (x, token_lora, mut out) = ([bf16::ONE; 2 * 4], [1, 0], [bf16::ZERO; 2 * 8]);
/// let routing = RoutingTensors::dense(token_lora[..].into());
/// qkv.call_adapters(&x[..], &table.adapters(), routing, &mut out[..]).run()?;
/// assert_eq!(out.map(f32::from), [4., 4., 4., 4., 0., 0., 4., 4., 0., 0., 0., 0., 0., 0., 0., 0.]);
/// table.remove(1)?;
/// # Ok::<(), moe_lora::Error>(())
/// ```
pub struct AdapterTable<B: Backend + Clone, T: Element> {
    backend: B,
    projection: Projection,
    entries: B::Buffer<AdapterEntry>,
    /// `[L, S]`: what the entries name.
    slices: Vec<Option<AdapterSlice<B, T>>>,
}

/// Ranks that weights are allocated for are multiples of this: then rows of `b` begin on 16-byte boundaries.
const RANK_MULTIPLE: usize = 8;
/// Boundary of a matrix by address, in bytes.
const BOUNDARY: usize = 16;

impl<B: Backend + Clone, T: Element> AdapterTable<B, T> {
    /// A table for a projection, with every slot off.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] when the projection is of another type than `T`; as for [`Backend::upload`].
    pub fn new(backend: &B, projection: &Projection) -> Result<Self> {
        let expected = projection.sizes().dtype;
        if T::DTYPE != expected {
            return Err(Error::DTypeMismatch { tensor: "adapters", expected, got: T::DTYPE });
        }
        let entries = projection.sizes().slots * projection.slices();
        Ok(AdapterTable {
            backend: backend.clone(),
            projection: *projection,
            entries: backend.upload(&vec![AdapterEntry::default(); entries])?,
            slices: (0..entries).map(|_| None).collect(),
        })
    }

    /// The projection that it was made for.
    pub fn projection(&self) -> &Projection {
        &self.projection
    }

    /// Puts an adapter into a slot, in the place of what was there: S slices, `None` for one that it leaves
    /// alone. Calls that are queued before still use what was there.
    ///
    /// # Errors
    /// One [`Error`] variant for each rule, naming what was expected and what came; as for
    /// [`Backend::write`]. The table is as before.
    pub fn set(&mut self, slot: usize, slices: Vec<Option<AdapterSlice<B, T>>>) -> Result<()> {
        let expected = self.projection.slices();
        if slices.len() != expected {
            return Err(Error::SliceCount { tensor: "the adapter", expected, got: slices.len() });
        }
        let entry = |(s, slice): (usize, &Option<AdapterSlice<B, T>>)| match slice {
            Some(slice) => self.entry(slot, s, slice),
            None => Ok(AdapterEntry::default()),
        };
        let entries = slices.iter().enumerate().map(entry).collect::<Result<Vec<_>>>()?;
        self.replace(slot, &entries, slices)
    }

    /// Switches a slot off, and lets its weights go.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] for a slot that is not there; as for [`Backend::write`].
    pub fn remove(&mut self, slot: usize) -> Result<()> {
        let count = self.projection.slices();
        self.replace(slot, &vec![AdapterEntry::default(); count], (0..count).map(|_| None).collect())
    }

    /// The table, for a call.
    pub fn adapters(&self) -> Adapters<'_, B::Space> {
        // SAFETY: the buffers that the entries name are kept with the table, of the sizes and on the
        // boundaries that `entry` has checked. They are let go of after entries that do not name them are
        // written, which waits for all that reads the table.
        // Calls of other sizes are refused.
        let adapters = unsafe { Adapters::new(self.entries.view()) };
        Adapters { projection: Some(&self.projection), ..adapters }
    }

    fn replace(
        &mut self,
        slot: usize,
        entries: &[AdapterEntry],
        slices: Vec<Option<AdapterSlice<B, T>>>,
    ) -> Result<()> {
        let limit = self.projection.sizes().slots - 1;
        if slot > limit {
            return Err(Error::SizeTooLarge { what: "slot", limit, got: slot });
        }
        let first = slot * slices.len();
        if let Err(error) = self.backend.write(&mut self.entries, first, entries) {
            // Which of them are written is not known: nothing that one of them may name is let go of.
            if matches!(error, Error::Driver { .. }) {
                std::mem::forget(slices);
            }
            return Err(error);
        }
        // What was there is let go of here, when nobody reads it any more.
        for (kept, slice) in self.slices[first..].iter_mut().zip(slices) {
            *kept = slice;
        }
        Ok(())
    }

    fn entry(&self, slot: usize, s: usize, slice: &AdapterSlice<B, T>) -> Result<AdapterEntry> {
        let (sizes, projection) = (self.projection.sizes(), &self.projection);
        let AdapterSlice { a, b, rank, max_rank, scaling } = slice;
        let (what, limit) = ("max_rank", sizes.max_rank.next_multiple_of(RANK_MULTIPLE));
        match *max_rank {
            0 => return Err(Error::ZeroSize { what }),
            got if !got.is_multiple_of(RANK_MULTIPLE) => {
                return Err(Error::NotMultiple { what, of: RANK_MULTIPLE, got });
            }
            got if got > limit => return Err(Error::SizeTooLarge { what, limit, got }),
            _ => {}
        }
        let limit = sizes.max_rank.min(*max_rank);
        if *rank > limit {
            let rank = i32::try_from(*rank).unwrap_or(i32::MAX);
            return Err(Error::RankTooLarge { slot, rank, max_rank: limit });
        }
        if !scaling.is_finite() {
            return Err(Error::NotFinite { what: "scaling", got: scaling.to_string() });
        }
        let shapes = [
            ("a", a, [projection.a_experts(), *max_rank, sizes.in_dim]),
            ("b", b, [projection.b_experts(), sizes.out_dims.get(s), *max_rank]),
        ];
        for (tensor, buffer, shape) in shapes {
            let view = buffer.view();
            self.backend.check_own(tensor, buffer)?;
            check_view(tensor, &view, &shape)?;
            let address = view.address();
            if !address.is_multiple_of(BOUNDARY as u64) {
                return Err(Error::OffBoundary { tensor, expected: BOUNDARY, address });
            }
        }
        Ok(AdapterEntry {
            a: a.view().address(),
            b: b.view().address(),
            rank: *rank as i32,
            max_rank: *max_rank as u32,
            scaling: *scaling,
            reserved: 0,
        })
    }
}

impl<B: Backend + Clone, T: Element> Drop for AdapterTable<B, T> {
    fn drop(&mut self) {
        let off = vec![AdapterEntry::default(); self.slices.len()];
        if self.backend.write(&mut self.entries, 0, &off).is_err() {
            // A recorded graph may still find the adapters: they stay for good.
            std::mem::forget(std::mem::take(&mut self.slices));
        }
    }
}

impl<B: Backend, T: Pod> fmt::Debug for AdapterSlice<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AdapterSlice { rank, max_rank, scaling, .. } = self;
        write!(f, "AdapterSlice(rank {rank} of {max_rank}, scaling {scaling})")
    }
}

impl<B: Backend + Clone, T: Element> fmt::Debug for AdapterTable<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterTable")
            .field("projection", &self.projection)
            .field("slices", &self.slices)
            .finish_non_exhaustive()
    }
}
