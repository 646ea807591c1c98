//! `moe-lora tune --fit`: the planner's table of a device, from what was measured there.

use crate::bench::Record;
use crate::measure::{Choice, contiguous};
use crate::print::say;
use anyhow::{Context, Result};
use moe_lora::cuda::Device;
use moe_lora::plan::{Costs, DeviceLimits, Options, RouteSource, predict};
use moe_lora::{Layout, Projection};
use rayon::prelude::*;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Factors that a constant is tried with, in one round after another.
const STEPS: [f64; 5] = [1.3, 1.15, 1.07, 1.03, 1.01];
/// Rounds with each factor, at most: one that changes nothing is the last.
const ROUNDS: usize = 8;
/// How much less a time counts, the farther it is above the call's fastest: a candidate that is never chosen
/// need not be predicted well. One of twice the fastest time counts exp(-2) as much.
const SHARPNESS: f64 = 2.0;
/// Errors of a logarithm past this count by their size, no longer by their square.
const LARGE_ERROR: f64 = 0.1;
/// Calls that are slower than the fastest candidate by more than this are counted apart.
const FAR_BEHIND: f64 = 1.08;

/// A call that was measured.
struct Call {
    projection: Projection,
    layout: Layout,
    /// By the name of what was forced.
    times: Vec<(String, f64)>,
    fastest: f64,
    /// Whether it is what a planner expects: experts chosen evenly, ranks as allocated.
    expected: bool,
}

impl Call {
    fn new(record: Record) -> Result<Self> {
        let projection = Projection::new(record.projection)?;
        let layout = contiguous(&projection, record.tokens, record.rank < record.projection.max_rank);
        let fastest = record.times.values().copied().fold(f64::INFINITY, f64::min);
        let expected = record.choice == Choice::Uniform && !layout.ranked;
        Ok(Call { projection, layout, times: record.times.into_iter().collect(), fastest, expected })
    }

    /// Predicted and measured times, the cheapest by prediction first.
    fn predicted(&self, limits: &DeviceLimits, costs: &Costs) -> Result<Vec<(f64, f64)>> {
        let predicted = predict(&self.projection, &self.layout, RouteSource::Made, limits, costs)?;
        let measured = |(options, predicted): (Options, f64)| {
            let name = options.name("");
            let (_, time) = self.times.iter().find(|(other, _)| other == name.trim_start())?;
            Some((predicted, *time))
        };
        Ok(predicted.into_iter().filter_map(measured).collect())
    }

    /// How far predictions are off.
    fn error(&self, limits: &DeviceLimits, costs: &Costs) -> Result<f64> {
        let one = |(predicted, measured): (f64, f64)| {
            let off = ((predicted / measured).ln() / LARGE_ERROR).powi(2);
            // Square near zero, straight far from it.
            let loss = 2.0 * ((1.0 + off).sqrt() - 1.0);
            loss * (-SHARPNESS * (measured / self.fastest - 1.0)).exp()
        };
        Ok(self.predicted(limits, costs)?.into_iter().map(one).sum())
    }

    /// How many times as long as the fastest candidate the one with the least predicted time takes.
    fn behind(&self, limits: &DeviceLimits, costs: &Costs) -> Result<f64> {
        let predicted = self.predicted(limits, costs)?;
        let (_, measured) = predicted.first().context("a record without a candidate's time")?;
        Ok(measured / self.fastest)
    }
}

/// The places of all numbers of a value.
fn numbers(value: &Value, at: &str, into: &mut Vec<String>) {
    match value {
        Value::Number(_) => into.push(at.to_owned()),
        Value::Object(fields) => {
            fields.iter().for_each(|(name, field)| numbers(field, &format!("{at}/{name}"), into))
        }
        _ => {}
    }
}

/// `costs` with the constant at `place` times `factor`.
fn scaled(costs: &Costs, place: &str, factor: f64) -> Result<Costs> {
    let mut value = serde_json::to_value(costs)?;
    let number = value.pointer_mut(place).context("a place in the table")?;
    // To four digits, as a table has them.
    let scaled = number.as_f64().context("a number")? * factor;
    *number = format!("{scaled:.4}").parse::<f64>()?.into();
    Ok(serde_json::from_value(value)?)
}

/// The limits of the device that records are of: known by name, or device `ordinal` here.
fn limits_of(name: &str, ordinal: u32) -> Result<DeviceLimits> {
    let known = [("H100", DeviceLimits::H100), ("H200", DeviceLimits::H200)];
    if let Some((_, limits)) = known.into_iter().find(|(part, _)| name.contains(part)) {
        return Ok(limits);
    }
    let device = Device::untuned(ordinal)?;
    let here = &device.info().name;
    anyhow::ensure!(here == name, "the records are of {name}, and device {ordinal} is {here}");
    Ok(device.limits())
}

/// Fits a table to the records in `path`, and prints it. Records of a device that is not known by its name
/// are fitted where device `ordinal` is one.
pub fn fit(path: &Path, ordinal: u32) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut calls, mut devices) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()) {
        let at = || format!("{}, line {number}", path.display());
        let record: Record = serde_json::from_str(line).with_context(at)?;
        devices.push(record.device.clone());
        calls.push(Call::new(record).with_context(at)?);
    }
    devices.dedup();
    anyhow::ensure!(devices.len() == 1, "{} is not of one device: {devices:?}", path.display());
    let limits = &limits_of(&devices[0], ordinal)?;
    let start = &Costs::of(limits);
    anyhow::ensure!(calls.iter().any(|call| call.expected), "{} has no call to fit to", path.display());
    let error = |costs: &Costs| -> Result<f64> {
        calls.par_iter().filter(|call| call.expected).map(|call| call.error(limits, costs)).sum()
    };
    let mut places = Vec::new();
    numbers(&serde_json::to_value(start)?, "", &mut places);
    let (mut costs, mut least) = (Costs::clone(start), error(start)?);
    report(&calls, limits, start, "before")?;
    for step in STEPS {
        for _ in 0..ROUNDS {
            let before = least;
            for place in &places {
                for factor in [step, 1.0 / step] {
                    let other = scaled(&costs, place, factor)?;
                    let error = error(&other)?;
                    if error < least {
                        (costs, least) = (other, error);
                        break;
                    }
                }
            }
            if least > 0.999 * before {
                break;
            }
        }
    }
    report(&calls, limits, &costs, "fitted")?;
    say!("\nThe table, as host/src/plan/costs.rs has it:\n\n{costs:#?}")?;
    Ok(())
}

/// Says how good a table's choices are.
fn report(calls: &[Call], limits: &DeviceLimits, costs: &Costs, name: &str) -> Result<()> {
    let behind: Vec<f64> = calls.par_iter().map(|call| call.behind(limits, costs)).collect::<Result<_>>()?;
    let mean = behind.iter().sum::<f64>() / behind.len() as f64;
    let worst = behind.iter().copied().fold(1.0, f64::max);
    let far = behind.iter().filter(|behind| **behind > FAR_BEHIND).count();
    say!(
        "{name}: the chosen candidate takes {:.2} % longer than the fastest (mean), {:.0} % at worst; \
         {far} of {} calls more than {:.0} %",
        100.0 * (mean - 1.0),
        100.0 * (worst - 1.0),
        behind.len(),
        100.0 * (FAR_BEHIND - 1.0)
    )?;
    Ok(())
}
