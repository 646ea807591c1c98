//! Typed views of memory on the host or on the device.
//!
//! A view is a pointer, a length in elements, and the space that the pointer belongs to. Views of
//! different spaces are different types, so a CPU call cannot be handed device memory.

use bytemuck::Pod;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Where memory lives.
pub trait Space: sealed::Sealed + Copy + fmt::Debug + 'static {
    /// The allocation that a view lies in, where a back end must know it.
    #[doc(hidden)]
    type Memory: Send + Sync;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Host {}
    impl Sealed for super::Cuda {}
    #[cfg(feature = "emulate")]
    impl Sealed for super::Emulated {}
}

/// Memory of the host.
#[derive(Clone, Copy, Debug)]
pub enum Host {}
/// Memory of a CUDA device.
#[derive(Clone, Copy, Debug)]
pub enum Cuda {}
/// Memory of the emulated machine.
#[cfg(feature = "emulate")]
#[derive(Clone, Copy, Debug)]
pub enum Emulated {}

impl Space for Host {
    type Memory = ();
}
impl Space for Cuda {
    #[cfg(feature = "cuda")]
    type Memory = crate::cuda::Memory;
    #[cfg(not(feature = "cuda"))]
    type Memory = ();
}
#[cfg(feature = "emulate")]
impl Space for Emulated {
    type Memory = ();
}

/// A shared view of `len` elements in space `S`.
pub struct View<'a, S: Space, T> {
    address: u64,
    len: usize,
    memory: Option<&'a Arc<S::Memory>>,
    owner: PhantomData<(&'a [T], S)>,
}

/// A view of `len` elements in space `S` that may be written.
pub struct ViewMut<'a, S: Space, T> {
    address: u64,
    len: usize,
    memory: Option<&'a Arc<S::Memory>>,
    owner: PhantomData<(&'a mut [T], S)>,
}

impl<S: Space, T> fmt::Debug for View<'_, S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View({:#x}, {} elements)", self.address, self.len)
    }
}

impl<S: Space, T> fmt::Debug for ViewMut<'_, S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ViewMut({:#x}, {} elements)", self.address, self.len)
    }
}

impl<S: Space, T> Clone for View<'_, S, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S: Space, T> Copy for View<'_, S, T> {}

impl<'a, S: Space, T: Pod> View<'a, S, T> {
    /// Views raw memory.
    ///
    /// # Safety
    /// `address` must be valid in space `S` for reads of `len` elements of `T` for all of `'a`. For device
    /// memory that includes all work queued with this view, every replay of a graph that records it among
    /// them, and other streams may not write it meanwhile. A null or unaligned address is allowed here and
    /// refused, with an error, by the call that is given the view.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        View { address, len, memory: None, owner: PhantomData }
    }

    /// All of an allocation.
    ///
    /// # Safety
    /// As for [`View::from_raw`]; a back end that is given the view keeps `memory` alive and its uses in
    /// order.
    #[cfg(feature = "cuda")]
    pub(crate) unsafe fn of(address: u64, len: usize, memory: &'a Arc<S::Memory>) -> Self {
        View { address, len, memory: Some(memory), owner: PhantomData }
    }

    /// The allocation that it lies in, where that is known.
    #[cfg(feature = "cuda")]
    pub(crate) fn memory(&self) -> Option<&'a Arc<S::Memory>> {
        self.memory
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in `range`.
    ///
    /// # Panics
    /// When `range` does not lie within the view.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a view of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        View { address, len: range.len(), memory: self.memory, owner: PhantomData }
    }

    /// The same memory as elements of another type of the same size (`u16` as `bf16`, say).
    ///
    /// # Panics
    /// When the two types differ in size.
    pub fn cast<U: Pod>(self) -> View<'a, S, U> {
        assert_eq!(size_of::<T>(), size_of::<U>(), "cast between element sizes");
        View { address: self.address, len: self.len, memory: self.memory, owner: PhantomData }
    }
}

impl<'a, S: Space, T: Pod> ViewMut<'a, S, T> {
    /// Views raw memory that the call may write.
    ///
    /// # Safety
    /// As for [`View::from_raw`], for reads and writes, and nothing else may use the memory meanwhile.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        ViewMut { address, len, memory: None, owner: PhantomData }
    }

    /// All of an allocation, to be written.
    ///
    /// # Safety
    /// As for [`ViewMut::from_raw`]; a back end that is given the view keeps `memory` alive and its uses in
    /// order.
    #[cfg(feature = "cuda")]
    pub(crate) unsafe fn of(address: u64, len: usize, memory: &'a Arc<S::Memory>) -> Self {
        ViewMut { address, len, memory: Some(memory), owner: PhantomData }
    }

    /// The allocation that it lies in, where that is known.
    #[cfg(feature = "cuda")]
    pub(crate) fn memory(&self) -> Option<&'a Arc<S::Memory>> {
        self.memory
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A shared view of the same memory, for as long as this one is borrowed.
    pub fn as_view(&self) -> View<'_, S, T> {
        View { address: self.address, len: self.len, memory: self.memory, owner: PhantomData }
    }

    /// The elements in `range`.
    ///
    /// # Panics
    /// When `range` does not lie within the view.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a view of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        ViewMut { address, len: range.len(), memory: self.memory, owner: PhantomData }
    }

    /// The same memory as elements of another type of the same size.
    ///
    /// # Panics
    /// When the two types differ in size.
    pub fn cast<U: Pod>(self) -> ViewMut<'a, S, U> {
        assert_eq!(size_of::<T>(), size_of::<U>(), "cast between element sizes");
        ViewMut { address: self.address, len: self.len, memory: self.memory, owner: PhantomData }
    }
}

impl<'a, T: Pod> View<'a, Host, T> {
    /// The slice that was viewed.
    ///
    /// The address must be aligned and, unless the view is empty, not null: calls check that first.
    pub(crate) fn as_slice(&self) -> &'a [T] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: a host view is made from a slice, or by `from_raw` whose caller promised as much;
        // the check module has refused null and unaligned addresses before any back end gets here.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.len) }
    }
}

impl<'a, T: Pod> ViewMut<'a, Host, T> {
    /// The slice that was viewed; see [`View::as_slice`].
    pub(crate) fn into_slice(self) -> &'a mut [T] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as for `View::as_slice`; the view is consumed, so the slice is the only user.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, self.len) }
    }
}

impl<'a, T: Pod> From<&'a [T]> for View<'a, Host, T> {
    fn from(slice: &'a [T]) -> Self {
        View { address: slice.as_ptr() as u64, len: slice.len(), memory: None, owner: PhantomData }
    }
}

impl<'a, T: Pod> From<&'a mut [T]> for ViewMut<'a, Host, T> {
    fn from(slice: &'a mut [T]) -> Self {
        ViewMut { address: slice.as_mut_ptr() as u64, len: slice.len(), memory: None, owner: PhantomData }
    }
}

/// Rows of equal width, `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, S: Space, T> {
    /// The elements, first row first.
    pub data: View<'a, S, T>,
    /// Elements from one row to the next; `None` when rows are packed.
    pub stride: Option<usize>,
    /// `[P]`: the row of each pair; `None` when rows are in the order of tokens or pairs. It is untrusted: a
    /// pair whose number is none of the rows that `data` holds is inactive.
    pub index: Option<View<'a, S, i32>>,
}

/// Rows of equal width, `stride` elements apart, that may be written.
#[derive(Debug)]
pub struct RowsMut<'a, S: Space, T> {
    /// The elements, first row first.
    pub data: ViewMut<'a, S, T>,
    /// Elements from one row to the next; `None` when rows are packed.
    pub stride: Option<usize>,
    /// `[P]`: the row of each pair; `None` when rows are in the order of pairs. It is untrusted: for a pair
    /// whose number is none of the rows that `data` holds, nothing is written. Nor is a row that no pair
    /// names. Of two pairs that name one row, which one's values it has afterwards is not defined.
    pub index: Option<View<'a, S, i32>>,
}

impl<'a, S: Space, T> From<View<'a, S, T>> for Rows<'a, S, T> {
    fn from(data: View<'a, S, T>) -> Self {
        Rows { data, stride: None, index: None }
    }
}

impl<'a, S: Space, T> From<ViewMut<'a, S, T>> for RowsMut<'a, S, T> {
    fn from(data: ViewMut<'a, S, T>) -> Self {
        RowsMut { data, stride: None, index: None }
    }
}
