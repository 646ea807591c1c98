//! Which way to run a call was measured to be fastest, shape by shape, on one kind of device: a JSON file that
//! `moe-lora tune` writes, and that the library loads. Where it says nothing, the planner's own rules apply.

use crate::error::{Error, Result};
use crate::plan::{DecodeRows, Form, Options, PrefillTile, RouteSource, Stage, TileKind};
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

/// The ways to run a whole call that a tuning chooses from: as planned, and with every form, tile and cluster.
pub fn ways() -> Vec<Options> {
    let mut ways = vec![Options::default()];
    for rows in DecodeRows::ALL {
        ways.extend([1, 2, 4, 8].map(|cluster| Options {
            form: Some(Form::Decode),
            rows: Some(rows),
            cluster: Some(cluster),
            ..Options::default()
        }));
    }
    let prefills = PrefillTile::ALL.map(|tile| [Form::Prefill(tile), Form::SharedPrefill(tile)]);
    let prefills = prefills.into_iter().flatten();
    ways.extend(prefills.map(|form| Options { form: Some(form), ..Options::default() }));
    let tiles = [TileKind::M16, TileKind::M32, TileKind::M64];
    ways.extend(tiles.map(|tile| Options { tile: Some(tile), ..Options::default() }));
    ways.push(Options { form: Some(Form::TwoLaunches), ..Options::default() });
    ways
}

/// The fastest way of one call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// The sizes of the projection.
    pub projection: ProjectionSizes,
    /// T.
    pub tokens: usize,
    /// One of [`ways`], written as its [`Options::name`].
    #[serde(serialize_with = "write_way", deserialize_with = "read_way")]
    pub way: Options,
    /// Time of a call with its routing, run in this way, in microseconds.
    pub microseconds: f64,
    /// The same, run as the planner's own rules choose.
    pub planned_microseconds: f64,
}

/// What was measured on one kind of device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "File", into = "File")]
pub struct Tuning {
    device: String,
    /// By the projection's sizes, then by T.
    tuned: HashMap<ProjectionSizes, BTreeMap<usize, Tuned>>,
}

/// A [`Tuning`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: String,
    tuned: Vec<Tuned>,
}

impl From<File> for Tuning {
    fn from(file: File) -> Self {
        let mut tuning = Tuning::new(file.device);
        file.tuned.into_iter().for_each(|tuned| tuning.insert(tuned));
        tuning
    }
}

impl From<Tuning> for File {
    fn from(tuning: Tuning) -> Self {
        let mut tuned: Vec<_> = tuning.tuned.into_values().flat_map(BTreeMap::into_values).collect();
        // A file that is written again changes where its contents do, and nowhere else.
        tuned.sort_by_key(|tuned| (format!("{:?}", tuned.projection), tuned.tokens));
        File { device: tuning.device, tuned }
    }
}

fn write_way<S: Serializer>(way: &Options, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(way.name("").trim_start())
}

fn read_way<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Options, D::Error> {
    let name = String::deserialize(deserializer)?;
    let named = |way: &Options| way.name("").trim_start() == name;
    ways().into_iter().find(named).ok_or_else(|| {
        let known: Vec<_> = ways().iter().map(|way| format!("{:?}", way.name("").trim_start())).collect();
        de::Error::custom(format!("unknown way {name:?}, expected one of {}", known.join(", ")))
    })
}

impl Tuning {
    /// Of a device of this name, as the driver has it; nothing was measured yet.
    pub fn new(device: String) -> Self {
        Tuning { device, tuned: HashMap::new() }
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Takes in a measurement, in place of an older one of the same call.
    pub fn insert(&mut self, tuned: Tuned) {
        self.tuned.entry(tuned.projection).or_default().insert(tuned.tokens, tuned);
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Tuning`] where there is none, or it is none of these.
    pub fn load(path: &Path) -> Result<Self> {
        let failed = |reason| Error::Tuning { path: path.display().to_string(), reason };
        let json = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        serde_json::from_str(&json).map_err(|error| failed(error.to_string()))
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

    /// The way that was fastest for the call nearest to this one: the same projection, and a number of tokens that is at
    /// most twice as large, and at least half. `None` where nothing near was measured, for half a call, and on blocks of
    /// the caller's, which were not measured.
    pub fn way(
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
        nearest.filter(|nearest| distance(nearest) <= REACH).map(|(_, tuned)| tuned.way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::projection::{ExpertWeights, XRows};

    fn projection(max_rank: usize) -> Projection {
        Projection::new(ProjectionSizes {
            dtype: DType::Bf16,
            top_k: 8,
            experts: 128,
            slots: 2,
            max_rank,
            slices: 2,
            in_dim: 2048,
            out_dim: 768,
            x_rows: XRows::Token,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
        .expect("legal sizes")
    }

    fn tuned(tokens: usize, way: Options) -> Tuned {
        let projection = *projection(64).sizes();
        Tuned { projection, tokens, way, microseconds: 12.5, planned_microseconds: 14.0 }
    }

    /// Two numbers of tokens of one projection.
    fn tuning() -> Tuning {
        let mut tuning = Tuning::new("a device".to_owned());
        tuning.insert(tuned(16, ways()[1]));
        tuning.insert(tuned(100, ways()[2]));
        tuning
    }

    #[test]
    fn the_nearest_measurement_counts_if_it_is_near() {
        let way = |rank, tokens, stage, route| tuning().way(&projection(rank), tokens, stage, route);
        let cases = [
            (7, None),
            (8, Some(ways()[1])),
            (32, Some(ways()[1])),
            (41, None),
            (50, Some(ways()[2])),
            (200, Some(ways()[2])),
            (201, None),
            (usize::MAX, None),
            (0, None),
        ];
        for (tokens, expected) in cases {
            assert_eq!(way(64, tokens, Stage::Forward, RouteSource::Made), expected, "{tokens} tokens");
        }
        assert_eq!(way(32, 16, Stage::Forward, RouteSource::Made), None);
        assert_eq!(way(64, 16, Stage::Shrink, RouteSource::Made), None);
        assert_eq!(way(64, 16, Stage::Forward, RouteSource::Sorted { tile_rows: 16 }), None);
        assert_eq!(way(64, 16, Stage::Forward, RouteSource::Kept { tile_rows: 16 }), Some(ways()[1]));
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tuning.json");
        let mut whole = tuning();
        (0..).zip(ways()).for_each(|(tokens, way)| whole.insert(tuned(1000 + tokens, way)));
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
            ("{\"device\": \"a device\"}", "missing field `tuned`"),
            (&good.replace("decode", "encode"), "unknown way \"encode m8 cluster1\", expected one of"),
            (&good.replace("max_rank", "rank"), "unknown field `rank`"),
        ];
        for (json, expected) in cases {
            let message = message(json);
            assert!(message.contains(expected) && message.contains("tuning.json"), "{message}");
        }
        let nowhere = Tuning::load(&dir.path().join("nowhere.json")).unwrap_err();
        assert!(matches!(nowhere, Error::Tuning { .. }));
    }
}
