//! Which candidate of a call was measured to be the fastest, shape by shape, on one kind of device: a JSON
//! file that `moe-lora tune` writes, and that the library loads. Where it says nothing, the planner chooses
//! on its own.

use crate::error::{Error, Result};
use crate::plan::{self, Options, RouteSource, Stage};
use crate::projection::{Projection, ProjectionSizes};
use crate::whole_file;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// Names the file that `cuda::Device::new` loads.
pub const TUNING_VAR: &str = "MOE_LORA_TUNING";

/// A measured number of tokens stands for calls of at most so many times as many, or as few.
const REACH: f64 = 2.0;

/// What a tuning chooses from for a whole call: the planner's own choice, which forces nothing, and all that
/// it chooses from.
pub fn candidates() -> Vec<Options> {
    std::iter::once(Options::default()).chain(plan::candidates()).collect()
}

/// The fastest candidate of one call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// The sizes of the projection.
    pub projection: ProjectionSizes,
    /// T.
    pub tokens: usize,
    /// One of [`candidates`], written as its [`Options::name`].
    #[serde(serialize_with = "write_candidate", deserialize_with = "read_candidate")]
    pub candidate: Options,
    /// Time of a call with its routing, run so, in microseconds.
    pub microseconds: f64,
    /// The same, run as the planner chooses on its own.
    pub planned_microseconds: f64,
}

/// What was measured on one kind of device, with the kernels of one build.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "File", into = "File")]
pub struct Tuning {
    device: String,
    kernels: String,
    /// By the projection's sizes, then by T.
    tuned: HashMap<ProjectionSizes, BTreeMap<usize, Tuned>>,
    /// The file that it was loaded from, for messages.
    path: Option<String>,
}

/// Two tunings are equal when they say the same, wherever they were loaded from.
impl PartialEq for Tuning {
    fn eq(&self, other: &Self) -> bool {
        let Tuning { device, kernels, tuned, path: _ } = self;
        (device, kernels, tuned) == (&other.device, &other.kernels, &other.tuned)
    }
}

/// The format of the files that this version writes, and reads.
const FORMAT: u32 = 2;

/// What to do about a file that is of no use any more.
const AGAIN: &str = "run `moe-lora tune` again, on another file";

/// The part of a file that says how to read the rest. Files of the first versions had no `format`.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    format: u32,
}

/// A [`Tuning`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// [`FORMAT`].
    format: u32,
    device: String,
    /// The fingerprint of the kernels.
    kernels: String,
    tuned: Vec<Tuned>,
}

impl From<File> for Tuning {
    fn from(file: File) -> Self {
        let mut tuning = Tuning::new(file.device, file.kernels);
        file.tuned.into_iter().for_each(|tuned| tuning.insert(tuned));
        tuning
    }
}

impl From<Tuning> for File {
    fn from(tuning: Tuning) -> Self {
        let mut tuned: Vec<_> = tuning.tuned.into_values().flat_map(BTreeMap::into_values).collect();
        // A file that is written again changes where its contents do, and nowhere else.
        tuned.sort_by_key(|tuned| (format!("{:?}", tuned.projection), tuned.tokens));
        File { format: FORMAT, device: tuning.device, kernels: tuning.kernels, tuned }
    }
}

fn write_candidate<S: Serializer>(candidate: &Options, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(candidate.name("").trim_start())
}

fn read_candidate<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Options, D::Error> {
    let name = String::deserialize(deserializer)?;
    let is_named = |candidate: &Options| candidate.name("").trim_start() == name;
    candidates().into_iter().find(is_named).ok_or_else(|| {
        let names =
            candidates().into_iter().map(|candidate| format!("{:?}", candidate.name("").trim_start()));
        let known = names.collect::<Vec<_>>().join(", ");
        de::Error::custom(format!("unknown candidate {name:?}, expected one of {known}"))
    })
}

impl Tuning {
    /// Of a device of this name, as the driver has it, with the kernels of this fingerprint; nothing was
    /// measured yet.
    pub fn new(device: String, kernels: String) -> Self {
        Tuning { device, kernels, tuned: HashMap::new(), path: None }
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Fingerprint of the kernels.
    pub fn kernels(&self) -> &str {
        &self.kernels
    }

    /// Refuses other kernels than these.
    ///
    /// # Errors
    /// [`Error::Tuning`] where it was measured with others.
    pub fn check_kernels(&self, kernels: &str) -> Result<()> {
        if self.kernels == kernels {
            return Ok(());
        }
        let path = self.path.clone().unwrap_or_else(|| format!("the tuning of {}", self.device));
        let measured = &self.kernels;
        let reason = format!("measured with the kernels {measured}, and these are {kernels}: {AGAIN}");
        Err(Error::Tuning { path, reason })
    }

    /// Takes in a measurement, in place of an older one of the same call.
    pub fn insert(&mut self, tuned: Tuned) {
        self.tuned.entry(tuned.projection).or_default().insert(tuned.tokens, tuned);
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Tuning`] where there is none, or it is none of these, or of another version's format.
    pub fn load(path: &Path) -> Result<Self> {
        let path_name = path.display().to_string();
        let failed = |reason| Error::Tuning { path: path_name.clone(), reason };
        let json = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let Head { format } = serde_json::from_str(&json).map_err(|error| failed(error.to_string()))?;
        if format != FORMAT {
            return Err(failed(format!("of format {format}, expected {FORMAT}: {AGAIN}")));
        }
        let tuning: Self = serde_json::from_str(&json).map_err(|error| failed(error.to_string()))?;
        Ok(Tuning { path: Some(path_name), ..tuning })
    }

    /// Writes a file, or replaces it. Where that fails, it stays as it was.
    ///
    /// # Errors
    /// [`Error::Tuning`] where it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |reason| Error::Tuning { path: path.display().to_string(), reason };
        let json = serde_json::to_string_pretty(self).map_err(|error| failed(error.to_string()))?;
        whole_file::write(path, (json + "\n").as_bytes(), true).map_err(|error| failed(error.to_string()))
    }

    /// The candidate that was fastest for the call nearest to this one: the same projection, and a number of
    /// tokens that is at most twice as large, and at least half. `None` where nothing near was measured, for
    /// half a call, and on blocks of the caller's, which were not measured.
    pub fn fastest(
        &self,
        projection: &Projection,
        tokens: usize,
        stage: Stage,
        route: RouteSource,
    ) -> Option<Options> {
        if matches!(stage, Stage::Shrink | Stage::Expand) || matches!(route, RouteSource::Sorted { .. }) {
            return None;
        }
        let measured = self.tuned.get(projection.sizes())?;
        let (below, above) =
            (measured.range(..=tokens).next_back(), measured.range(tokens.saturating_add(1)..).next());
        let distance =
            |(other, _): &(&usize, &Tuned)| tokens.max(**other) as f64 / tokens.min(**other) as f64;
        let nearest =
            below.into_iter().chain(above).min_by(|one, other| distance(one).total_cmp(&distance(other)));
        nearest.filter(|nearest| distance(nearest) <= REACH).map(|(_, tuned)| tuned.candidate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::projection::{ExpertWeights, OutDims, XRows};

    fn projection(max_rank: usize) -> Projection {
        Projection::new(ProjectionSizes {
            dtype: DType::Bf16,
            top_k: 8,
            experts: 128,
            slots: 2,
            max_rank,
            in_dim: 2048,
            out_dims: OutDims::uniform(768, 2),
            x_rows: XRows::Token,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
        .expect("legal sizes")
    }

    fn tuned(tokens: usize, candidate: Options) -> Tuned {
        let projection = *projection(64).sizes();
        Tuned { projection, tokens, candidate, microseconds: 12.5, planned_microseconds: 14.0 }
    }

    /// Two numbers of tokens of one projection.
    fn tuning() -> Tuning {
        let mut tuning = Tuning::new("a device".to_owned(), "0123".to_owned());
        tuning.insert(tuned(16, candidates()[1]));
        tuning.insert(tuned(100, candidates()[2]));
        tuning
    }

    #[test]
    fn the_nearest_measurement_counts_if_it_is_near() {
        let fastest = |rank, tokens, stage, route| tuning().fastest(&projection(rank), tokens, stage, route);
        let cases = [
            (7, None),
            (8, Some(candidates()[1])),
            (32, Some(candidates()[1])),
            (41, None),
            (50, Some(candidates()[2])),
            (200, Some(candidates()[2])),
            (201, None),
            (usize::MAX, None),
            (0, None),
        ];
        for (tokens, expected) in cases {
            assert_eq!(fastest(64, tokens, Stage::Forward, RouteSource::Made), expected, "{tokens} tokens");
        }
        assert_eq!(fastest(32, 16, Stage::Forward, RouteSource::Made), None);
        assert_eq!(fastest(64, 16, Stage::Shrink, RouteSource::Made), None);
        assert_eq!(fastest(64, 16, Stage::Forward, RouteSource::Sorted { tile_rows: 16 }), None);
        assert_eq!(
            fastest(64, 16, Stage::Forward, RouteSource::Kept { tile_rows: 16, ranked: false }),
            Some(candidates()[1])
        );
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tuning.json");
        let mut whole = tuning();
        (0..).zip(candidates()).for_each(|(tokens, one)| whole.insert(tuned(1000 + tokens, one)));
        whole.save(&path).unwrap();
        assert_eq!(Tuning::load(&path).unwrap(), whole);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tuning.json");
        let message = |json: &str| {
            std::fs::write(&path, json).unwrap();
            Tuning::load(&path).unwrap_err().to_string()
        };
        let good = serde_json::to_string(&tuning()).unwrap();
        let cases = [
            ("{", "EOF"),
            ("{\"format\": 2, \"device\": \"a device\"}", "missing field `kernels`"),
            (
                "{\"device\": \"a device\", \"tuned\": []}",
                "of format 0, expected 2: run `moe-lora tune` again",
            ),
            (
                &good.replace("\"format\":2", "\"format\":1"),
                "of format 1, expected 2: run `moe-lora tune` again",
            ),
            (&good.replace("decode", "encode"), "unknown candidate \"encode m8 cluster1\", expected one of"),
            (&good.replace("max_rank", "rank"), "unknown field `rank`"),
        ];
        for (json, expected) in cases {
            let message = message(json);
            assert!(message.contains(expected) && message.contains("tuning.json"), "{message}");
        }
        let nothing = "{\"format\":2,\"device\":\"a device\",\"kernels\":\"0123\",\"tuned\":[]}";
        std::fs::write(&path, nothing).unwrap();
        let tuning = Tuning::load(&path).unwrap();
        assert!(tuning.check_kernels("0123").is_ok());
        let message = tuning.check_kernels("4567").unwrap_err().to_string();
        let expected =
            "tuning.json: measured with the kernels 0123, and these are 4567: run `moe-lora tune` again";
        assert!(message.contains(expected), "{message}");
        let nowhere = Tuning::load(&dir.path().join("nowhere.json")).unwrap_err();
        assert!(matches!(nowhere, Error::Tuning { .. }));
    }
}
