//! Where NVIDIA's tools are looked for. All of them are optional: what works without them, and what
//! does not, is told in `docs/CODEGEN.md`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::sources::workspace;

/// Where this project keeps tools of its own; `cargo xtask` fills it. `None` outside of the workspace.
pub fn project_dir() -> Option<PathBuf> {
    Some(workspace()?.join("target/cuda-tools"))
}

/// Where `program` may be: what `variable` names and nothing else, or, where that is not set, the
/// `PATH`, the CUDA toolkits, and this project's own.
pub(crate) fn candidates(variable: &str, program: &str) -> Vec<PathBuf> {
    if let Some(named) = set(variable) {
        return vec![named.into()];
    }
    let path = set("PATH").unwrap_or_default();
    let mut candidates: Vec<_> =
        std::env::split_paths(&path).map(|dir| dir.join(program)).filter(|path| path.is_file()).collect();
    candidates.extend(toolkits().into_iter().map(|dir| dir.join("bin").join(program)));
    candidates.extend(project_dir().map(|dir| dir.join(program)));
    candidates
}

/// The CUDA toolkits: `$CUDA_HOME`, `$CUDA_PATH`, those on the `PATH`, and those under `/usr/local`, the
/// newest first as far as names tell.
pub(crate) fn toolkits() -> Vec<PathBuf> {
    let mut toolkits: Vec<PathBuf> =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).map(PathBuf::from).collect();
    let path = set("PATH").unwrap_or_default();
    toolkits.extend(
        std::env::split_paths(&path)
            .filter(|dir| dir.join("nvcc").is_file())
            .filter_map(|bin| Some(bin.parent()?.to_owned())),
    );
    let mut installed: Vec<_> = std::fs::read_dir("/usr/local")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda")))
        .collect();
    installed.sort();
    toolkits.extend(installed.into_iter().rev());
    toolkits
}

/// `13.0.88` from `Cuda compilation tools, release 13.0, V13.0.88`, the line that all of the tools write.
pub(crate) fn parse_version(text: &str) -> Option<&str> {
    let (_, version) = text.split_once("release ")?.1.split_once(", V")?;
    version.split_whitespace().next()
}

/// An environment variable that is set, and not to nothing.
pub(crate) fn set(variable: &str) -> Option<OsString> {
    std::env::var_os(variable).filter(|value| !value.is_empty())
}

/// What was looked at in vain, a line each.
pub(crate) fn list(looked: &[(PathBuf, String)]) -> String {
    looked.iter().map(|(path, reason)| format!("\n  {}: {reason}", path.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_parse() {
        let text = "ptxas: NVIDIA (R) Ptx optimizing assembler\n\
                    Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0\n";
        assert_eq!(parse_version(text), Some("13.0.88"));
        assert_eq!(parse_version("// Cuda compilation tools, release 13.5, V13.5.37\n//"), Some("13.5.37"));
        assert_eq!(parse_version("no such"), None);
    }
}
