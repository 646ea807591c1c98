//! What an entry point of `prefill` is compiled for.

use super::Shape;
use crate::arch::mma::Element;
use crate::arch::wgmma::{Registers, Sums};
use crate::memory::Index;
use core::marker::PhantomData;

/// Most [sweeps](Config::SWEEPS), and most [fragments](Config::FRAGMENTS). Arrays have room for so many; what
/// a kernel does not have of them takes no register.
pub(super) const MAX_SWEEPS: usize = 8;
pub(super) const MAX_FRAGMENTS: usize = 16;

/// What an entry point is compiled for.
pub trait Config {
    /// Type of activations and weights.
    type Element: Element;
    /// Width of offsets within a tensor.
    type Index: Index;
    /// A consumer thread's sums of h, in f32.
    type Accumulators: Accumulators;
    /// Pairs of a tile, and columns of h.
    const SHAPE: Shape;
    /// Sixteens of pairs of a tile: the producer loads rows of so many pairs at a time.
    const SWEEPS: usize = Self::SHAPE.rows as usize / 16;
    /// Fragments of h, of 16 columns each.
    const FRAGMENTS: usize = Self::SHAPE.width as usize / 16;
}

/// Tiles of `ROWS` pairs, 64 or 128, and `WIDTH` columns of h, one of [`Shape::WIDTHS`].
pub struct Shaped<E, I, const ROWS: u32, const WIDTH: u32>(PhantomData<(E, I)>);

impl<E: Element, I: Index, const ROWS: u32, const WIDTH: u32> Config for Shaped<E, I, ROWS, WIDTH>
where
    Width<WIDTH>: HasAccumulators,
{
    type Element = E;
    type Index = I;
    type Accumulators = <Width<WIDTH> as HasAccumulators>::Accumulators;
    const SHAPE: Shape = {
        assert!(ROWS <= 16 * MAX_SWEEPS as u32 && WIDTH <= 16 * MAX_FRAGMENTS as u32);
        Shape { rows: ROWS, width: WIDTH }
    };
}

/// So many columns of h.
pub struct Width<const COLUMNS: u32>;

/// A width that there are accumulators for.
pub trait HasAccumulators {
    /// They.
    type Accumulators: Accumulators;
}

impl HasAccumulators for Width<32> {
    type Accumulators = [f32; 16];
}
impl HasAccumulators for Width<64> {
    type Accumulators = [f32; 32];
}
impl HasAccumulators for Width<128> {
    type Accumulators = [f32; 64];
}
impl HasAccumulators for Width<256> {
    type Accumulators = [[f32; 64]; 2];
}

/// A consumer thread's sums of h: one wgmma of up to 128 columns, or two of 128 each.
pub trait Accumulators {
    /// All zeros: see [`Sums::zero`].
    fn zero() -> Self;

    /// The sums of the columns below 128.
    fn low(&mut self) -> &mut [f32];

    /// The sums of the columns from 128 on; none where there are no such columns.
    fn high(&mut self) -> &mut [f32];

    /// Sum `number` of this thread.
    fn sum(&self, number: usize) -> f32;

    /// Waits until all products are done: see [`Sums::wait`].
    fn wait(&mut self);
}

impl<const SUMS: usize> Accumulators for [f32; SUMS]
where
    [f32; SUMS]: Sums,
{
    #[inline(always)]
    fn zero() -> Self {
        Sums::zero()
    }

    #[inline(always)]
    fn low(&mut self) -> &mut [f32] {
        self
    }

    #[inline(always)]
    fn high(&mut self) -> &mut [f32] {
        &mut []
    }

    #[inline(always)]
    fn sum(&self, number: usize) -> f32 {
        self[number]
    }

    #[inline(always)]
    #[track_caller]
    fn wait(&mut self) {
        Sums::wait::<0>(self);
    }
}

impl Accumulators for [[f32; 64]; 2] {
    #[inline(always)]
    fn zero() -> Self {
        [Sums::zero(), Sums::zero()]
    }

    #[inline(always)]
    fn low(&mut self) -> &mut [f32] {
        &mut self[0]
    }

    #[inline(always)]
    fn high(&mut self) -> &mut [f32] {
        &mut self[1]
    }

    #[inline(always)]
    fn sum(&self, number: usize) -> f32 {
        self[number / 64][number % 64]
    }

    #[inline(always)]
    #[track_caller]
    fn wait(&mut self) {
        let [low, high] = self;
        Sums::wait::<0>(low);
        Sums::wait::<0>(high);
    }
}

/// Registers of a thread of the producer.
pub(super) struct ProducerRegisters<C>(PhantomData<C>);

impl<C: Config> Registers for ProducerRegisters<C> {
    const COUNT: u32 = C::SHAPE.producer_registers();
}

/// Registers of a thread of a consumer.
pub(super) struct ConsumerRegisters<C>(PhantomData<C>);

impl<C: Config> Registers for ConsumerRegisters<C> {
    const COUNT: u32 = C::SHAPE.consumer_registers();
}
