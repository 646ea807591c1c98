//! What a caller may take out of the planner's hands.

use moe_lora_kernels as kernels;

/// Width of element offsets within a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IndexWidth {
    /// For calls whose largest element offset over all tensors fits 31 bits.
    I32,
    /// For all others.
    I64,
}

/// Tiles of `shrink` and `expand`, by their pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TileKind {
    /// 16 pairs.
    M16,
    /// 32 pairs.
    M32,
    /// 64 pairs.
    M64,
    /// 16 pairs, for sizes and addresses that are not multiples of 8 elements.
    Any,
}

impl TileKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::M16, Self::M32, Self::M64, Self::Any];
}

/// Pairs of a tile of `decode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DecodeRows {
    /// 8.
    M8,
    /// 16.
    M16,
}

impl DecodeRows {
    /// All of them, the smallest first.
    pub const ALL: [Self; 2] = [Self::M8, Self::M16];
}

/// The same in the table of kernels, and back.
macro_rules! as_kernels_have_it {
    ($($type:ident: $($variant:ident)*;)*) => {
        $(
            impl From<$type> for kernels::$type {
                fn from(ours: $type) -> Self {
                    match ours {
                        $($type::$variant => kernels::$type::$variant,)*
                    }
                }
            }

            impl From<kernels::$type> for $type {
                fn from(theirs: kernels::$type) -> Self {
                    match theirs {
                        $(kernels::$type::$variant => $type::$variant,)*
                    }
                }
            }
        )*
    };
}

as_kernels_have_it! {
    IndexWidth: I32 I64;
    TileKind: M16 M32 M64 Any;
    DecodeRows: M8 M16;
}

/// Choices that a caller may take out of the planner's hands; `None` leaves them there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// Width of element offsets. [`IndexWidth::I32`] is honoured only where every offset fits.
    pub index: Option<IndexWidth>,
    /// Which kernels a whole call runs. [`Form::Decode`] and [`Form::Prefill`] are honoured only where the
    /// device, the shapes and the route allow.
    pub form: Option<Form>,
    /// Tile of `shrink` and `expand`. A tile for sizes in multiples of 8 is honoured only where they are.
    pub tile: Option<TileKind>,
    /// Pairs of a tile of `decode`. Honoured only where shared memory has room.
    pub rows: Option<DecodeRows>,
    /// Blocks of a cluster of `decode`, 1 ..= 8.
    pub cluster: Option<u32>,
    /// Blocks of `route`: honoured up to as many as [`most_route_blocks`](super::most_route_blocks) allows.
    pub route_blocks: Option<u32>,
}

/// Which kernels a whole call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// `decode`, one launch of clusters that shrink and expand: few pairs a segment, on sm_90 and later.
    Decode,
    /// `prefill`, one launch of warpgroups that shrink and expand: many pairs a segment, on sm_90a.
    Prefill(PrefillTile),
    /// `prefill`, in which blocks share passes over a tile: few segments.
    SharedPrefill(PrefillTile),
    /// `shrink`, then `expand`: every call, on every device.
    Generic,
}

impl Form {
    /// `prefill`, in whole passes or in shared ones.
    pub(crate) const fn prefill(shared: bool, tile: PrefillTile) -> Self {
        if shared { Form::SharedPrefill(tile) } else { Form::Prefill(tile) }
    }

    /// Whether blocks share passes; `None` where it is not `prefill`.
    pub(crate) const fn is_shared(self) -> Option<bool> {
        match self {
            Form::Prefill(_) => Some(false),
            Form::SharedPrefill(_) => Some(true),
            Form::Decode | Form::Generic => None,
        }
    }
}

/// The tiles of `prefill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PrefillTile {
    /// 64 pairs: one warpgroup.
    M64,
    /// 128 pairs: two.
    M128,
}

impl PrefillTile {
    /// Both.
    pub const ALL: [Self; 2] = [Self::M64, Self::M128];

    /// Pairs.
    pub const fn rows(self) -> u32 {
        match self {
            PrefillTile::M64 => 64,
            PrefillTile::M128 => 128,
        }
    }
}

impl Options {
    /// Every way that a call can be run: as planned, and with each form, tile and index width forced.
    pub fn every() -> Vec<Self> {
        let mut every = vec![Options::default()];
        for index in [IndexWidth::I32, IndexWidth::I64] {
            let with_index = Options { index: Some(index), ..Options::default() };
            every.extend(TileKind::ALL.map(|tile| Options { tile: Some(tile), ..with_index }));
            let decode = Options { form: Some(Form::Decode), ..with_index };
            every.extend(DecodeRows::ALL.map(|rows| Options { rows: Some(rows), ..decode }));
            let prefills = PrefillTile::ALL.map(|tile| [Form::Prefill(tile), Form::SharedPrefill(tile)]);
            every.extend(
                prefills.into_iter().flatten().map(|form| Options { form: Some(form), ..with_index }),
            );
        }
        let decode = Options { form: Some(Form::Decode), ..Options::default() };
        every.extend([1, 8].map(|cluster| Options { cluster: Some(cluster), ..decode }));
        every.push(Options { form: Some(Form::Generic), route_blocks: Some(2), ..Options::default() });
        every
    }

    /// A back end's name and what was forced on it: `cuda i64 m32`.
    pub fn name(&self, backend: &str) -> String {
        let index = self.index.map_or(String::new(), |index| format!(" {index:?}"));
        let form = self.form.map_or(String::new(), |form| format!(" {form:?}"));
        let tile = self.tile.map_or(String::new(), |tile| format!(" {tile:?}"));
        let rows = self.rows.map_or(String::new(), |rows| format!(" {rows:?}"));
        let cluster = self.cluster.map_or(String::new(), |cluster| format!(" cluster{cluster}"));
        let route = self.route_blocks.map_or(String::new(), |blocks| format!(" route{blocks}"));
        format!("{backend}{index}{form}{tile}{rows}{cluster}{route}").to_lowercase()
    }
}
