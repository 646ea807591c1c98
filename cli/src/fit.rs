//! `moe-lora tune --fit`: the planner's table of a device, from what was measured there.

use crate::bench::{Case, Record, of_models};
use crate::measure::{Workload, contiguous};
use crate::print::say;
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::cuda::Device;
use moe_lora::plan::{Costs, DeviceLimits, Options, RouteSource, predict};
use moe_lora::{DType, Layout, Projection, ProjectionSizes};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Factors that a constant is tried with, in one round after another.
const STEPS: [f64; 4] = [1.3, 1.15, 1.07, 1.03];
/// Rounds with each factor, at most: one that changes next to nothing is the last.
const ROUNDS: usize = 4;
/// What a constant of zero is tried as, times a factor.
const FROM_ZERO: [f64; 2] = [0.02, 0.2];
/// A predicted time that is longer than the least by this part is chosen e times as rarely: predictions are
/// off by about as much, so a call says something of candidates that are nearly chosen, too.
const TEMPERATURE: f64 = 0.15;
/// The same for calls of models, whose choices are to be right themselves.
const TEMPERATURE_OF_MODELS: f64 = 0.05;
/// As how many calls one of a model counts.
const COUNT_OF_MODELS: f64 = 6.0;
/// As how much an error of a predicted time counts, beside what the choice loses. It keeps constants in place
/// that no choice depends on.
const ERRORS: f64 = 0.01;
/// How much less an error counts, the farther the time is above the call's fastest: a candidate that is never
/// chosen need not be predicted well. One of twice the fastest time counts exp(-2) as much.
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
    /// Whether it is one that `moe-lora bench` lists, of a model.
    of_model: bool,
}

impl Call {
    fn new(record: Record, of_models: &[Case]) -> Result<Self> {
        let projection = Projection::new(record.projection)?;
        let layout = contiguous(&projection, record.tokens, record.rank < record.projection.max_rank);
        let fastest = record.times.values().copied().fold(f64::INFINITY, f64::min);
        let is_it = |case: &Case| {
            let Workload { projection, tokens, rank, choice, .. } = case.workload;
            let sizes = ProjectionSizes { dtype: record.projection.dtype, ..*projection.sizes() };
            (sizes, tokens, rank, choice) == (record.projection, record.tokens, record.rank, record.choice)
        };
        let of_model = of_models.iter().any(is_it);
        Ok(Call { projection, layout, times: record.times.into_iter().collect(), fastest, of_model })
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

    /// What a table is judged by: the part of the fastest time that its choice loses, where each candidate is
    /// chosen the more often the less its predicted time is; and how far predictions are off.
    fn loss(&self, limits: &DeviceLimits, costs: &Costs) -> Result<f64> {
        let (temperature, count) = match self.of_model {
            true => (TEMPERATURE_OF_MODELS, COUNT_OF_MODELS),
            false => (TEMPERATURE, 1.0),
        };
        let times = self.predicted(limits, costs)?;
        let (least, _) = times.first().context("a record without a candidate's time")?;
        let (mut chosen, mut lost, mut off) = (0.0, 0.0, 0.0);
        for &(predicted, measured) in &times {
            let often = (-(predicted / least).ln() / temperature).exp();
            chosen += often;
            lost += often * (measured / self.fastest - 1.0);
            // Square near zero, straight far from it.
            let error = ((predicted / measured).ln() / LARGE_ERROR).powi(2);
            let error = 2.0 * ((1.0 + error).sqrt() - 1.0);
            off += error * (-SHARPNESS * (measured / self.fastest - 1.0)).exp();
        }
        Ok(count * (lost / chosen + ERRORS * off))
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

/// Values that a constant is tried as.
fn tries(constant: f64, step: f64) -> Vec<f64> {
    let tries = match constant {
        0.0 => FROM_ZERO.map(|start| start * step).to_vec(),
        _ if step == STEPS[0] => vec![constant * step, constant / step, 0.0],
        _ => vec![constant * step, constant / step],
    };
    // To four digits, as a table has them.
    tries.into_iter().map(|tried| (tried * 1e4).round() / 1e4).collect()
}

/// `table` with another constant at `place`.
fn with(table: &Value, place: &str, constant: f64) -> Result<Value> {
    let mut table = table.clone();
    *table.pointer_mut(place).context("a place in the table")? = constant.into();
    Ok(table)
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
    let of_models = of_models(DType::Bf16, false)?;
    let (mut calls, mut devices) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()) {
        let at = || format!("{}, line {number}", path.display());
        let record: Record = serde_json::from_str(line).with_context(at)?;
        devices.push(record.device.clone());
        calls.push(Call::new(record, &of_models).with_context(at)?);
    }
    anyhow::ensure!(!calls.is_empty(), "{} has no call to fit to", path.display());
    devices.dedup();
    anyhow::ensure!(devices.len() == 1, "{} is not of one device: {devices:?}", path.display());
    let limits = &limits_of(&devices[0], ordinal)?;
    let loss = |costs: &Costs| -> Result<f64> { calls.par_iter().map(|call| call.loss(limits, costs)).sum() };
    let start = Costs::of(limits);
    report(&calls, limits, start, "before")?;
    let mut places = Vec::new();
    let mut table = serde_json::to_value(start)?;
    numbers(&table, "", &mut places);
    let mut least = loss(start)?;
    let style = ProgressStyle::with_template("{bar:30} {percent} %  {msg}").expect("a valid template");
    let progress = ProgressBar::new((STEPS.len() * ROUNDS * places.len()) as u64).with_style(style);
    for step in STEPS {
        for round in 0..ROUNDS {
            let before = least;
            for place in &places {
                progress.inc(1);
                let constant = table.pointer(place).and_then(Value::as_f64).context("a number")?;
                for tried in tries(constant, step) {
                    let other = with(&table, place, tried)?;
                    let lost = loss(&Costs::deserialize(&other)?)?;
                    if lost < least {
                        (table, least) = (other, lost);
                        progress.set_message(format!("loss {least:.3}"));
                        break;
                    }
                }
            }
            if least > 0.999 * before {
                progress.inc(((ROUNDS - round - 1) * places.len()) as u64);
                break;
            }
        }
    }
    progress.finish_and_clear();
    let costs = Costs::deserialize(&table)?;
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
