//! Device memory: allocations with gaps between them, the parts that a launch may use, and which launch was
//! where last.

use super::overlap::Overlap;
use std::ops::Range;

/// First address. Past 4 GiB, so that an address that was cut to 32 bits leads nowhere.
const FIRST_ADDRESS: u64 = 0x7f_0000_0000;

/// Alignment of an allocation, as `cuMemAlloc` has it.
const ALIGNMENT: u64 = 256;

/// Bytes between allocations that belong to none.
const GAP: u64 = 1 << 20;

/// Bytes that launches are told apart by: an element of 16 bits.
const GRANULE: usize = 2;

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

/// Emulated device memory, and the queue of launches that use it.
#[derive(Debug)]
pub struct Memory {
    /// In the order of their addresses.
    allocations: Vec<Allocation>,
    next: u64,
    /// Kernels of all launches so far.
    launches: Vec<String>,
    /// The last launch; `None` when the device is idle.
    last: Option<Overlap>,
}

#[derive(Debug)]
struct Allocation {
    address: u64,
    bytes: Vec<u8>,
    /// One for every [`GRANULE`] bytes.
    marks: Marks,
}

/// The launches that last used a granule; 0 is the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    written: u32,
    /// The last two that read it, the last first.
    read: [u32; 2],
    /// Whether what was written is there no more.
    forgotten: bool,
}

/// Granules of a [`Page`].
const PAGE: usize = 256;

/// The marks of an allocation, of which most are never touched.
#[derive(Debug)]
struct Marks(Vec<Page>);

#[derive(Debug)]
enum Page {
    /// All marks are alike.
    Alike(Mark),
    /// [`PAGE`] of them.
    Each(Box<[Mark]>),
}

impl Page {
    /// Its marks, from now on told apart.
    fn each(&mut self) -> &mut [Mark] {
        if let Page::Alike(mark) = *self {
            self.tell_apart(mark);
        }
        match self {
            Page::Each(marks) => marks,
            Page::Alike(_) => unreachable!("it was told apart above"),
        }
    }

    /// Apart from [`Page::each`], which is called at every access.
    #[cold]
    fn tell_apart(&mut self, mark: Mark) {
        *self = Page::Each(vec![mark; PAGE].into());
    }
}

impl Marks {
    fn new(granules: usize) -> Self {
        let fresh = || Page::Alike(Mark { written: 0, read: [0; 2], forgotten: false });
        Marks(std::iter::repeat_with(fresh).take(granules.div_ceil(PAGE)).collect())
    }

    /// The pages of these granules: the first granule of each, and which of its marks are theirs.
    fn pages(&mut self, granules: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>, &mut Page)> {
        let first = granules.start / PAGE;
        let pages = self.0[first..granules.end.div_ceil(PAGE)].iter_mut().zip(first..);
        pages.map(move |(page, number)| {
            let start = number * PAGE;
            let inside = |granule: usize| granule.clamp(start, start + PAGE) - start;
            (start, inside(granules.start)..inside(granules.end), page)
        })
    }

    fn forget(&mut self, granules: Range<usize>) {
        for (_, inside, page) in self.pages(granules) {
            match page {
                Page::Alike(mark) if inside == (0..PAGE) => mark.forgotten = true,
                page => page.each()[inside].iter_mut().for_each(|mark| mark.forgotten = true),
            }
        }
    }
}

/// What stands against a launch's access, and the byte that shows it.
pub(super) enum Clash {
    /// Nobody has written the byte.
    Unwritten(usize),
    /// A kernel of an earlier launch uses the byte too, and may still run.
    Overlap(usize, String),
}

impl Default for Memory {
    fn default() -> Self {
        Memory { allocations: Vec::new(), next: FIRST_ADDRESS, launches: Vec::new(), last: None }
    }
}

impl Memory {
    /// Allocates a copy of `bytes` and returns its address.
    pub fn allocate(&mut self, bytes: &[u8]) -> u64 {
        let address = self.next;
        self.next = (address + bytes.len() as u64 + GAP).next_multiple_of(ALIGNMENT);
        let marks = Marks::new(bytes.len().div_ceil(GRANULE));
        self.allocations.push(Allocation { address, bytes: bytes.to_vec(), marks });
        address
    }

    /// Fills the `len` bytes from `address` on with `poison`. Until a launch writes them, reading them is a
    /// fault.
    ///
    /// # Panics
    /// When they are not inside one allocation.
    pub fn forget(&mut self, address: u64, len: u64, poison: u8) {
        let (number, range) = self.find(address, len);
        let Allocation { bytes, marks, .. } = &mut self.allocations[number];
        bytes[range.clone()].fill(poison);
        marks.forget(granules(&range));
    }

    /// Waits for all launches: the next one finds an idle device.
    pub fn synchronize(&mut self) {
        self.last = None;
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

    /// Begins a launch, after the one before.
    pub(super) fn begin_launch(&mut self, kernel: &str, overlaps: bool) {
        self.launches.push(kernel.to_owned());
        self.last = Some(Overlap::after(self.last.as_ref(), self.launches.len() as u32, overlaps));
    }

    /// The launch that runs.
    pub(super) fn launch(&mut self) -> &mut Overlap {
        self.last.as_mut().expect("a launch runs")
    }

    /// Takes in an access of the launch that runs, by a thread that has waited for the launch before or not.
    pub(super) fn touch(
        &mut self,
        (number, range): (usize, Range<usize>),
        writes: bool,
        has_waited: bool,
    ) -> Result<(), Clash> {
        let launch = self.last.as_ref().expect("a launch runs");
        for (first, inside, page) in self.allocations[number].marks.pages(granules(&range)) {
            // What came of the last mark: it comes of each that is as that one was.
            let mut last: Option<[Mark; 2]> = None;
            let numbers = first + inside.start..;
            for (mark, granule) in page.each()[inside].iter_mut().zip(numbers) {
                if let Some([before, after]) = last
                    && *mark == before
                {
                    *mark = after;
                    continue;
                }
                let before = *mark;
                let clash = |other: u32| {
                    let kernel = self.launches[other as usize - 1].clone();
                    Err(Clash::Overlap(granule * GRANULE, kernel))
                };
                if launch.may_run(mark.written, has_waited) {
                    return clash(mark.written);
                }
                let reader = mark.read.into_iter().find(|&reader| launch.may_run(reader, has_waited));
                if let (true, Some(reader)) = (writes, reader) {
                    return clash(reader);
                }
                if writes {
                    (mark.written, mark.forgotten) = (launch.number, false);
                } else if mark.forgotten {
                    return Err(Clash::Unwritten(granule * GRANULE));
                } else if mark.read[0] != launch.number {
                    mark.read = [launch.number, mark.read[0]];
                }
                last = Some([before, *mark]);
            }
        }
        Ok(())
    }
}

fn granules(bytes: &Range<usize>) -> Range<usize> {
    bytes.start / GRANULE..bytes.end.div_ceil(GRANULE)
}
