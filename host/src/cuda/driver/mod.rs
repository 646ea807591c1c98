//! The CUDA driver, as the back end needs it.
//!
//! Functions that work on handles of anybody's are called through one table, found in the driver's library
//! when the first of them is wanted ([`api`]): the same for both drivers, with the driver's own status codes.
//! What this crate owns, a device's primary context and memory, is held by types of the crate that the
//! features choose: `cust`, or `cudarc` without it. Both offer [`PrimaryContext`] and [`Allocation`], and
//! nothing else here differs.

mod api;
#[cfg(feature = "cust")]
mod bind;
#[cfg(not(feature = "cust"))]
#[path = "cudarc.rs"]
mod owned;
#[cfg(feature = "cust")]
#[path = "cust.rs"]
mod owned;

pub(super) use api::{
    Api, CaptureMode, Handle, LaunchAttribute, LaunchConfig, api, attribute, capture_status,
};
pub(super) use owned::{Allocation, PrimaryContext};

#[cfg(not(any(feature = "cust", feature = "cudarc-unversioned")))]
compile_error!("the feature `cuda` needs a driver: choose `cust` or `cudarc`");
