//! What was measured of calls, a line of JSON each. `moe-lora tune --fit` and the planner's test read it.

use super::cases::Case;
use crate::measure::{Choice, Measured};
use anyhow::Context;
use moe_lora::ProjectionSizes;
use moe_lora::plan::Options;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// A call, and how long each candidate took.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The device, by the driver's name.
    pub device: String,
    /// The call's sizes.
    pub projection: ProjectionSizes,
    /// T.
    pub tokens: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// How tokens chose their experts.
    pub choice: Choice,
    /// (slot, expert) with a pair or more.
    pub segments: usize,
    /// What no implementation can go below, in microseconds.
    pub floor: f64,
    /// Microseconds of a call with its routing, by the name of what was forced; "" is the planner's own
    /// choice, where nothing that can be forced comes to it.
    pub times: BTreeMap<String, f64>,
}

impl Record {
    pub fn new(device: &str, case: &Case, options: &[Options], measured: &Measured) -> Self {
        let thousandths = |time: f64| (time * 1e3).round() / 1e3;
        let name = |option: &Options| option.name("").trim_start().to_owned();
        let times =
            options.iter().map(name).zip(measured.times.iter().map(|times| thousandths(times.routed)));
        Record {
            device: device.to_owned(),
            projection: *case.workload.projection.sizes(),
            tokens: case.workload.tokens,
            rank: case.workload.rank,
            choice: case.workload.choice,
            segments: measured.segments,
            floor: thousandths(measured.floor),
            times: times.collect(),
        }
    }
}

/// A file that records are appended to.
pub struct Recorder(Option<File>);

impl Recorder {
    /// In `path`; without one, nothing is recorded.
    pub fn new(path: Option<&Path>) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = File::options().append(true).create(true).open(path);
            file.with_context(|| format!("cannot write to {}", path.display()))
        };
        Ok(Recorder(path.map(open).transpose()?))
    }

    pub fn add(&mut self, record: &Record) -> anyhow::Result<()> {
        match &mut self.0 {
            Some(file) => {
                writeln!(file, "{}", serde_json::to_string(record)?).context("cannot write a record")
            }
            None => Ok(()),
        }
    }
}
