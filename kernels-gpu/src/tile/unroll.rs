//! Loops that leave no loop behind.

/// Calls `body` with 0, 1, … `N` − 1, each a constant once inlined. An array that a loop indexes at run
/// time would move from registers to local memory; one that `body` indexes stays.
#[inline(always)]
pub fn unroll<const N: usize>(mut body: impl FnMut(usize)) {
    const { assert!(N <= 16) };
    macro_rules! steps {
        ($($i:literal)*) => {$(
            if $i < N {
                body($i);
            }
        )*};
    }
    steps!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}
