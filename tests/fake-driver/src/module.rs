//! "Module Management": what images hold, and functions' attributes.

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::launch::volume;
use crate::state::*;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_void};
use std::ptr;

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const u8) -> Status {
    call("cuModuleLoadData", |driver| {
        let handle = driver.load(image).map_err(|(refusal, _)| refusal)?;
        put(module, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const u8,
    count: u32,
    options: *const u32,
    values: *mut *mut c_void,
) -> Status {
    call("cuModuleLoadDataEx", |driver| {
        // CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
        let options = elements(options, count as usize)?;
        let place = |id: u32| options.iter().position(|option| *option == id);
        let values_given = elements(values.cast_const(), count as usize)?;
        let buffer = place(5).map_or(ptr::null_mut(), |i| values_given[i].cast::<c_char>());
        let room = place(6).map_or(0, |i| values_given[i] as u32 as usize);
        let loaded = driver.load(image);
        let log = loaded.as_ref().err().map_or("", |(_, log)| log.as_str());
        let written = put_text(log, buffer, room).min(room.saturating_sub(1));
        if let Some(i) = place(6) {
            // SAFETY: as of any pointer that a caller gives; the size is replaced by what was written.
            unsafe { values.add(i).write(written as *mut c_void) };
        }
        put(module, loaded.map_err(|(refusal, _)| refusal)?)
    })
}

impl Driver {
    /// Loads an image; an error comes with the text for the log of the compiler.
    fn load(&mut self, image: *const u8) -> Result<Handle, (Refusal, String)> {
        let silent = |refusal| (refusal, String::new());
        let device = self.current().map_err(silent)?;
        if !self.lenient {
            self.unsafe_call().map_err(silent)?;
        }
        let first = elements(image, 1).map_err(silent)?[0];
        let image = match first {
            0x7f => self.cubin(image),
            b'.' | b'/' | b' ' | b'\n' => self.ptx(image),
            _ => fault(INVALID_IMAGE, "the image is neither a cubin nor PTX"),
        };
        let image = image.map_err(|refusal| {
            let log = refusal.fault.clone().unwrap_or_else(|| "refused, as the test asked".to_owned());
            (refusal, format!("fatal: {log}"))
        })?;
        let handle = self.handle();
        self.modules.add(handle, Module { device, image, functions: BTreeMap::new() });
        Ok(handle)
    }

    fn cubin(&self, image: *const u8) -> Answer<Image> {
        let image = elf(image)?;
        if let Some(code) = self.refuse_cubin {
            return refuse(code);
        }
        Ok(Image::Cubin(image.to_vec()))
    }

    fn ptx(&self, image: *const u8) -> Answer<Image> {
        let mut len = 0;
        loop {
            // SAFETY: PTX goes on until NUL, and all before it was text.
            let byte = unsafe { image.add(len).read() };
            if byte == 0 {
                break;
            }
            let text = byte.is_ascii_graphic() || byte.is_ascii_whitespace();
            require(text, INVALID_IMAGE, format!("PTX has byte {byte:#x} at {len}: no NUL ends it"))?;
            len += 1;
        }
        if let Some(code) = self.refuse_ptx {
            return refuse(code);
        }
        let text = str::from_utf8(elements(image, len)?).expect("ASCII is UTF-8");
        let word = |directive: &str| {
            let lines = text.lines().map(str::trim_start).take_while(|line| !line.contains(".entry"));
            lines.filter_map(|line| line.strip_prefix(directive)).next()?.split_whitespace().next()
        };
        let version = word(".version").and_then(two_numbers);
        let Some(version) = version else { return fault(INVALID_PTX, "PTX has no .version") };
        let newest = ptx_version(self.version);
        let what = format!("PTX is of version {version:?}, and the driver knows {newest:?}");
        require(version <= newest, UNSUPPORTED_PTX_VERSION, what)?;
        let Some(target) = word(".target") else { return fault(INVALID_PTX, "PTX has no .target") };
        let capability = self.capability;
        let what = format!("PTX is for {target}, the device has capability {capability:?}");
        require(runs_on(target.trim_end_matches(','), capability), INVALID_PTX, what)?;
        Ok(Image::Ptx(kernels(text)))
    }
}

/// The newest PTX that a driver compiles: the PTX manual, "Release Notes".
fn ptx_version(driver: i32) -> (u32, u32) {
    let (major, minor) = ((driver / 1000) as u32, (driver % 1000 / 10) as u32);
    match (major, minor) {
        (12, 6..) => (8, minor - 1),
        _ => (major.saturating_sub(4), minor),
    }
}

/// Whether PTX for a target, as `sm_90a`, may be compiled for a device: the PTX manual, `.target`.
fn runs_on(target: &str, (major, minor): (u32, u32)) -> bool {
    let Some(number) = target.strip_prefix("sm_") else { return false };
    let digits = number.trim_end_matches(['a', 'f']);
    let (Ok(sm), capability) = (digits.parse::<u32>(), major * 10 + minor) else { return false };
    match &number[digits.len()..] {
        "a" => capability == sm,
        "f" => capability >= sm && capability / 10 == sm / 10,
        _ => capability >= sm,
    }
}

/// The entry points of PTX text.
fn kernels(text: &str) -> Vec<Kernel> {
    let starts = text.match_indices(".entry").map(|(at, word)| (at, at + word.len()));
    let commented = |at: usize| text[..at].rsplit('\n').next().is_some_and(|line| line.contains("//"));
    starts.filter(|(at, _)| !commented(*at)).map(|(_, start)| kernel(&text[start..])).collect()
}

/// An entry point, from its name on.
fn kernel(text: &str) -> Kernel {
    let head = text.split(['{', ';']).next().unwrap_or("");
    let (signature, directives) = head.split_once(')').unwrap_or((head, head));
    let (name, parameters) = signature.split_once('(').unwrap_or((signature, ""));
    let name = name.split_whitespace().next().unwrap_or("").to_owned();
    // `.param .align 8 .b8 name[120]`, `.param .u64 name`.
    let bytes = |parameter: &str| {
        let types = parameter.split_whitespace().filter_map(|word| word.strip_prefix(['.']));
        let bits = types
            .filter_map(|word| word.trim_start_matches(['b', 'u', 's', 'f']).parse::<usize>().ok())
            .next_back();
        let count =
            parameter.split_once('[').and_then(|(_, count)| count.split(']').next()?.trim().parse().ok());
        bits.unwrap_or(0) / 8 * count.unwrap_or(1)
    };
    let parameters =
        parameters.split(',').map(str::trim).filter(|text| !text.is_empty()).map(bytes).collect();
    let three = |directive: &str| {
        let text = directives.split_once(directive)?.1;
        let line = text.lines().next().unwrap_or("").split('.').next().unwrap_or("");
        let mut numbers = line.split(',').map(|number| number.trim().parse().unwrap_or(1));
        Some([(); 3].map(|()| numbers.next().unwrap_or(1)))
    };
    Kernel {
        name,
        parameters: Some(parameters),
        most_threads: three(".maxntid"),
        exact_threads: three(".reqntid"),
        exact_cluster: three(".reqnctapercluster"),
    }
}

/// The bytes of an ELF file of 64 bits for a GPU: up to the end of its section headers, sections and
/// segments.
fn elf<'a>(image: *const u8) -> Answer<&'a [u8]> {
    const HEADER: usize = 64;
    const GPU: u64 = 190;
    let number = |bytes: &[u8], at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let start = elements(image, 5)?;
    require(start == b"\x7fELF\x02", INVALID_IMAGE, "the image is no ELF file of 64 bits")?;
    let header = elements(image, HEADER)?;
    require(number(header, 18, 2) == GPU, INVALID_IMAGE, "the ELF file is not for a GPU")?;
    let table = |offset: usize, size: usize, count: usize| {
        [number(header, offset, 8), number(header, size, 2), number(header, count, 2)]
            .map(|number| number as usize)
    };
    let [segments, segment_size, segment_count] = table(32, 54, 56);
    let [sections, section_size, section_count] = table(40, 58, 60);
    let what = "the ELF file has no section headers that make sense";
    require(section_count == 0 || section_size == 64, INVALID_IMAGE, what)?;
    let mut end =
        HEADER.max(segments + segment_size * segment_count).max(sections + section_size * section_count);
    let headers = elements(image, end)?;
    for section in headers[sections..].chunks_exact(64).take(section_count) {
        const EMPTY: u64 = 8;
        if number(section, 4, 4) != EMPTY {
            end = end.max((number(section, 24, 8) + number(section, 32, 8)) as usize);
        }
    }
    elements(image, end)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Status {
    call("cuModuleUnload", |driver| {
        let device = driver.modules.get(module)?.device;
        driver.check_context(device, "the module")?;
        driver.unsafe_call()?;
        driver.modules.remove(module)?;
        driver.functions.remove_all(|function| function.module == module);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> Status {
    call("cuModuleGetFunction", |driver| {
        let Module { device, image, functions } = driver.modules.get(module)?;
        let (device, name) = (*device, name_of(name)?);
        driver.check_context(device, "the module")?;
        require(!name.is_empty(), INVALID_VALUE, "the name is empty")?;
        if let Some(known) = functions.get(name) {
            return put(function, *known);
        }
        let kernel = match image {
            Image::Ptx(kernels) => kernels.iter().find(|kernel| kernel.name == name).cloned(),
            Image::Cubin(bytes) => {
                let section = format!(".text.{name}\0");
                let found = bytes.windows(section.len()).any(|window| window == section.as_bytes());
                found.then(|| Kernel { name: name.to_owned(), ..Kernel::default() })
            }
        };
        let Some(kernel) = kernel else { return refuse(NOT_FOUND) };
        let handle = driver.handle();
        put(function, handle)?;
        driver.modules.get_mut(module)?.functions.insert(name.to_owned(), handle);
        let most_shared = PORTABLE_SHARED;
        driver.functions.add(handle, Function { device, module, kernel, most_shared, large_clusters: false });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: u32, value: c_int) -> Status {
    call("cuFuncSetAttribute", |driver| {
        let most = driver.shared_bytes().0;
        driver.check_context(driver.functions.get(function)?.device, "the function")?;
        let function = driver.functions.get_mut(function)?;
        match attribute {
            8 => {
                let bytes = u32::try_from(value).ok().filter(|bytes| *bytes <= most);
                let Some(bytes) = bytes else {
                    return fault(
                        INVALID_VALUE,
                        format!("{value} bytes of shared memory, where a block has {most}"),
                    );
                };
                function.most_shared = bytes;
            }
            // PREFERRED_SHARED_MEMORY_CARVEOUT, CLUSTER_SCHEDULING_POLICY_PREFERENCE.
            9 | 15 => {}
            14 => function.large_clusters = value != 0,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} cannot be set")),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: *mut c_int, attribute: u32, function: Handle) -> Status {
    call("cuFuncGetAttribute", |driver| {
        let capability = driver.capability;
        let function = driver.functions.get(function)?;
        driver.check_context(function.device, "the function")?;
        let threads = function.kernel.most_threads.or(function.kernel.exact_threads);
        let answer = match attribute {
            // MAX_THREADS_PER_BLOCK, NUM_REGS, PTX_VERSION, BINARY_VERSION.
            0 => threads.map_or(1024, |threads| volume(threads) as c_int),
            4 => 32,
            5 | 6 => (capability.0 * 10 + capability.1) as c_int,
            8 => function.most_shared as c_int,
            14 => c_int::from(function.large_clusters),
            1..=3 | 7 | 10..=13 | 15 => 0,
            9 => -1,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} is none")),
        };
        put(value, answer)
    })
}
