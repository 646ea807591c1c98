//! Device memory: allocations with gaps between them, and the parts that a launch may use.

use std::ops::Range;

/// First address. Past 4 GiB, so that an address that was cut to 32 bits leads nowhere.
const FIRST_ADDRESS: u64 = 0x7f_0000_0000;

/// Alignment of an allocation, as `cuMemAlloc` has it.
const ALIGNMENT: u64 = 256;

/// Bytes between allocations that belong to none.
const GAP: u64 = 1 << 20;

/// A part of device memory that a launch may read, and perhaps write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// What it is, for reports.
    pub name: String,
    /// Address of its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
    /// Whether the launch may write it.
    pub writable: bool,
}

/// Emulated device memory.
#[derive(Debug)]
pub struct Memory {
    /// In the order of their addresses.
    allocations: Vec<Allocation>,
    next: u64,
}

#[derive(Debug)]
struct Allocation {
    address: u64,
    bytes: Vec<u8>,
}

impl Default for Memory {
    fn default() -> Self {
        Memory { allocations: Vec::new(), next: FIRST_ADDRESS }
    }
}

impl Memory {
    /// Allocates a copy of `bytes` and returns its address.
    pub fn allocate(&mut self, bytes: &[u8]) -> u64 {
        let address = self.next;
        self.next = (address + bytes.len() as u64 + GAP).next_multiple_of(ALIGNMENT);
        self.allocations.push(Allocation { address, bytes: bytes.to_vec() });
        address
    }

    /// Frees the allocation that starts at `address`.
    ///
    /// # Panics
    /// When there is none.
    pub fn free(&mut self, address: u64) {
        let number = self.number(address);
        assert_eq!(self.allocations[number].address, address, "the middle of an allocation");
        self.allocations.remove(number);
    }

    /// The `len` bytes from `address` on.
    ///
    /// # Panics
    /// When they are not inside one allocation.
    pub fn bytes(&self, address: u64, len: u64) -> &[u8] {
        let (number, range) = self.find(address, len);
        &self.allocations[number].bytes[range]
    }

    /// The `len` bytes from `address` on, to be written.
    ///
    /// # Panics
    /// When they are not inside one allocation.
    pub fn bytes_mut(&mut self, address: u64, len: u64) -> &mut [u8] {
        let (number, range) = self.find(address, len);
        &mut self.allocations[number].bytes[range]
    }

    fn number(&self, address: u64) -> usize {
        let after = self.allocations.partition_point(|allocation| allocation.address <= address);
        after.checked_sub(1).unwrap_or_else(|| panic!("{address:#x} is in no allocation"))
    }

    /// The allocation that holds these bytes, and where in it they are.
    pub(super) fn find(&self, address: u64, len: u64) -> (usize, Range<usize>) {
        let number = self.number(address);
        let start = (address - self.allocations[number].address) as usize;
        let range = start..start + len as usize;
        assert!(
            range.end <= self.allocations[number].bytes.len(),
            "{address:#x} + {len} is in no allocation"
        );
        (number, range)
    }

    /// The bytes of an allocation that [`Memory::find`] found.
    pub(super) fn part(&mut self, (number, range): (usize, Range<usize>)) -> &mut [u8] {
        &mut self.allocations[number].bytes[range]
    }
}
