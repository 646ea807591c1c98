//! Which kernels a call runs, on which tiles, in how many blocks: decided from shapes and the device alone,
//! before anything is launched. Nothing here touches a device.
//!
//! A checked call on a device is a `Problem`. A file a form says how it can be run:
//!
//! | file | form |
//! |---|---|
//! | `decode` | one launch of clusters, for few pairs a segment |
//! | `prefill` | one launch of warpgroups, for many |
//! | `generic` | `shrink`, then `expand`, for every call and device |
//! | `route` | what makes the route, before any of these |
//!
//! Each has a `Candidate`, which exists for problems that it is legal for, a plan, which says how the
//! launches divide the work, and the parameter blocks of the launches. `choose` takes the candidate that
//! costs least, by the table of the device (`costs`) and what is likely of the call (`likely`).

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod arguments;
#[cfg(test)]
mod blackwell;
mod choose;
pub mod costs;
mod decode;
mod generic;
mod launch;
mod likely;
mod limits;
mod options;
mod prefill;
mod problem;
#[doc(hidden)]
pub mod promises;
mod route;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod scratch;

pub use choose::{candidates, predict};
pub use costs::Costs;
pub use launch::PlannedLaunch;
pub use limits::DeviceLimits;
pub use options::{DecodeRows, Form, IndexWidth, Options, PrefillTile, TileKind};
pub use problem::{RouteSource, Stage};
pub use route::most_route_blocks;

#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) use arguments::{Arguments, Operands};
pub(crate) use launch::Launch;
pub(crate) use problem::{Problem, RouteTiles};
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) use route::{Step, align, align_parameters};
#[cfg(feature = "cuda")]
pub(crate) use scratch::Parts;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) use scratch::Scratch;

use crate::call::Layout;
use crate::error::Result;
use crate::projection::Projection;
use choose::Candidate;
use decode::DecodePlan;
use generic::GenericPlan;
use moe_lora_kernels as kernels;
use prefill::PrefillPlan;
use route::RoutePlan;
use std::fmt;

/// Everything that a call will launch. Prints as one line a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Width of element offsets.
    pub(crate) index: kernels::IndexWidth,
    /// Largest element offset over all tensors of the call.
    pub(crate) largest_offset: u64,
    /// The route: its tiles, and what makes it.
    pub(crate) route: RoutePlan,
    /// What runs on the route.
    pub(crate) work: Work,
}

/// What runs on a call's route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing: the call is the routing alone.
    None,
    /// One launch of clusters.
    Decode(DecodePlan),
    /// One launch of warpgroups.
    Prefill(PrefillPlan),
    /// `shrink`, `expand`, or both.
    Generic(GenericPlan),
}

impl Plan {
    /// Plans a call whose inputs were checked. `None` when there is nothing to do (T = 0).
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`](crate::Error::SizeTooLarge) when a launch would need more blocks than a grid
    /// has, or a route in blocks of the caller's has more slots than can be.
    pub fn new(
        projection: &Projection,
        layout: &Layout,
        stage: Stage,
        route: RouteSource,
        limits: &DeviceLimits,
        options: &Options,
    ) -> Result<Option<Self>> {
        if layout.tokens == 0 {
            return Ok(None);
        }
        Self::of(&Problem::new(projection, layout, stage, route, limits)?, options).map(Some)
    }

    /// As [`Plan::new`].
    pub(crate) fn of(problem: &Problem<'_>, options: &Options) -> Result<Self> {
        let candidate = choose::choose(problem, options);
        let tiles = problem.route_tiles(candidate.route_rows(problem));
        let (splits, steps_per_split) = match candidate {
            Candidate::Generic(candidate) => candidate.splits(problem, &tiles).into(),
            Candidate::Decode(_) | Candidate::Prefill(_) => (1, 0),
        };
        let largest_offset = problem.largest_offset(splits)?;
        let index = match options.index.map(kernels::IndexWidth::from) {
            _ if largest_offset > i32::MAX as u64 => kernels::IndexWidth::I64,
            Some(index) => index,
            None => kernels::IndexWidth::I32,
        };
        let element = problem.element();
        let work = match candidate {
            _ if problem.stage == Stage::Route => Work::None,
            Candidate::Decode(candidate) => Work::Decode(candidate.plan(problem, &tiles, element, index)?),
            Candidate::Prefill(candidate) => Work::Prefill(candidate.plan(problem, &tiles, element, index)?),
            Candidate::Generic(candidate) => {
                let depth = [splits, steps_per_split];
                Work::Generic(candidate.plan(problem, &tiles, depth, element, index)?)
            }
        };
        let is_found = matches!(work, Work::Decode(DecodePlan { finds: true, .. }));
        let route = RoutePlan::new(problem, tiles, is_found, options.route_blocks)?;
        Ok(Plan { index, largest_offset, route, work })
    }

    /// Parts that `h` is summed from.
    pub(crate) fn splits(&self) -> u32 {
        match self.work {
            Work::Generic(plan) => plan.splits,
            Work::None | Work::Decode(_) | Work::Prefill(_) => 1,
        }
    }

    /// Width of element offsets.
    pub fn index_width(&self) -> IndexWidth {
        self.index.into()
    }

    /// Largest element offset over all tensors of the call, which decides the width.
    pub fn largest_offset(&self) -> u64 {
        self.largest_offset
    }

    /// Which kernels shrink and expand; [`Form::Generic`] also where the plan is of the route alone.
    pub fn form(&self) -> Form {
        match &self.work {
            Work::Decode(_) => Form::Decode,
            Work::Prefill(plan) => plan.form(),
            Work::None | Work::Generic(_) => Form::Generic,
        }
    }

    /// Tile of `shrink` and `expand`, where these run.
    pub fn tile(&self) -> Option<TileKind> {
        match self.work {
            Work::Generic(plan) => Some(plan.tile.into()),
            Work::None | Work::Decode(_) | Work::Prefill(_) => None,
        }
    }

    /// Pairs of the route's largest tile.
    pub fn tile_rows(&self) -> u32 {
        self.route.tiles.rows
    }

    /// What is launched, in order.
    pub fn launches(&self) -> impl Iterator<Item = PlannedLaunch> {
        self.each_launch().map(PlannedLaunch::from)
    }

    /// What is launched, in order.
    pub(crate) fn each_launch(&self) -> impl Iterator<Item = Launch> {
        let work = match self.work {
            Work::None => [None, None],
            Work::Decode(plan) => [Some(plan.launch), None],
            Work::Prefill(plan) => [Some(plan.launch), None],
            Work::Generic(plan) => {
                [plan.shrink.map(|shrink| shrink.launch), plan.expand.map(|expand| expand.launch)]
            }
        };
        [self.route.launch()].into_iter().chain(work).flatten()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offsets {:?} (largest {})", self.index, self.largest_offset)?;
        match self.work {
            Work::None => write!(f, ", tiles of {} pairs{}", self.route.tiles.rows, self.route),
            Work::Decode(plan) => write!(f, "{}{plan}", self.route),
            Work::Prefill(plan) => write!(f, "{}{plan}", self.route),
            Work::Generic(plan) => {
                let shape = plan.tile.shape();
                write!(f, ", tile {} pairs × {} columns", shape.rows(), shape.columns())?;
                write!(f, "{}{plan}", self.route)
            }
        }
    }
}
