//! The program as its users run it: exit codes, what is printed where, and what is left on the disk.

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// Commands that print and end soon, on any machine.
const PRINTING: [&[&str]; 7] = [
    &["--help"],
    &["--version"],
    &["help", "run"],
    &["verify", "--help"],
    &["info"],
    &["demo", "--tokens", "1", "--rank", "1", "--backend", "cpu"],
    &["verify", "--backend", "cpu", "--case", "{}"],
];

fn moe_lora() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_moe-lora"));
    program.stdin(Stdio::null());
    program
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/olmoe")
}

/// A folder with an input in it.
struct Files {
    dir: TempDir,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Files {
    fn new() -> Self {
        let files = Files { dir: tempfile::tempdir().expect("a folder"), tensors: read(&recorded()) };
        files.write();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn input(&self) -> PathBuf {
        self.path("input.safetensors")
    }

    fn output(&self) -> PathBuf {
        self.path("output.safetensors")
    }

    fn write(&self) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape says"))
        });
        serialize_to_file(views, None, &self.input()).expect("the input");
    }

    /// Gives a tensor of the input another type, and zeros but for one element.
    fn set(&mut self, tensor: &str, dtype: Dtype, at: usize, value: f32) {
        let (own, shape, bytes) = self.tensors.get_mut(tensor).expect("a tensor");
        let element = match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            other => panic!("{other}"),
        };
        *own = dtype;
        *bytes = vec![0; shape.iter().product::<usize>() * element.len()];
        bytes[at * element.len()..][..element.len()].copy_from_slice(&element);
        self.write();
    }

    /// What is in the folder.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("a folder");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort_unstable();
        names
    }

    /// `moe-lora run` on the input, to the output.
    fn run(&self, arguments: &[&str]) -> Output {
        self.run_on(&self.input(), &self.output(), arguments).output().expect("the program")
    }

    fn run_on(&self, input: &Path, output: &Path, arguments: &[&str]) -> Command {
        let mut run = moe_lora();
        run.current_dir(self.dir.path()).args([
            "run",
            "--layer",
            "0",
            "--projection",
            "w13",
            "--backend",
            "cpu",
        ]);
        for adapter in ["r4", "r8_rslora"] {
            run.arg("--adapter").arg(fixtures().join(adapter));
        }
        run.arg("--input").arg(input).arg("--output").arg(output).args(arguments);
        run
    }
}

fn recorded() -> PathBuf {
    fixtures().join("run_w13.safetensors")
}

fn read(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).expect("a file");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file").tensors();
    let parts = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    // A recorded result is no part of the input, in which `out` is what is added to.
    let inputs = tensors.into_iter().filter(|(name, _)| !name.starts_with("out"));
    inputs.map(|(name, view)| (name, parts(view))).collect()
}

#[track_caller]
fn succeeds(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// The program ended with code 1 and told why, in words that hold all of `parts`.
#[track_caller]
fn fails(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
    }
}

/// Runs a command whose output nobody reads.
fn unread(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program");
    drop(child.stdout.take());
    child.wait_with_output().expect("the program")
}

#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    for arguments in PRINTING {
        let output = unread(moe_lora().args(arguments));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
    let files = Files::new();
    succeeds(&unread(&mut files.run_on(&files.input(), &files.output(), &["--dtype", "bf16"])));
    assert!(files.output().is_file());
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = || File::create("/dev/full").expect("/dev/full");
    for arguments in PRINTING {
        let output = moe_lora().args(arguments).stdout(full()).output().expect("the program");
        fails(&output, &["cannot write to standard output: No space left on device"]);
    }
    // Nor is it a panic where the error itself cannot be told.
    for (arguments, code) in [(&["run"][..], 2), (&["demo", "--rank", "0"], 1)] {
        let output = moe_lora().args(arguments).stderr(full()).output().expect("the program");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn arguments_that_make_no_sense_end_with_code_2() {
    for (arguments, part) in [
        (&[][..], "Usage: moe-lora <COMMAND>"),
        (&["dance"], "error: unrecognized subcommand 'dance'"),
        (&["run", "--layer", "x"], "error: invalid value 'x' for '--layer <LAYER>'"),
        (&["demo", "--tokens", "0"], "error: invalid value '0' for '--tokens <TOKENS>'"),
        (&["verify", "--case", "{\"tokens\""], "error: invalid value '{\"tokens\"' for '--case <JSON>'"),
        #[cfg(feature = "cuda")]
        (&["tune", "file.json"], "error: which layer? give --model, or all of --hidden"),
        #[cfg(feature = "cuda")]
        (&["tune", "--hidden", "8", "--top-k", "2", "file.json"], "give --model, or all of --hidden"),
    ] {
        let output = moe_lora().args(arguments).output().expect("the program");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(part), "{part:?} is not in: {stderr}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }
}

#[test]
fn sizes_that_are_refused_are_refused_before_anything_is_printed() {
    for arguments in [["demo", "--rank", "0"], ["demo", "--tokens", "1,4000000000"]] {
        let output = moe_lora().args(arguments).output().expect("the program");
        fails(&output, &["expected at"]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_output() {
    let files = Files::new();
    let before = files.names();
    let limited = |arguments: &[&str]| {
        let run = files.run_on(&files.input(), &files.output(), arguments);
        // As many blocks as no file may have: writing fails as on a full disk, and no signal comes.
        Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\""])
            .arg(run.get_program())
            .args(run.get_args())
            .output()
            .expect("sh")
    };
    fails(&limited(&[]), &["cannot write", "output.safetensors", "File too large"]);
    assert_eq!(files.names(), before);
    succeeds(&files.run(&[]));

    let whole = fs::read(files.output()).expect("the output");
    fails(
        &limited(&["--force", "--dtype", "f16"]),
        &["cannot write", "output.safetensors", "File too large"],
    );
    assert_eq!(fs::read(files.output()).expect("the output"), whole);
}

#[test]
fn an_output_that_exists_is_replaced_only_by_force() {
    let files = Files::new();
    fs::write(files.output(), "precious").expect("a file");
    fails(&files.run(&[]), &["output.safetensors exists: --force replaces it"]);
    assert_eq!(fs::read(files.output()).expect("the file"), b"precious");
    succeeds(&files.run(&["--force"]));
    assert!(SafeTensors::deserialize(&fs::read(files.output()).expect("the output")).is_ok());
    assert_eq!(files.names(), ["input.safetensors", "output.safetensors"]);

    let nowhere = files.run_on(&files.input(), Path::new("no/output.safetensors"), &[]).output();
    fails(&nowhere.expect("the program"), &["cannot write no/output.safetensors: No such file or directory"]);
}

#[test]
fn no_file_that_is_read_is_replaced() {
    let files = Files::new();
    let input = fs::read(files.input()).expect("the input");
    let refused = |output: &Path, arguments: &[&str]| {
        let refused = files.run_on(&files.input(), output, arguments).output().expect("the program");
        fails(&refused, &["is the same file as", "which is read: write to another"]);
        assert_eq!(fs::read(files.input()).expect("the input"), input);
    };
    for arguments in [&["--force"][..], &[]] {
        refused(&files.input(), arguments);
        refused(
            Path::new("../").join(files.dir.path().file_name().unwrap()).join("input.safetensors").as_path(),
            arguments,
        );
    }
    fs::hard_link(files.input(), files.path("linked")).expect("a link");
    refused(&files.path("linked"), &["--force"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("input.safetensors", files.path("symlinked")).expect("a link");
        refused(&files.path("symlinked"), &["--force"]);
    }
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let file = fixtures().join("r4").join(file);
        let before = fs::read(&file).expect("a file of the adapter");
        refused(&file, &["--force"]);
        assert_eq!(fs::read(&file).expect("the file"), before);
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_their_place() {
    let large = "which is not a finite number in f16: --dtype bf16 has the range of F32\n";
    // T = 24, k = 2, H = 32, two slices of 24.
    for (tensor, dtype, at, value, arguments, parts) in [
        ("x", Dtype::F32, 3 * 32 + 17, 1e5, &["--dtype", "f16"][..], &["x[3, 17] is 100000.0, ", large][..]),
        ("x", Dtype::BF16, 23 * 32, 1e5, &["--dtype", "f16"], &["x[23, 0] is 99840.0, ", large]),
        (
            "x",
            Dtype::F32,
            0,
            f32::MAX,
            &["--dtype", "bf16"],
            &["x[0, 0] is 3.4028235e38,", "number in bf16\n"],
        ),
        ("x", Dtype::BF16, 31, f32::NAN, &[], &["x[0, 31] is NaN, which is not a finite number in bf16\n"]),
        ("x", Dtype::F16, 32, f32::INFINITY, &[], &["x[1, 0] is inf, which is not a finite number in f16\n"]),
        (
            "topk_weights",
            Dtype::F32,
            5,
            f32::NEG_INFINITY,
            &["--mul-routed-weight", "true"],
            &["topk_weights[2, 1] is -inf, which is not a finite number in f32\n"],
        ),
    ] {
        let mut files = Files::new();
        if tensor == "topk_weights" {
            files.tensors.insert("topk_weights".into(), (Dtype::F32, vec![24, 2], vec![0; 24 * 2 * 4]));
        }
        files.set(tensor, dtype, at, value);
        let output = files.run(arguments);
        fails(&output, parts);
        fails(&output, &["input.safetensors: "]);
        assert_eq!(files.names(), ["input.safetensors"]);
    }

    let mut files = Files::new();
    files.tensors.insert("out".into(), (Dtype::F32, vec![24, 2, 48], Vec::new()));
    files.set("out", Dtype::F32, 48 + 1, 1e5);
    fails(&files.run(&["--dtype", "f16"]), &["out[0, 1, 1] is 100000.0, ", large]);
    succeeds(&files.run(&["--dtype", "bf16"]));
}

#[test]
fn a_result_that_is_not_finite_is_not_written() {
    let mut files = Files::new();
    let (_, shape, _) = &files.tensors["x"];
    let x = vec![6e4f32; shape.iter().product()];
    let x = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    files.tensors.insert("x".into(), (Dtype::F32, shape.clone(), x));
    files.write();
    let output = files.run(&["--dtype", "f16"]);
    fails(&output, &["error: out[", "comes out as ", " in f16: ", "nothing was written", "--dtype bf16 has"]);
    assert_eq!(files.names(), ["input.safetensors"]);
    succeeds(&files.run(&["--dtype", "bf16"]));
}

#[cfg(unix)]
#[test]
fn an_input_may_come_through_a_pipe() {
    let files = Files::new();
    succeeds(&files.run(&[]));
    let expected = fs::read(files.output()).expect("the output");
    for name in ["-", "/dev/stdin"] {
        let piped = files.path("piped");
        let mut run = files.run_on(Path::new(name), &piped, &[]);
        let mut child = run
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        let input = fs::read(files.input()).expect("the input");
        child.stdin.take().expect("a pipe").write_all(&input).expect("a reader");
        succeeds(&child.wait_with_output().expect("the program"));
        assert_eq!(fs::read(&piped).expect("the output"), expected);
        fs::remove_file(piped).expect("a file");
    }

    let open = || File::open(files.input()).expect("the input");
    let mut run = files.run_on(Path::new("-"), &files.path("redirected"), &[]);
    succeeds(&run.stdin(open()).output().expect("the program"));
    assert_eq!(fs::read(files.path("redirected")).expect("the output"), expected);
    let mut run = files.run_on(Path::new("-"), &files.input(), &["--force"]);
    fails(&run.stdin(open()).output().expect("the program"), &["is the same file as /dev/stdin"]);

    let empty = files.run_on(Path::new("-"), &files.path("empty"), &[]).output().expect("the program");
    fails(&empty, &["/dev/stdin is a device, expected a regular file"]);
    let folder = files.run_on(files.dir.path(), &files.path("folder"), &[]).output().expect("the program");
    fails(&folder, &["is a folder, expected a regular file"]);
}

#[cfg(unix)]
#[test]
fn an_adapter_that_is_a_pipe_is_refused_and_not_waited_for() {
    let files = Files::new();
    let adapter = files.path("adapter");
    fs::create_dir(&adapter).expect("a folder");
    fs::copy(fixtures().join("r4/adapter_config.json"), adapter.join("adapter_config.json")).expect("a copy");
    let pipe = adapter.join("adapter_model.safetensors");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let mut run = files.run_on(&files.input(), &files.output(), &["--adapter"]);
    let output = run.arg(&adapter).output().expect("the program");
    fails(&output, &["adapter_model.safetensors is a pipe, expected a regular file"]);
}
