//! Calls through the C interface: a good one, with any of its fields changed to what a caller may get wrong.
//! It is done or refused; refused, it leaves its outputs alone; and never does it end in a bug in the
//! library.
//!
//! What a caller must see to cannot be fuzzed: pointers here are null, misaligned or to memory, and no tensor
//! says that it has more elements than there is memory.

// The sources of the interface, for its structs: the library's own are private.
#[path = "../../capi/src/abi.rs"]
#[allow(dead_code)]
mod layout;

use arbitrary::{Arbitrary, Result, Unstructured};
use layout::{
    Dtype, Expand, ExpertWeights, Forward, MOE_LORA_MAX_SLICES, Projection, Routing, Shrink, Status, Tensor,
    TensorMut, XRows,
};
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

/// Words of a buffer: more than any tensor here says that it has, whatever its type and wherever it starts.
const BUFFER: usize = 1 << 12;
/// Most elements that a tensor says it has.
const MOST: usize = BUFFER / 2;
/// Words after a struct that its `size` may take in.
const TAIL: usize = 4;
/// Most words of a struct.
const WORDS: usize = 48;

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
    kinds(&[&[Size], &TENSOR, &TENSOR, &TENSOR, &[Number], &TENSOR, &TENSOR]);
static FORWARD: [Kind; words::<Forward>()] = kinds(&[
    &[Size, Number, Struct],
    &TENSOR,
    &[Number],
    &SLICES,
    &SLICES,
    &TENSOR,
    &TENSOR,
    &[Number, Number, Number],
]);
static SHRINK: [Kind; words::<Shrink>()] =
    kinds(&[&[Size, Number, Struct], &TENSOR, &[Number], &SLICES, &TENSOR]);
static EXPAND: [Kind; words::<Expand>()] =
    kinds(&[&[Size, Number, Struct], &TENSOR, &SLICES, &TENSOR, &TENSOR, &[Number, Number, Number]]);

impl Words {
    fn new<T>(value: &T, kinds: &'static [Kind]) -> Self {
        let mut words = [0; WORDS];
        assert!(kinds.len() == self::words::<T>() && kinds.len() + TAIL <= WORDS);
        // SAFETY: the struct has no padding: integers and pointers of 8 bytes, or 4 in pairs.
        unsafe { ptr::copy_nonoverlapping(ptr::from_ref(value).cast(), words.as_mut_ptr(), kinds.len()) };
        Words { words, kinds }
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
            Pointer => *u.choose(&[0, *word + 1, *word + 2, *word + 4])?,
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

/// The memory that calls name.
struct Memory {
    ids: Vec<i32>,
    weights: Vec<u32>,
    values: Vec<u32>,
    h: Vec<u32>,
    out: Vec<u32>,
}

const TOKENS: usize = 3;

fn good_projection() -> Projection {
    Projection {
        size: size_of::<Projection>(),
        dtype: Dtype::Bf16 as i32,
        x_rows: XRows::Token as i32,
        a_experts: ExpertWeights::PerExpert as i32,
        b_experts: ExpertWeights::PerExpert as i32,
        top_k: 2,
        experts: 2,
        slots: 2,
        max_rank: 4,
        slices: 1,
        in_dim: 16,
        out_dim: 8,
        out_dims: [0; 4],
    }
}

impl Memory {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let ids: [i8; 16] = u.arbitrary()?;
        Ok(Memory {
            ids: ids.into_iter().cycle().take(BUFFER).map(i32::from).collect(),
            weights: vec![1.0f32.to_bits(); BUFFER],
            // Ones in bf16.
            values: vec![0x3f80_3f80; BUFFER],
            h: vec![0; BUFFER],
            out: vec![0; BUFFER],
        })
    }

    /// `full`: with the tensors that may be left out.
    fn routing(&self, full: bool) -> Routing {
        let ids = |elements| Tensor { data: self.ids.as_ptr().cast(), elements };
        Routing {
            size: size_of::<Routing>(),
            topk_ids: ids(MOST),
            token_lora: ids(MOST),
            adapter_enabled: ids(MOST),
            adapter_enabled_bytes: 4,
            ranks: if full { ids(MOST) } else { ABSENT },
            expert_map: if full { ids(MOST) } else { ABSENT },
        }
    }

    fn forward(&mut self, routing: *const Routing) -> Forward {
        let values = Tensor { data: self.values.as_ptr().cast(), elements: MOST };
        let slices = [values, ABSENT, ABSENT, ABSENT];
        Forward {
            size: size_of::<Forward>(),
            tokens: TOKENS,
            routing,
            x: values,
            x_stride: 0,
            a: slices,
            b: slices,
            topk_weights: Tensor { data: self.weights.as_ptr().cast(), elements: MOST },
            out: TensorMut { data: self.out.as_mut_ptr().cast(), elements: MOST },
            out_stride: 0,
            offset: 0,
            flags: 0,
        }
    }

    fn shrink(&mut self, routing: *const Routing) -> Shrink {
        let Forward { tokens, x, x_stride, a, .. } = self.forward(routing);
        let h = TensorMut { data: self.h.as_mut_ptr().cast(), elements: MOST };
        Shrink { size: size_of::<Shrink>(), tokens, routing, x, x_stride, a, h }
    }

    fn expand(&mut self, routing: *const Routing) -> Expand {
        let Forward { tokens, x, b, topk_weights, out, out_stride, offset, flags, .. } =
            self.forward(routing);
        let size = size_of::<Expand>();
        Expand { size, tokens, routing, h: x, b, topk_weights, out, out_stride, offset, flags }
    }
}

const ABSENT: Tensor = Tensor { data: ptr::null(), elements: 0 };

/// A function's status as a number: whatever it is, it must be one that the header lists.
fn status<S>(status: S) -> i32 {
    assert_eq!(size_of::<S>(), size_of::<i32>());
    // SAFETY: the library's status, of four bytes.
    unsafe { ptr::from_ref(&status).cast::<i32>().read() }
}

fn call(u: &mut Unstructured<'_>) -> Result<()> {
    let mut memory = Memory::new(u)?;
    let function = u.int_in_range(0..=5)?;
    let good = good_projection();
    let mut projection = Words::new(&good, &PROJECTION);
    let mut routing = Words::new(&memory.routing(u.arbitrary()?), &ROUTING);
    let mut call = match function {
        0 | 1 | 5 => Words::new(&memory.forward(routing.pointer()), &FORWARD),
        2 => Words::new(&memory.shrink(routing.pointer()), &SHRINK),
        _ => Words::new(&memory.expand(routing.pointer()), &EXPAND),
    };
    const { assert!(offset_of!(Forward, routing) == offset_of!(Expand, routing)) };
    for _ in 0..u.int_in_range(0..=4)? {
        match u.int_in_range(0..=4)? {
            0 => projection.spoil(u)?,
            1 => routing.spoil(u)?,
            _ => call.spoil(u)?,
        }
    }
    let tokens = if bool::arbitrary(u)? { TOKENS } else { number(u)? as usize };
    let outputs = (memory.h.clone(), memory.out.clone());

    // SAFETY: structs are as long as they say or longer, handles are live or null, and tensors are in
    // `memory`.
    let done = unsafe {
        let (mut context, mut workspace) = (ptr::null_mut(), ptr::null_mut());
        assert_eq!(status(capi::moe_lora_context_create_cpu(&mut context)), Status::Ok as i32);
        let room = if u.arbitrary()? { ptr::from_ref(&good) } else { projection.pointer() };
        let made = status(capi::moe_lora_workspace_create(
            context,
            [room].as_ptr().cast(),
            u.int_in_range(0..=1)?,
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
    assert!((Status::Ok as i32..Status::Internal as i32).contains(&status), "{status}: {:?}", message());
    assert_ne!(status, Status::Driver as i32, "{:?}", message());
    assert!(status == Status::Ok as i32 || !message().is_empty(), "{status} without a message");
}

fn message() -> &'static CStr {
    // SAFETY: never null, and used before the next call.
    unsafe { CStr::from_ptr(capi::moe_lora_last_error()) }
}
