//! The plan of a call is about the fastest that was measured of it: docs/bench has how long every candidate
//! took, for calls that the table of costs was fitted to, and for others.

use moe_lora::plan::{self, DeviceLimits, Options, Plan, RouteSource, Stage};
use moe_lora::{Layout, Projection, ProjectionSizes};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A call, and how long it took in each candidate.
#[derive(Deserialize)]
struct Record {
    projection: ProjectionSizes,
    tokens: usize,
    /// Rank of the adapters.
    rank: usize,
    /// How tokens chose their experts.
    choice: String,
    /// Microseconds with its routing, by the candidate's name.
    times: BTreeMap<String, f64>,
}

impl Record {
    fn read(file: &str) -> Vec<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/bench").join(file);
        let lines = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        lines.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    fn call(&self) -> (Projection, Layout) {
        let sizes = self.projection;
        let projection = Projection::new(sizes).expect("legal sizes");
        let ranked = self.rank < sizes.max_rank;
        (projection, Layout { ranked, ..Layout::packed(&projection, self.tokens) })
    }

    fn plan(&self, options: &Options) -> Plan {
        let (projection, layout) = self.call();
        let (stage, route, limits) = (Stage::Forward, RouteSource::Made, DeviceLimits::H200);
        let plan = Plan::new(&projection, &layout, stage, route, &limits, options);
        plan.expect("no size is too large").expect("there are tokens")
    }

    /// How many times as long as the fastest candidate the planned one takes.
    fn behind(&self) -> f64 {
        let planned = self.plan(&Options::default());
        let is_planned = |options: &Options| self.plan(options) == planned;
        let mut times = plan::candidates().filter(is_planned).filter_map(|options| self.time(&options));
        let time = times.next().unwrap_or_else(|| panic!("not measured: {planned}"));
        time / self.times.values().copied().fold(f64::INFINITY, f64::min)
    }

    fn time(&self, options: &Options) -> Option<f64> {
        self.times.get(options.name("").trim_start()).copied()
    }

    /// Whether its routing and its ranks are as the planner takes them to be.
    fn is_as_expected(&self) -> bool {
        self.choice == "uniform" && self.rank == self.projection.max_rank
    }
}

/// Of these calls: how far they are behind in the mean, and which part of them by more than 8 %.
fn behind(records: &[&Record]) -> (f64, f64) {
    let behind: Vec<_> = records.iter().map(|record| record.behind()).collect();
    let count = behind.len() as f64;
    let far = behind.iter().filter(|behind| **behind > 1.08).count() as f64;
    (behind.iter().sum::<f64>() / count, far / count)
}

fn hold(what: &str, records: &[&Record], most: (f64, f64)) {
    let (mean, far) = behind(records);
    println!("{what}: {} calls, {mean:.4} times the fastest, {:.1} % over 1.08", records.len(), 100.0 * far);
    assert!(!records.is_empty() && mean <= most.0 && far <= most.1, "{what}: {mean} {far}");
}

/// Calls of models: those of `moe-lora bench`.
const MODELS: usize = 63;

#[test]
fn plans_are_about_the_fastest() {
    let (fit, held_out) =
        (Record::read("h200-candidates-fit.jsonl"), Record::read("h200-candidates-held-out.jsonl"));
    let expected: Vec<_> = held_out.iter().filter(|record| record.is_as_expected()).collect();
    // Those of models, which the fit counts for more, come first in the file.
    let (models, random) = fit.split_at(MODELS);
    hold("of models, fitted to", &models.iter().collect::<Vec<_>>(), (1.006, 0.0));
    hold("fitted to", &random.iter().collect::<Vec<_>>(), (1.035, 0.13));
    hold("not fitted to", &held_out.iter().collect::<Vec<_>>(), (1.035, 0.14));
    hold("not fitted to, as expected", &expected, (1.017, 0.06));
}
