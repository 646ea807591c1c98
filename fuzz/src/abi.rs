//! Calls through the C interface: a good one, with any of its fields changed to what a caller may get wrong.
//! It is done or refused; refused, it leaves its outputs alone; and never does it end in a bug in the
//! library.
//!
//! What a caller must see to cannot be fuzzed: pointers here are null, misaligned or to memory, no tensor
//! says that it has more elements than there is memory, and a table of adapters names matrices as large as
//! the projection has them.

// The sources of the interface, for its structs: the library's own are private.
#[path = "../../capi/src/abi.rs"]
#[allow(dead_code)]
mod layout;

mod memory;

use arbitrary::{Result, Unstructured};
use layout::{Expand, Forward, MOE_LORA_MAX_SLICES, Projection, Routing, Shrink, Status};
use memory::{Form, MOST, Memory, TOKENS};
use moe_lora_capi as capi;
use std::ffi::{CStr, c_void};
use std::mem::offset_of;
use std::ptr;

/// Makes the call that `data` describes.
///
/// # Panics
/// When the library breaks a promise.
pub fn check(data: &[u8]) {
    // Too few bytes describe no call.
    let _ = call(&mut Unstructured::new(data));
}

/// Words after a struct that its `size` may take in.
const TAIL: usize = 4;
/// Most words of a struct.
const WORDS: usize = 64;

/// A struct as words, and what may become of each.
struct Words {
    words: [u64; WORDS],
    kinds: &'static [Kind],
}

/// What a word of a struct is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The struct's `size`.
    Size,
    /// Two enumerations of four bytes.
    Enums,
    /// A count, a stride, flags.
    Number,
    /// Where a tensor starts.
    Pointer,
    /// How many elements it has.
    Elements,
    /// A struct: null or not.
    Struct,
}

const TENSOR: [Kind; 2] = [Kind::Pointer, Kind::Elements];

/// `start`, then what a struct's fields are.
const fn kinds<const N: usize>(fields: &[&[Kind]]) -> [Kind; N] {
    let mut kinds = [Kind::Number; N];
    let (mut field, mut at) = (0, 0);
    while field < fields.len() {
        let mut i = 0;
        while i < fields[field].len() {
            kinds[at] = fields[field][i];
            (at, i) = (at + 1, i + 1);
        }
        field += 1;
    }
    assert!(at == N, "every word has a kind");
    kinds
}

const fn words<T>() -> usize {
    size_of::<T>() / size_of::<u64>()
}

use Kind::{Elements, Enums, Number, Pointer, Size, Struct};
const SLICES: [Kind; 2 * MOE_LORA_MAX_SLICES] =
    [Pointer, Elements, Pointer, Elements, Pointer, Elements, Pointer, Elements];
static PROJECTION: [Kind; words::<Projection>()] =
    kinds(&[&[Size, Enums, Enums], &[Number; 7 + MOE_LORA_MAX_SLICES]]);
static ROUTING: [Kind; words::<Routing>()] =
    kinds(&[&[Size], &TENSOR, &TENSOR, &TENSOR, &[Number], &TENSOR, &TENSOR, &[Number]]);
static FORWARD: [Kind; words::<Forward>()] = kinds(&[
    &[Size, Number, Struct],
    &TENSOR,
    &[Number],
    &SLICES,
    &SLICES,
    &TENSOR,
    &TENSOR,
    &[Number; 3],
    &TENSOR,
    &TENSOR,
    &[Number],
    &TENSOR,
]);
static SHRINK: [Kind; words::<Shrink>()] =
    kinds(&[&[Size, Number, Struct], &TENSOR, &[Number], &SLICES, &TENSOR, &TENSOR, &TENSOR]);
static EXPAND: [Kind; words::<Expand>()] = kinds(&[
    &[Size, Number, Struct],
    &TENSOR,
    &SLICES,
    &TENSOR,
    &TENSOR,
    &[Number; 3],
    &TENSOR,
    &[Number],
    &TENSOR,
]);

impl Words {
    fn new<T>(value: &T, kinds: &'static [Kind]) -> Self {
        let mut words = [0; WORDS];
        assert!(kinds.len() == self::words::<T>() && kinds.len() + TAIL <= WORDS);
        // SAFETY: the struct has no padding: integers and pointers of 8 bytes, or 4 in pairs.
        unsafe { ptr::copy_nonoverlapping(ptr::from_ref(value).cast(), words.as_mut_ptr(), kinds.len()) };
        Words { words, kinds }
    }

    /// The struct, whatever its `size` says.
    fn value<T: Copy>(&self) -> T {
        assert_eq!(self.kinds.len(), self::words::<T>());
        // SAFETY: as many words of integers and pointers, of which any bits are one.
        unsafe { self.pointer::<T>().read() }
    }

    fn pointer<T>(&self) -> *const T {
        self.words.as_ptr().cast()
    }

    /// Changes one word, or one of those after the struct.
    fn spoil(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let at = u.int_in_range(0..=self.kinds.len())?;
        let Some(&kind) = self.kinds.get(at) else {
            self.words[at + u.int_in_range(0..=TAIL - 1)?] = u.arbitrary()?;
            return Ok(());
        };
        let word = &mut self.words[at];
        *word = match kind {
            Size => 8 * u.int_in_range(0..=(self.kinds.len() + TAIL) as u64)?,
            Enums => u64::from(u.int_in_range(0..=3u32)?) << 32 | u64::from(u.int_in_range(0..=3u32)?),
            Number => number(u)?,
            // Null stays null: next to it is no memory.
            Pointer if *word == 0 => 0,
            // However often it is changed, a table never starts within an entry: that would be another table.
            Pointer => *u.choose(&[0, *word | 1, *word | 2, *word | 4])?,
            Elements => u.int_in_range(0..=MOST as u64)?,
            Struct => 0,
        };
        Ok(())
    }
}

/// A number that a caller may mean, or not.
fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=3)? {
        0 => u.int_in_range(0..=8)?,
        1 => u.int_in_range(0..=1100)?,
        2 => (1u64 << u.int_in_range(0..=63)?).wrapping_add_signed(u.int_in_range(-2..=2)?),
        _ => u.arbitrary()?,
    })
}

/// A function's status as a number: whatever it is, it must be one that the header lists.
fn status<S>(status: S) -> i32 {
    assert_eq!(size_of::<S>(), size_of::<i32>());
    // SAFETY: the library's status, of four bytes.
    unsafe { ptr::from_ref(&status).cast::<i32>().read() }
}

fn call(u: &mut Unstructured<'_>) -> Result<()> {
    let mut memory = Memory::new(u)?;
    let function = u.int_in_range(0..=5)?;
    let form = Form::new(u)?;
    let good = form.projection();
    let mut projection = Words::new(&good, &PROJECTION);
    let mut routing = Words::new(&memory.routing(form), &ROUTING);
    let mut call = match function {
        0 | 1 | 5 => Words::new(&memory.forward(form, routing.pointer()), &FORWARD),
        2 => Words::new(&memory.shrink(form, routing.pointer()), &SHRINK),
        _ => Words::new(&memory.expand(form, routing.pointer()), &EXPAND),
    };
    const { assert!(offset_of!(Forward, routing) == offset_of!(Expand, routing)) };
    for _ in 0..u.int_in_range(0..=4)? {
        match u.int_in_range(0..=4)? {
            0 => projection.spoil(u)?,
            1 => routing.spoil(u)?,
            _ => call.spoil(u)?,
        }
    }
    if form.table {
        memory.fill(u, &projection.value())?;
    }
    // Mostly what can be done: without a workspace nothing of a call is looked at.
    let tokens = if u.ratio(3, 4)? { TOKENS } else { number(u)? as usize };
    let outputs = (memory.h.clone(), memory.out.clone());

    // SAFETY: structs are as long as they say or longer, handles are live or null, and tensors are in
    // `memory`.
    let done = unsafe {
        let (mut context, mut workspace) = (ptr::null_mut(), ptr::null_mut());
        assert_eq!(status(capi::moe_lora_context_create_cpu(&mut context)), Status::Ok as i32);
        let room = if u.ratio(1, 2)? { ptr::from_ref(&good) } else { projection.pointer() };
        let made = status(capi::moe_lora_workspace_create(
            context,
            [room].as_ptr().cast(),
            usize::from(u.ratio(7, 8)?),
            tokens,
            &mut workspace,
        ));
        assert_eq!(made == Status::Ok as i32, !workspace.is_null());
        let (stream, projection) = (ptr::null_mut::<c_void>(), projection.pointer::<Projection>().cast());
        let routing = routing.pointer::<Routing>().cast();
        let result = match function {
            0 => status(capi::moe_lora_forward(workspace, stream, projection, call.pointer())),
            1 => {
                let routed = status(capi::moe_lora_route(workspace, stream, projection, tokens, routing));
                known(routed);
                status(capi::moe_lora_forward(workspace, stream, projection, call.pointer()))
            }
            2 => status(capi::moe_lora_shrink(workspace, stream, projection, call.pointer())),
            3 | 4 => status(capi::moe_lora_expand(workspace, stream, projection, call.pointer())),
            _ => {
                let mut text = [1u8; 8];
                let (capacity, mut length) = (u.int_in_range(0..=4)?, 0);
                let start = text.as_mut_ptr().cast();
                let planned =
                    capi::moe_lora_plan(workspace, projection, call.pointer(), start, capacity, &mut length);
                assert!(text[capacity..].iter().all(|&byte| byte == 1), "past the text's capacity");
                status(planned)
            }
        };
        assert_eq!(status(capi::moe_lora_workspace_destroy(workspace)), Status::Ok as i32);
        assert_eq!(status(capi::moe_lora_context_destroy(context)), Status::Ok as i32);
        result
    };
    known(done);
    if done != Status::Ok as i32 || function == 5 {
        assert!((memory.h, memory.out) == outputs, "a call that was refused wrote something");
    }
    Ok(())
}

/// Holds a status against the header, and a refusal's message against nothing.
fn known(status: i32) {
    let listed = (Status::Ok as i32..=Status::WeightsTwice as i32).contains(&status);
    let never = [Status::Internal, Status::Driver].map(|never| never as i32);
    assert!(listed && !never.contains(&status), "{status}: {:?}", message());
    assert!(status == Status::Ok as i32 || !message().is_empty(), "{status} without a message");
}

fn message() -> &'static CStr {
    // SAFETY: never null, and used before the next call.
    unsafe { CStr::from_ptr(capi::moe_lora_last_error()) }
}
