//! Warpgroups and their products (PTX ISA 9.7.14).
//!
//! A product is asked for by all 128 threads, and carried out when its group is waited for: the latest moment
//! that the manual allows, with shared memory as it is then. Until then each thread's sums hold
//! [`UNDER_WAY`], a NaN that says which accumulator they are.

use super::machine::{Id, Machine, execute, running, suspend, with};
use super::report::Fault;
use super::shadow::{Kind, Now};
use super::thread::State;
use super::warp::LANES;
use crate::ElementType;
use half::{bf16, f16};
use std::collections::{BTreeMap, VecDeque};
use std::panic::Location;

/// Threads of a warpgroup.
pub(super) const THREADS: usize = 128;

/// What sums hold while products are under way: this, and below it the number of the accumulator.
const UNDER_WAY: u32 = 0x7fd5_0000;

/// Rows of D of a warp.
const WARP_ROWS: usize = 16;
/// Elements along k of one product.
const K: usize = 16;
/// Bytes of a swizzled row, and of the pieces that change places in it.
const ROW_BYTES: u32 = 128;
const CHUNK_BYTES: u32 = 16;

/// A of a product, as a thread names it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rows {
    /// The descriptor of a matrix in shared memory.
    Matrix(u64),
    /// A's fragment.
    Registers([u32; 4]),
}

/// What one thread asks of its warpgroup.
#[derive(Clone, Debug)]
enum Asked {
    Product { element: ElementType, sums: Vec<f32>, a: Rows, b: u64 },
    Commit,
    Wait(u32),
    Registers,
}

impl Asked {
    fn name(&self) -> &'static str {
        match self {
            Asked::Product { .. } => "wgmma.mma_async",
            Asked::Commit => "wgmma.commit_group",
            Asked::Wait(_) => "wgmma.wait_group",
            Asked::Registers => "setmaxnreg",
        }
    }
}

/// A product under way.
struct Product {
    element: ElementType,
    accumulator: u32,
    a: Vec<Rows>,
    b: u64,
    columns: usize,
}

/// What the machine keeps of a warpgroup.
#[derive(Default)]
pub(super) struct Warpgroup {
    asked: Vec<Option<Asked>>,
    came: usize,
    open: Vec<Product>,
    groups: VecDeque<Vec<Product>>,
    accumulators: BTreeMap<u32, Accumulator>,
    next: u32,
}

/// Sums that products under way add to, of each thread, and how many threads have taken theirs back.
struct Accumulator {
    sums: Vec<Vec<f32>>,
    taken: usize,
}

/// The accumulator that sums stand for, if products are under way.
fn accumulator(sums: &[f32]) -> Option<u32> {
    let bits = sums[0].to_bits();
    (bits & 0xffff_0000 == UNDER_WAY).then_some(bits & 0xffff)
}

impl Warpgroup {
    fn is_under_way(&self, accumulator: u32) -> bool {
        let mut products = self.open.iter().chain(self.groups.iter().flatten());
        products.any(|product| product.accumulator == accumulator)
    }
}

impl Machine {
    fn warpgroup(&mut self, id: Id) -> &mut Warpgroup {
        &mut self.block(id).warpgroups[id.thread as usize / THREADS]
    }

    /// Notes that a thread has come to an instruction of its warpgroup. Once the last one is there, carries
    /// it out and wakes the others; until then the thread must wait.
    fn meet_warpgroup(
        &mut self,
        id: Id,
        asked: Asked,
        at: &'static Location<'static>,
    ) -> Result<bool, Fault> {
        let name = asked.name();
        self.thread(id).state = State::Waits(name, at);
        let first = id.thread as usize / THREADS * THREADS;
        let group = self.warpgroup(id);
        group.asked.resize(THREADS, None);
        group.asked[id.thread as usize - first] = Some(asked);
        group.came += 1;
        if group.came < THREADS {
            return Ok(true);
        }
        group.came = 0;
        let asked: Vec<_> = group.asked.iter_mut().filter_map(Option::take).collect();
        // `.aligned`: all threads of the warpgroup execute the same instruction.
        let same = self.block(id).threads[first..first + THREADS].iter().all(|thread| match thread.state {
            State::Waits(other, line) => other == name && line == at,
            _ => false,
        });
        if !same {
            self.diverged();
            return Ok(true);
        }
        self.carry_out(id, asked, at)?;
        for thread in first..first + THREADS {
            let thread = Id { thread: thread as u32, ..id };
            self.thread(thread).state = State::Ready;
            if thread != id {
                self.ready.push(thread);
            }
        }
        Ok(false)
    }

    fn carry_out(&mut self, id: Id, asked: Vec<Asked>, at: &'static Location<'static>) -> Result<(), Fault> {
        match asked[0] {
            Asked::Commit => {
                let group = self.warpgroup(id);
                let products = std::mem::take(&mut group.open);
                group.groups.push_back(products);
            }
            Asked::Wait(newest) => {
                while self.warpgroup(id).groups.len() > newest as usize {
                    let group = self.warpgroup(id).groups.pop_front();
                    for product in group.into_iter().flatten() {
                        self.multiply(id, &product, at)?;
                    }
                }
            }
            Asked::Product { .. } => self.begin_product(id, asked, at)?,
            Asked::Registers => {}
        }
        Ok(())
    }

    fn begin_product(
        &mut self,
        id: Id,
        asked: Vec<Asked>,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        let (mut sums, mut rows) = (Vec::new(), Vec::new());
        let mut first = None;
        for asked in asked {
            let Asked::Product { element, sums: own, a, b } = asked else { unreachable!("all ask the same") };
            first = first.or(Some((element, b)));
            assert_eq!(first, Some((element, b)), "one descriptor a warpgroup");
            sums.push(own);
            rows.push(a);
        }
        let (element, b) = first.expect("a warpgroup has threads");
        let columns = 2 * sums[0].len();
        let group = self.warpgroup(id);
        let accumulator = accumulator(&sums[0]).unwrap_or_else(|| {
            group.next = (group.next + 1) & 0xffff;
            group.accumulators.insert(group.next, Accumulator { sums, taken: 0 });
            group.next
        });
        let product = Product { element, accumulator, a: rows, b, columns };
        // The operands must be there when the product begins, for whatever time it takes.
        self.operands(id, &product, at, true)?;
        self.warpgroup(id).open.push(product);
        Ok(())
    }

    /// Carries a product out: 64 × `columns` sums, each over k from 0 upwards, in f32.
    fn multiply(&mut self, id: Id, product: &Product, at: &'static Location<'static>) -> Result<(), Fault> {
        let (a, b) = self.operands(id, product, at, false)?;
        let group = self.warpgroup(id);
        let accumulator = group.accumulators.get_mut(&product.accumulator).expect("begun with the product");
        for (thread, sums) in accumulator.sums.iter_mut().enumerate() {
            let (warp, lane) = (thread / 32, thread % 32);
            for (i, sum) in sums.iter_mut().enumerate() {
                let row = WARP_ROWS * warp + lane / 4 + i / 2 % 2 * 8;
                let column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                for (a, b) in a[row].iter().zip(&b[column]) {
                    *sum += a * b;
                }
            }
        }
        Ok(())
    }

    /// A and B of a product, one row of k a row of A or column of B. `begins`: they must have been shown to
    /// the async proxy.
    #[expect(clippy::type_complexity)]
    fn operands(
        &mut self,
        id: Id,
        product: &Product,
        at: &'static Location<'static>,
        begins: bool,
    ) -> Result<(Vec<[f32; K]>, Vec<[f32; K]>), Fault> {
        let element = product.element;
        // Each warp reads all, since none may use what another has written, or let it be overwritten, before
        // they have met.
        let first = id.thread / THREADS as u32 * THREADS as u32;
        let readers = [0, 1, 2, 3]
            .map(|warp| self.now(Id { thread: first + LANES as u32 * warp, ..id }, Kind::Read, at));
        let mut row = |matrix, row| self.matrix_row(id.rank, element, matrix, row, &readers, begins);
        let b = (0..product.columns as u32)
            .map(|column| row(product.b, column))
            .collect::<Result<Vec<_>, _>>()?;
        let mut a = vec![[0.0; K]; 4 * WARP_ROWS];
        match product.a[0] {
            Rows::Matrix(descriptor) => {
                for (values, number) in a.iter_mut().zip(0..) {
                    *values = row(descriptor, number)?;
                }
            }
            Rows::Registers(_) => {
                for (thread, rows) in product.a.iter().enumerate() {
                    let Rows::Registers(fragment) = rows else { continue };
                    let (warp, lane) = (thread / 32, thread % 32);
                    for (register, &pair) in fragment.iter().enumerate() {
                        let row = WARP_ROWS * warp + lane / 4 + register % 2 * 8;
                        let k = lane % 4 * 2 + register / 2 * 8;
                        a[row][k..k + 2].copy_from_slice(&widen(element, pair));
                    }
                }
            }
        }
        Ok((a, b))
    }

    /// Sixteen elements of a row of a matrix in shared memory (PTX ISA 9.7.14.5.1): groups of eight rows lie
    /// a stride apart, rows in a group one after another, and with the 128-byte swizzle bits 4 to 6 of an
    /// address are those of the element's place, exclusive or bits 7 to 9.
    fn matrix_row(
        &mut self,
        block: u32,
        element: ElementType,
        descriptor: u64,
        row: u32,
        readers: &[Now],
        begins: bool,
    ) -> Result<[f32; K], Fault> {
        let field = |shift: u32| ((descriptor >> shift & 0x3fff) << 4) as u32;
        let (start, stride) = (field(0), field(32));
        assert_eq!(descriptor >> 62, 1, "only the 128-byte swizzle is emulated");
        let mut values = [0.0; K];
        for (half, values) in values.chunks_exact_mut(K / 2).enumerate() {
            let place = start + row / 8 * stride + row % 8 * ROW_BYTES + half as u32 * CHUNK_BYTES;
            let address = place ^ ((place / ROW_BYTES % 8) * CHUNK_BYTES);
            let bytes = self.read_async(block, address, readers, begins)?;
            for (values, pair) in values.chunks_exact_mut(2).zip(bytes.as_chunks::<4>().0) {
                values.copy_from_slice(&widen(element, u32::from_le_bytes(*pair)));
            }
        }
        Ok(values)
    }

    /// Reads a chunk of a block's shared memory by the async proxy, for each of `readers`.
    fn read_async(
        &mut self,
        block: u32,
        address: u32,
        readers: &[Now],
        begins: bool,
    ) -> Result<[u8; CHUNK_BYTES as usize], Fault> {
        let mut range = 0..0;
        for now in readers {
            range = self.shared(block, address, CHUNK_BYTES, now)?;
            if begins && let Some((byte, by)) = self.blocks[block as usize].shadow.unfenced(&range, now) {
                let place = format!("byte {byte} of shared memory");
                return Err(Fault::Unfenced { what: "wgmma of", place, by });
            }
        }
        Ok(self.blocks[block as usize].shared[range].try_into().expect("a range of a chunk"))
    }
}

fn widen(element: ElementType, pair: u32) -> [f32; 2] {
    [pair as u16, (pair >> 16) as u16].map(|bits| match element {
        ElementType::Bf16 => bf16::from_bits(bits).to_f32(),
        ElementType::F16 => f16::from_bits(bits).to_f32(),
    })
}

/// `wgmma.fence`.
pub(crate) fn fence_warpgroup() {
    with(|machine| machine.thread(running().0).may_multiply = true);
}

#[track_caller]
fn meet(asked: Asked) {
    let at = Location::caller();
    if execute(at, |machine, id| {
        assert!(
            id.thread as usize / THREADS < machine.block(id).warpgroups.len(),
            "a warpgroup is four whole warps"
        );
        machine.meet_warpgroup(id, asked, at)
    }) {
        suspend();
    }
}

/// `wgmma.mma_async.m64nNk16`, with N twice the length of `sums`.
#[track_caller]
pub(crate) fn multiply_warpgroup(element: ElementType, sums: &mut [f32], a: Rows, b: u64) {
    let at = Location::caller();
    let before = accumulator(sums);
    execute(at, |machine, id| {
        // Products that follow one another on the same sums need no fence between.
        match before.is_some() || machine.thread(id).may_multiply {
            true => Ok(()),
            false => Err(Fault::RegisterFence),
        }
    });
    meet(Asked::Product { element, sums: sums.to_vec(), a, b });
    let accumulator = before.unwrap_or_else(|| with(|machine| machine.warpgroup(running().0).next));
    sums.fill(f32::from_bits(UNDER_WAY | accumulator));
}

/// `setmaxnreg`: the machine has registers for all.
#[track_caller]
pub(crate) fn set_registers() {
    meet(Asked::Registers);
}

/// `wgmma.commit_group`.
#[track_caller]
pub(crate) fn commit_products() {
    meet(Asked::Commit);
}

/// `wgmma.wait_group`: carries out all groups but the `newest` newest, and gives back the sums that nothing
/// is added to any more.
#[track_caller]
pub(crate) fn wait_for_products(newest: u32, sums: &mut [f32]) {
    meet(Asked::Wait(newest));
    with(|machine| {
        let (id, _) = running();
        machine.thread(id).may_multiply = false;
        let group = machine.warpgroup(id);
        let Some(number) = accumulator(sums).filter(|&number| !group.is_under_way(number)) else { return };
        let Some(accumulator) = group.accumulators.get_mut(&number) else { return };
        let own = &accumulator.sums[id.thread as usize % THREADS];
        sums[..own.len()].copy_from_slice(own);
        accumulator.taken += 1;
        if accumulator.taken == THREADS {
            group.accumulators.remove(&number);
        }
    });
}
