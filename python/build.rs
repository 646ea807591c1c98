//! Keeps the symbols of other crates out of the module's interface.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The driver functions that host/src/cuda/bind.rs defines must not take the place of libcuda's own in the
    // process, which is PyTorch's too. They come from an archive, as everything does but the module's entry.
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
}
