//! The functions of the library, opened as any program would.

use crate::abi::{Expand, Forward, Projection, Routing, Shrink, Status};
use libloading::Library;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::ptr;

/// What is behind a `moe_lora_context *`.
pub enum Context {}
/// What is behind a `moe_lora_workspace *`.
pub enum Workspace {}

/// A function that runs a call.
type Run<C> = unsafe extern "C" fn(*mut Workspace, *mut c_void, *const Projection, *const C) -> Status;

macro_rules! functions {
    ($($name:ident: $symbol:ident: $type:ty,)*) => {
        /// The library's functions.
        pub struct Functions {
            $(pub $name: $type,)*
            _library: Library,
        }

        /// Their names, sorted.
        pub const NAMES: &[&str] = &[$(stringify!($symbol),)*];

        impl Functions {
            /// Opens the library.
            pub fn load(path: &Path) -> Self {
                // SAFETY: the library's initialisers have no preconditions.
                let library = unsafe { Library::new(path) }.unwrap_or_else(|error| panic!("{error}"));
                Functions {
                    // SAFETY: the header gives these types.
                    $($name: *unsafe { library.get(stringify!($symbol).as_bytes()) }.expect("a function"),)*
                    _library: library,
                }
            }
        }
    };
}

functions! {
    abi_version: moe_lora_abi_version: unsafe extern "C" fn() -> u32,
    context_create_cpu: moe_lora_context_create_cpu: unsafe extern "C" fn(*mut *mut Context) -> Status,
    context_create_cuda: moe_lora_context_create_cuda: unsafe extern "C" fn(u32, *mut *mut Context) -> Status,
    context_destroy: moe_lora_context_destroy: unsafe extern "C" fn(*mut Context) -> Status,
    expand: moe_lora_expand: Run<Expand>,
    forward: moe_lora_forward: Run<Forward>,
    last_error: moe_lora_last_error: unsafe extern "C" fn() -> *const c_char,
    plan: moe_lora_plan: unsafe extern "C" fn(
        *const Workspace, *const Projection, *const Forward, *mut c_char, usize, *mut usize,
    ) -> Status,
    route: moe_lora_route: unsafe extern "C" fn(
        *mut Workspace, *mut c_void, *const Projection, usize, *const Routing,
    ) -> Status,
    shrink: moe_lora_shrink: Run<Shrink>,
    version: moe_lora_version: unsafe extern "C" fn() -> *const c_char,
    workspace_create: moe_lora_workspace_create: unsafe extern "C" fn(
        *const Context, *const *const Projection, usize, usize, *mut *mut Workspace,
    ) -> Status,
    workspace_destroy: moe_lora_workspace_destroy: unsafe extern "C" fn(*mut Workspace) -> Status,
}

impl Functions {
    /// The message of the last call of this thread that failed.
    pub fn message(&self) -> String {
        // SAFETY: a C string that is valid until the next such call.
        unsafe { CStr::from_ptr((self.last_error)()) }.to_str().expect("UTF-8").to_owned()
    }

    /// The status must be OK.
    #[track_caller]
    pub fn done(&self, status: Status) {
        assert_eq!(status, Status::Ok, "{}", self.message());
    }

    /// A context on the CPU.
    pub fn cpu(&self) -> *mut Context {
        let mut context = ptr::null_mut();
        // SAFETY: written here.
        self.done(unsafe { (self.context_create_cpu)(&mut context) });
        context
    }

    /// A context on the first GPU.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> *mut Context {
        let mut context = ptr::null_mut();
        // SAFETY: written here.
        self.done(unsafe { (self.context_create_cuda)(0, &mut context) });
        context
    }

    /// A workspace on a context.
    pub fn workspace(&self, context: *mut Context, projection: &Projection, tokens: usize) -> *mut Workspace {
        let mut workspace = ptr::null_mut();
        let projections = [ptr::from_ref(projection)];
        // SAFETY: all of it lives here.
        self.done(unsafe {
            (self.workspace_create)(context, projections.as_ptr(), 1, tokens, &mut workspace)
        });
        workspace
    }

    /// Lets go of both.
    pub fn destroy(&self, context: *mut Context, workspace: *mut Workspace) {
        // SAFETY: the callers' own, and not used again.
        unsafe {
            self.done((self.workspace_destroy)(workspace));
            self.done((self.context_destroy)(context));
        }
    }
}
