//! `cargo xtask header`

use std::path::PathBuf;

use crate::shell::workspace_root;
use anyhow::{Context, Result, bail, ensure};

/// Write capi/include/moe_lora.h from the sources of the C interface.
///
/// `cargo xtask check` fails while the header in the repository is another.
#[derive(clap::Args)]
pub struct Args {}

/// Carries the command out.
pub fn run(_: &Args) -> Result<()> {
    let path = path();
    std::fs::write(&path, text()?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// Fails when the header is not what the sources say.
pub fn check() -> Result<()> {
    let path = path();
    let found = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(found == text()?, "{} is out of date: run cargo xtask header", path.display());
    Ok(())
}

/// Where the header is.
pub fn path() -> PathBuf {
    workspace_root().join("capi/include/moe_lora.h")
}

fn text() -> Result<String> {
    let capi = workspace_root().join("capi");
    let config = match cbindgen::Config::from_file(capi.join("cbindgen.toml")) {
        Ok(config) => config,
        Err(error) => bail!("capi/cbindgen.toml: {error}"),
    };
    let mut header = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(capi.join("src/abi.rs"))
        .with_src(capi.join("src/device.rs"))
        .with_src(capi.join("src/lib.rs"))
        .generate()
        .context("cbindgen cannot read capi/src")?
        .write(&mut header);
    Ok(String::from_utf8(header)?)
}
