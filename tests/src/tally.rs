//! Which kernels ran on the emulated machine, and how often.

use crate::log;
use moe_lora::emulated::Emulated;
use moe_lora_kernels::ENTRIES;
use std::collections::BTreeMap;
use std::fmt;

/// Names the file that counts are listed in: a line an entry point, with its cases and launches.
const LOG_VAR: &str = "MOE_LORA_EMULATED_LOG";

/// For each entry point: cases in which it ran, and launches.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<&'static str, [u64; 2]>);

impl Tally {
    /// Takes in what one case made of each of `machines`.
    pub fn of<'m>(machines: impl IntoIterator<Item = &'m Emulated>) -> Self {
        let mut tally = Tally::default();
        for (name, launches) in machines.into_iter().flat_map(Emulated::launches) {
            tally.add(name, [1, launches]);
        }
        tally
    }

    fn add(&mut self, name: &'static str, [cases, launches]: [u64; 2]) {
        let sum = self.0.entry(name).or_default();
        *sum = [sum[0] + cases, sum[1] + launches];
    }

    /// Adds what `other` counted.
    pub fn take_in(&mut self, other: Tally) {
        other.0.into_iter().for_each(|(name, counts)| self.add(name, counts));
    }

    /// Both together.
    pub fn plus(mut self, other: Tally) -> Tally {
        self.take_in(other);
        self
    }

    /// Entry points of the table that did not run.
    pub fn missing(&self) -> Vec<&'static str> {
        ENTRIES.iter().map(|entry| entry.name).filter(|name| !self.0.contains_key(name)).collect()
    }

    /// How often an entry point was launched.
    pub fn launches(&self, name: &str) -> u64 {
        self.0.get(name).map_or(0, |[_, launches]| *launches)
    }

    /// Tells whoever asked for it.
    pub fn log(&self) {
        println!("{self}");
        for (name, [cases, launches]) in &self.0 {
            log::append(LOG_VAR, &format!("{name} {cases} {launches}"));
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [cases, launches] = [0, 1].map(|i| self.0.values().map(|counts| counts[i]).sum::<u64>());
        let (ran, all) = (self.0.len(), ENTRIES.len());
        write!(f, "{ran} of {all} kernels in {cases} kernel × shape cases, {launches} launches")
    }
}
