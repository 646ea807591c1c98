//! A PEFT folder: its configuration and the header of its weights, checked.

use super::config::Config;
use super::error::AdapterError;
use super::name::{Name, Side};
use super::target::{LayerProjection, Target};
use crate::tensor_file::TensorFile;
use std::collections::BTreeMap;
use std::path::Path;

/// `a` and `b` of one expert's projection: what the file calls them and what the header says of them.
#[derive(Debug)]
pub(super) struct Lora {
    pub a: String,
    pub b: String,
    pub rank: usize,
    pub in_dim: usize,
    pub out_dim: usize,
    pub scaling: f32,
}

/// An adapter whose configuration and header have been checked. Its weights are still on disk.
#[derive(Debug)]
pub struct Adapter {
    pub(super) config: Config,
    pub(super) file: TensorFile,
    loras: BTreeMap<Target, Lora>,
}

impl Adapter {
    /// Opens a PEFT adapter folder.
    ///
    /// # Errors
    /// Every [`AdapterError`] that can be found without reading weights.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, AdapterError> {
        let folder = folder.as_ref();
        let config = Config::read(&folder.join("adapter_config.json"))?;
        let (weights, pickle) = (folder.join("adapter_model.safetensors"), folder.join("adapter_model.bin"));
        if !weights.exists() && pickle.exists() {
            return Err(AdapterError::Pickled { path: pickle });
        }
        let file = TensorFile::open(weights)?;
        let loras = loras(&file, &config)?;
        Ok(Adapter { config, file, loras })
    }

    /// The file that holds the weights.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The matrices of one layer.
    pub(super) fn layer(&self, layer: usize) -> impl Iterator<Item = (&Target, &Lora)> + Clone {
        self.loras.iter().filter(move |(target, _)| target.layer == layer)
    }

    /// The matrices of one projection of one layer.
    pub(super) fn of(
        &self,
        layer: usize,
        projection: LayerProjection,
    ) -> impl Iterator<Item = (&Target, &Lora)> + Clone {
        self.layer(layer).filter(move |(target, _)| projection.modules().contains(&target.module))
    }
}

/// Finds the experts' matrices by their names and checks them against the configuration.
fn loras(file: &TensorFile, config: &Config) -> Result<BTreeMap<Target, Lora>, AdapterError> {
    let mut sides = BTreeMap::<(Target, Side), &str>::new();
    for tensor in file.names() {
        match Name::parse(tensor) {
            Name::Elsewhere => {}
            Name::Unknown => {
                return Err(AdapterError::UnknownTensor { path: file.path().into(), tensor: tensor.into() });
            }
            Name::Expert(target, side) => {
                if let Some(first) = sides.insert((target, side), tensor) {
                    let (path, first, second) = (file.path().into(), first.into(), tensor.into());
                    return Err(AdapterError::Duplicate { path, first, second });
                }
            }
        }
    }
    let unpaired = |tensor: &str| AdapterError::Unpaired { path: file.path().into(), tensor: tensor.into() };
    let mut loras = BTreeMap::new();
    for (&(target, side), &tensor) in &sides {
        let &other = sides.get(&(target, side.other())).ok_or_else(|| unpaired(tensor))?;
        if side == Side::B {
            continue; // Seen with its A.
        }
        let (a, b) = (tensor, other);
        let module = Name::module(a);
        let rank = config.rank(module);
        let [a_rank, in_dim] = file.matrix(a, "[r, K]")?;
        let [out_dim, b_rank] = file.matrix(b, "[N, r]")?;
        if a_rank != rank || in_dim == 0 {
            return Err(file.shape_error(a, format!("[r, K] with r = {rank}")).into());
        }
        if b_rank != rank || out_dim == 0 {
            return Err(file.shape_error(b, format!("[N, r] with r = {rank}")).into());
        }
        let scaling = config.scaling(module);
        loras.insert(target, Lora { a: a.into(), b: b.into(), rank, in_dim, out_dim, scaling });
    }
    Ok(loras)
}
