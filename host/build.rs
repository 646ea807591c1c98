//! Satisfies the linker's `-lcuda` on machines without CUDA, for the feature `cust`. Without it there is
//! nothing to do: the kernels are compiled by `moe-lora-prebuilt`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cust")]
    if let Err(error) = write_driver_archive() {
        // Cargo shows what a failed build script wrote to stderr; a panic would bury it.
        eprintln!("\ncannot write an archive for the linker: {error}");
        std::process::exit(1);
    }
}

/// The linker wants a libcuda for `cust_raw`; the functions themselves are looked up in the
/// driver at run time (`src/cuda/bind.rs`). An archive with nothing in it contents the linker.
#[cfg(feature = "cust")]
fn write_driver_archive() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("cuda-stub");
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("libcuda.a"), "!<arch>\n")?;
    println!("cargo::rustc-link-search=native={}", dir.display());
    Ok(())
}
