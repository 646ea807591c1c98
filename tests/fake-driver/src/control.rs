//! What tests ask the driver itself, and tell it.

use crate::calls::*;
use crate::cuda_h::Status;
use crate::state::*;
use std::ffi::c_char;
use std::fmt::Write;

/// Makes a call fail with `code`: always, or the `nth` time from now alone where that is not 0. With code 0
/// it fails no more.
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail(name: *const c_char, code: i32, nth: i32) {
    let Ok(name) = name_of(name) else { return };
    let failures = &mut driver().failures;
    match code {
        0 => drop(failures.remove(name)),
        _ => drop(failures.insert(name.to_owned(), Failure { code: code as Status, nth, calls: 0 })),
    }
}

/// Forgets everything, on all threads, and reads the environment again.
#[unsafe(no_mangle)]
pub extern "C" fn fake_reset() {
    let mut driver = driver();
    let number = driver.number + 1;
    *driver = Driver::new(number);
}

/// Writes the faults, a line each and NUL, as far as they fit into `len` bytes; tells how many bytes they
/// have.
#[unsafe(no_mangle)]
pub extern "C" fn fake_faults(out: *mut c_char, len: usize) -> usize {
    put_text(&driver().faults.join("\n"), out, len)
}

/// How many there are that must be let go of: `memory`, `stream`, `event`, `module`, `graph` (ready to launch
/// or not), `context` (how often contexts are retained). `usize::MAX` for anything else.
#[unsafe(no_mangle)]
pub extern "C" fn fake_live(kind: *const c_char) -> usize {
    let driver = driver();
    match name_of(kind) {
        Ok("memory") => driver.memory.values().filter(|memory| !memory.freed).count(),
        Ok("stream") => driver.streams.live.values().filter(|stream| stream.is_made()).count(),
        Ok("event") => driver.events.live.len(),
        Ok("module") => driver.modules.live.len(),
        Ok("graph") => driver.graphs.live.len() + driver.executables.live.len(),
        Ok("context") => driver.devices.iter().map(|device| device.retained as usize).sum(),
        _ => usize::MAX,
    }
}

/// Writes the log as [`fake_faults`] does: what ran, a line each, in the order of the calls. A line is the
/// kind (`launch`, `copy_to_device`, `copy_to_host`, `memset`, `record`, `wait`, `graph_launch`, whose nodes
/// follow it, `synchronize`, `synchronize_context`) and `key=value` words:
///
/// - `device=0 stream=0x1040 thread=1`, where stream 0 is the device's default stream;
/// - `memory=0x700000000000+64,…`: address and bytes of what it reads or writes; of a launch the
///   allocations that its parameters point into;
/// - `after=3,7`: lines, counted from 1, that ended before this one began, whatever the hardware does: the
///   last of each stream, and so the earlier ones of those streams too. What one thread has waited for has
///   ended for all;
/// - what else there is to say of it: `kernel=`, `grid=`, `block=`, `shared=`, `cluster=`, `event=`.
///
/// What is captured is no part of it until a graph runs it.
#[unsafe(no_mangle)]
pub extern "C" fn fake_log(out: *mut c_char, len: usize) -> usize {
    let mut text = String::new();
    for Entry { device, stream, thread, work, after } in &driver().log {
        let memory: Vec<String> =
            work.memory.iter().map(|(address, len)| format!("{address:#x}+{len}")).collect();
        let after: Vec<String> = after.iter().map(usize::to_string).collect();
        let (kind, memory, after, words) = (work.kind, memory.join(","), after.join(","), &work.words);
        text.push_str(if text.is_empty() { "" } else { "\n" });
        write!(
            text,
            "{kind} device={device} stream={stream:#x} thread={thread} memory={memory} after={after} {words}"
        )
        .expect("strings grow");
    }
    put_text(&text, out, len)
}

/// How many launches ran, those of graphs among them.
#[unsafe(no_mangle)]
pub extern "C" fn fake_launches() -> usize {
    driver().log.iter().filter(|entry| entry.work.kind == "launch").count()
}
