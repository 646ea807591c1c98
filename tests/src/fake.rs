//! Tests under a CUDA driver that needs no GPU: `tests/fake-driver`, which says what it plays and what it is
//! told through the environment.
//!
//! A driver is found by name when a process first asks for one, so such a test is a process of its own:
//! [`under`] runs the test again, alone, where `libcuda.so.1` is the fake.

use crate::skip::skipped;
use libloading::Library;
use libtest_mimic::{Arguments, Trial};
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::ffi::{CString, OsString, c_char};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// Set in the processes that [`child`] starts.
const CHILD_VAR: &str = "MOE_LORA_FAKE_CHILD";

/// What a program calls the driver.
pub const LIBRARY: &str = "libcuda.so.1";

/// Which driver is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// One of CUDA 13.0, or whatever `MOE_LORA_FAKE_DRIVER` says.
    New,
    /// One of CUDA 11.8, without the functions that CUDA 12.0 brought.
    Old,
}

/// The folder with the driver, as `libcuda.so.1`. It is compiled at the first call, and kept for later
/// processes.
///
/// # Errors Why it cannot be: there is no `rustc`, or not on this system.
pub fn build(version: Version) -> Result<PathBuf, String> {
    static BUILT: Mutex<Option<HashMap<Version, Result<PathBuf, String>>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    built.get_or_insert_default().entry(version).or_insert_with(|| compile(version)).clone()
}

fn compile(version: Version) -> Result<PathBuf, String> {
    if !cfg!(target_os = "linux") {
        return Err("the fake CUDA driver is for Linux".to_owned());
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("fake-driver/src");
    let texts = read_all(&sources).map_err(|error| format!("{}: {error}", sources.display()))?;
    let source = sources.join("lib.rs");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let asked = Command::new(&rustc).arg("-vV").output();
    let asked = asked.map_err(|error| format!("no compiler for the fake CUDA driver: {rustc:?}: {error}"))?;

    let mut hash = DefaultHasher::new();
    (&texts, &asked.stdout, version).hash(&mut hash);
    let folder = kept_folder().join(format!("{:016x}", hash.finish()));
    if folder.is_dir() {
        return Ok(folder);
    }
    // Other processes may be at the same: what is finished is put in place at once.
    let unfinished = folder.with_extension(std::process::id().to_string());
    let failed = |error: std::io::Error| format!("{}: {error}", unfinished.display());
    fs::create_dir_all(&unfinished).map_err(failed)?;
    let mut compiler = Command::new(&rustc);
    compiler.args(["--crate-type", "cdylib", "--edition", "2024", "-O", "--crate-name", "cuda"]).arg(&source);
    if version == Version::Old {
        compiler.args(["--cfg", "feature=\"old\""]);
    }
    let output = compiler.arg("-o").arg(unfinished.join(LIBRARY)).output().map_err(failed)?;
    if !output.status.success() {
        return Err(format!("{}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr)));
    }
    // Some look for it by the other name, and must find the same library, as beside a real driver.
    #[cfg(unix)]
    std::os::unix::fs::symlink(LIBRARY, unfinished.join("libcuda.so")).map_err(failed)?;
    if fs::rename(&unfinished, &folder).is_err() {
        fs::remove_dir_all(&unfinished).map_err(failed)?;
    }
    if folder.is_dir() { Ok(folder) } else { Err(format!("{} could not be made", folder.display())) }
}

/// The files of a folder, by their names.
fn read_all(folder: &Path) -> std::io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let entries = fs::read_dir(folder)?;
    entries.map(|entry| entry.and_then(|entry| Ok((entry.path(), fs::read(entry.path())?)))).collect()
}

/// Beside what Cargo built, where it deletes it with the rest.
fn kept_folder() -> PathBuf {
    let test = env::current_exe().unwrap_or_default();
    let built = test.parent().filter(|folder| folder.ends_with("deps")).and_then(Path::parent);
    built.map_or_else(env::temp_dir, Path::to_owned).join("fake-driver")
}

/// True in a process that [`child`] started: this test is all that runs in it, under the fake driver.
pub fn is_child() -> bool {
    env::var_os(CHILD_VAR).is_some()
}

/// Runs a test of this program again, alone, in a process where `folder` has the driver, with these variables
/// set.
///
/// # Panics When this program cannot be started.
pub fn child(folder: &Path, test: &str, variables: &[(&str, &str)]) -> Output {
    let mut path = OsString::from(folder);
    if let Some(others) = env::var_os("LD_LIBRARY_PATH") {
        path.push(":");
        path.push(others);
    }
    let program = env::current_exe().expect("this program has a path");
    let mut child = Command::new(program);
    child.args(["--exact", test, "--nocapture"]).env("LD_LIBRARY_PATH", path).env(CHILD_VAR, "1");
    // What fails in it is told by the parent.
    child.env("RUST_BACKTRACE", "0");
    child.envs(variables.iter().copied()).output().expect("this program starts")
}

/// The test called `test` under a driver of this version, with these variables set: in a process that
/// [`child`] started it runs `body`, elsewhere such a process.
///
/// # Errors Where the driver cannot be built, and what the child said where `body` failed.
pub fn under(
    version: Version,
    test: &str,
    variables: &[(&str, &str)],
    body: impl FnOnce(),
) -> Result<(), String> {
    if is_child() {
        body();
        return Ok(());
    }
    let Output { status, stdout, stderr } = child(&build(version)?, test, variables);
    let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    // A name that no test has would pass otherwise.
    if status.success() && said.contains("1 passed") { Ok(()) } else { Err(format!("{status}\n{said}")) }
}

/// A test that [`under`] runs; skipped where the driver cannot be built.
pub fn trial(
    arguments: &Arguments,
    test: &'static str,
    version: Version,
    variables: &'static [(&'static str, &'static str)],
    body: impl FnOnce() + Send + 'static,
) -> Trial {
    match if is_child() { Ok(()) } else { build(version).map(drop) } {
        Ok(()) => Trial::test(test, move || Ok(under(version, test, variables, body)?)),
        Err(why) => skipped(arguments, test, &why),
    }
}

/// What the fake driver tells of itself, and what it can be told.
pub struct Control(Library);

impl Control {
    /// That of this process, which [`child`] started.
    ///
    /// # Panics
    /// When the driver is another.
    pub fn here() -> Self {
        // SAFETY: the fake has no initialisers.
        Self::of(unsafe { Library::new(LIBRARY) }.expect("the fake driver is found"))
    }

    /// That of a driver opened by other means: it keeps the library open.
    ///
    /// # Panics
    /// When the driver is another.
    pub fn of(library: Library) -> Self {
        // SAFETY: only the address is taken.
        unsafe { library.get::<*const ()>(b"fake_reset\0") }.expect("the driver is the fake");
        Control(library)
    }

    /// Makes a call fail, every time.
    pub fn fail(&self, call: &str, code: i32) {
        self.fail_nth(call, code, 0);
    }

    /// Makes the `nth` call from now fail, and no other; any, where that is 0. With code 0 none fails any
    /// more.
    pub fn fail_nth(&self, call: &str, code: i32, nth: i32) {
        let call = CString::new(call).expect("names have no NUL");
        // SAFETY: the signature is the fake's.
        unsafe {
            self.get::<unsafe extern "C" fn(*const c_char, i32, i32)>(b"fake_fail\0")(
                call.as_ptr(),
                code,
                nth,
            );
        }
    }

    /// Makes the driver what it was when it was loaded. Whatever was made with it is gone.
    pub fn reset(&self) {
        // SAFETY: the signature is the fake's.
        unsafe { self.get::<unsafe extern "C" fn()>(b"fake_reset\0")() }
    }

    /// What a correct caller would not have done.
    pub fn faults(&self) -> Vec<String> {
        self.lines(b"fake_faults\0")
    }

    /// How many of a kind there are: `memory`, `stream`, `event`, `module`, `graph`, `context`.
    ///
    /// # Panics
    /// When there is no such kind.
    pub fn live(&self, kind: &str) -> usize {
        let name = CString::new(kind).expect("names have no NUL");
        // SAFETY: the signature is the fake's.
        let count = unsafe {
            self.get::<unsafe extern "C" fn(*const c_char) -> usize>(b"fake_live\0")(name.as_ptr())
        };
        assert_ne!(count, usize::MAX, "there is no kind `{kind}`");
        count
    }

    /// How many launches ran, those of graphs among them.
    pub fn launches(&self) -> usize {
        // SAFETY: the signature is the fake's.
        unsafe { self.get::<unsafe extern "C" fn() -> usize>(b"fake_launches\0")() }
    }

    /// What ran, in the order of the calls.
    pub fn log(&self) -> Log {
        Log(self.lines(b"fake_log\0").iter().map(|line| Entry::parse(line)).collect())
    }

    fn lines(&self, function: &[u8]) -> Vec<String> {
        let function = self.get::<unsafe extern "C" fn(*mut c_char, usize) -> usize>(function);
        let mut text: Vec<u8> = Vec::new();
        loop {
            // SAFETY: the signature is the fake's, and the buffer as long as it is told.
            let len = unsafe { function(text.as_mut_ptr().cast(), text.len()) };
            if len < text.len() {
                text.truncate(len);
                break;
            }
            // With room for NUL.
            text.resize(len + 1, 0);
        }
        String::from_utf8(text).expect("the fake writes UTF-8").lines().map(str::to_owned).collect()
    }

    /// A function of the fake; what it is called with must be its signature.
    fn get<T: Copy>(&self, name: &[u8]) -> T {
        // SAFETY: whoever calls it knows the signature.
        unsafe { *self.0.get::<T>(name).expect("the fake has the function") }
    }
}

/// What ran, by `fake_log`.
#[derive(Clone, Debug, Default)]
pub struct Log(pub Vec<Entry>);

/// Something that ran on a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `launch`, `copy_to_device`, `copy_to_host`, `memset`, `record`, `wait`, `graph_launch`, whose nodes
    /// follow it, `synchronize`, `synchronize_context`.
    pub kind: String,
    /// The device, and its stream: 0 for the default one.
    pub stream: (u32, usize),
    /// The thread that called, from 1.
    pub thread: usize,
    /// Address and bytes of what it reads or writes. Of a launch: the allocations that its parameters point
    /// into.
    pub memory: Vec<(u64, u64)>,
    /// Of each stream, the last entry that comes before this one, whatever the hardware does: from 1, as
    /// lines.
    pub after: Vec<usize>,
    /// What else is said: `kernel`, `grid`, `block`, `shared`, `cluster`, `event`.
    pub words: BTreeMap<String, String>,
}

impl Entry {
    fn parse(line: &str) -> Self {
        let (kind, words) = line.split_once(' ').expect("a kind and words");
        let words = words.split_whitespace().filter_map(|word| word.split_once('='));
        let mut words: BTreeMap<String, String> =
            words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let mut take = |key: &str| words.remove(key).unwrap_or_default();
        let [device, stream, thread, memory, after] =
            ["device", "stream", "thread", "memory", "after"].map(&mut take);
        let hexadecimal =
            |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("an address");
        let items = |list: &str| {
            list.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        let range = |item: &String| {
            let (address, bytes) = item.split_once('+').expect("an address and bytes");
            (hexadecimal(address), bytes.parse().expect("bytes"))
        };
        Entry {
            kind: kind.to_owned(),
            stream: (device.parse().expect("a device"), hexadecimal(&stream) as usize),
            thread: thread.parse().expect("a thread"),
            memory: items(&memory).iter().map(range).collect(),
            after: items(&after).iter().map(|line| line.parse().expect("a line")).collect(),
            words,
        }
    }

    /// The kernel of a launch.
    pub fn kernel(&self) -> Option<&str> {
        self.words.get("kernel").map(String::as_str)
    }

    fn shares_memory(&self, other: &Entry) -> bool {
        let overlap = |a: &(u64, u64), b: &(u64, u64)| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
        self.memory.iter().any(|a| other.memory.iter().any(|b| overlap(a, b)))
    }
}

impl Log {
    /// The kernels that ran.
    pub fn kernels(&self) -> Vec<&str> {
        self.0.iter().filter_map(Entry::kernel).collect()
    }

    /// True when one entry comes before another, whatever the hardware does. Both count from 0.
    pub fn is_before(&self, first: usize, second: usize) -> bool {
        let stream = self.0[first].stream;
        let known = self.0[second].after.iter().map(|line| line - 1);
        first < second && known.clone().any(|entry| self.0[entry].stream == stream && entry >= first)
    }

    /// Entries that share memory, one of which may write it, while neither comes before the other: a race,
    /// unless both are launches that only read what they share.
    pub fn unordered(&self) -> Vec<(usize, usize)> {
        let reads = |entry: &Entry| entry.kind == "copy_to_host";
        let mut pairs = Vec::new();
        for (second, b) in self.0.iter().enumerate() {
            for (first, a) in self.0[..second].iter().enumerate() {
                if a.shares_memory(b) && !(reads(a) && reads(b)) && !self.is_before(first, second) {
                    pairs.push((first, second));
                }
            }
        }
        pairs
    }
}

/// A cubin that the fake driver loads: an ELF file for a GPU with kernels of these names, and nothing in
/// them.
pub fn cubin(kernels: &[&str]) -> Vec<u8> {
    let names: Vec<u8> = kernels.iter().flat_map(|name| format!(".text.{name}\0").into_bytes()).collect();
    const HEADER: usize = 64;
    let mut file = vec![0; HEADER];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let number = |file: &mut [u8], at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // The machine; where section headers are, their bytes and how many.
    number(&mut file, 18, &190u16.to_le_bytes());
    number(&mut file, 40, &((HEADER + names.len()) as u64).to_le_bytes());
    number(&mut file, 58, &64u16.to_le_bytes());
    number(&mut file, 60, &1u16.to_le_bytes());
    let mut section = vec![0; 64];
    number(&mut section, 4, &3u32.to_le_bytes());
    number(&mut section, 24, &(HEADER as u64).to_le_bytes());
    number(&mut section, 32, &(names.len() as u64).to_le_bytes());
    [file, names, section].concat()
}
