//! The candidates of a call that are timed.

use super::Workload;
use moe_lora::cuda::{Device, Options, Stream};
use moe_lora::plan::{RouteSource, Stage};

/// Each plan once, by the name of what forces it.
pub struct Candidates {
    /// What forces each.
    pub options: Vec<Options>,
    /// A stream of each.
    pub streams: Vec<Stream>,
    /// Which of them is the planner's own choice.
    pub planned: usize,
}

impl Candidates {
    /// Those that `options` come to for a call.
    pub fn new(device: &Device, options: &[Options], workload: &Workload) -> moe_lora::Result<Self> {
        let (projection, layout) = (&workload.projection, workload.layout());
        let (mut kept, mut streams, mut plans) = (Vec::new(), Vec::new(), Vec::new());
        let mut planned = 0;
        // What is not forced comes last: it is one of the others, as a rule.
        let (own, forced): (Vec<Options>, Vec<_>) =
            options.iter().partition(|option| **option == Options::default());
        for option in forced.into_iter().chain(own) {
            let stream = device.new_stream_with(option)?;
            let plan = stream.plan(projection, &layout, Stage::Forward, RouteSource::Made)?;
            let place = plans.iter().position(|other| *other == plan).unwrap_or(plans.len());
            if place == plans.len() {
                plans.push(plan);
                kept.push(option);
                streams.push(stream);
            }
            if option == Options::default() {
                planned = place;
            }
        }
        Ok(Candidates { options: kept, streams, planned })
    }
}
