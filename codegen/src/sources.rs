//! The kernels' sources and entry points, and where the workspace and its target directory lie.

use std::path::Path;

use crate::arch::Arch;

/// The entry points that a module for `arch` must have.
pub fn entries(arch: Arch) -> Vec<moe_lora_kernels::Entry> {
    let capability = arch.capability();
    let on = |entry: &&moe_lora_kernels::Entry| entry.is_on(capability);
    let of = |entry: &moe_lora_kernels::Entry| moe_lora_kernels::Entry {
        min_blocks: entry.min_blocks_on(capability),
        ..*entry
    };
    moe_lora_kernels::ENTRIES.iter().filter(on).map(of).collect()
}

/// The moe-lora workspace that this crate was compiled in, and `None` for a crate that Cargo has unpacked
/// from a registry: what `cargo xtask` puts below `target/` is looked for in the former alone.
pub fn workspace() -> Option<&'static Path> {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    // An unpacked crate has other crates beside it too, in folders named after them.
    parent.join("kernels-gpu/Cargo.toml").is_file().then_some(parent)
}

/// The sources of the kernels: a build script watches this folder.
pub fn kernel_sources() -> &'static Path {
    Path::new(moe_lora_kernels::SOURCES)
}

/// The Cargo target directory that `path` lies in: the nearest folder above it that Cargo has marked as a
/// cache, which it does where it makes the folder itself, or left what it knows of rustc in. Build scripts
/// ask for the one around `OUT_DIR`, programs for their own.
pub fn target_dir_around(path: &Path) -> Option<&Path> {
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    path.ancestors().find(|dir| marks.iter().any(|mark| dir.join(mark).is_file()))
}
