//! Adapter folders from strangers: JSON and safetensors of any bytes are loaded or refused with an error, and
//! what is loaded has the sizes that it says.

use half::{bf16, f16};
use moe_lora::Element;
use moe_lora::adapter::{Adapter, LayerProjection, Stack};
use std::path::Path;
use tempfile::TempDir;

thread_local! {
    /// One folder, written again for each input.
    static FOLDER: TempDir = tempfile::tempdir().expect("room for a folder");
}

/// Loads a folder: two bytes are the length of the configuration, then come that and the weights' file.
///
/// # Panics
/// When loading does, or what is loaded is not of its sizes.
pub fn check(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk() else { return };
    let (config, weights) = rest.split_at(rest.len().min(u16::from_le_bytes(*length).into()));
    FOLDER.with(|folder| {
        let write = |name, bytes| std::fs::write(folder.path().join(name), bytes).expect("room for a file");
        write("adapter_config.json", config);
        write("adapter_model.safetensors", weights);
        load(folder.path());
    });
}

fn load(folder: &Path) {
    let adapter = match Adapter::open(folder) {
        Ok(adapter) => [adapter],
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    for projection in [LayerProjection::W13, LayerProjection::W2] {
        for experts in [None, Some(2)] {
            check_stack::<bf16>(&adapter, projection, experts);
            check_stack::<f16>(&adapter, projection, experts);
        }
    }
}

fn check_stack<T: Element>(adapter: &[Adapter], projection: LayerProjection, experts: Option<usize>) {
    let Ok(stack) = Stack::<T>::load(adapter, 0, projection, 2, experts) else { return };
    let sizes = stack.projection.sizes();
    let matrices = sizes.slots * sizes.experts;
    assert_eq!((stack.a.len(), stack.b.len()), (sizes.out_dims.len(), sizes.out_dims.len()));
    assert!(stack.a.iter().all(|a| a.len() == matrices * sizes.max_rank * sizes.in_dim));
    assert!(stack.b.iter().all(|b| b.len() == matrices * sizes.out_dims.max() * sizes.max_rank));
    assert_eq!(stack.projection.check_ranks(&stack.ranks), Ok(()));
}
