//! safetensors files, read one tensor at a time.
//!
//! An adapter of a large model is several gigabytes of which one layer is wanted, so only the header is
//! read when a file is opened. The file may come from anywhere: every extent is checked against the
//! file's real length before anything is allocated.

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::{File, FileType};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a safetensors file, or one of its tensors, was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system would not read or write it.
    #[error("cannot {action} {}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `write`.
        action: &'static str,
        /// The system's reason.
        reason: std::io::Error,
    },
    /// It is no regular file: tensors are read from anywhere in it, and a pipe has no anywhere.
    #[error("{} is {kind}, expected a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is, in words.
        kind: &'static str,
    },
    /// The header is not that of a safetensors file.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with the header.
        reason: String,
    },
    /// The header places a tensor where the file has no room for it, or gives it a place that is not
    /// the size of its shape.
    #[error(
        "{}: {tensor} lies at {start}..{end} of {available} bytes, expected {expected} bytes", path.display()
    )]
    Extent {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte, as the header has it.
        start: usize,
        /// End, as the header has it.
        end: usize,
        /// Bytes of data that the file holds.
        available: u64,
        /// What shape and type ask for, written out.
        expected: String,
    },
    /// There is no tensor of this name.
    #[error("{} has no tensor {tensor}; it holds {}", path.display(), list(holds))]
    Missing {
        /// The file.
        path: PathBuf,
        /// The name looked for.
        tensor: String,
        /// The names found.
        holds: Vec<String>,
    },
    /// A tensor has another type than is wanted.
    #[error("{}: {tensor} is {got}, expected {expected}", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Types that would do.
        expected: &'static str,
        /// Its type.
        got: Dtype,
    },
    /// A tensor has another shape than is wanted.
    #[error("{}: {tensor} is {got:?}, expected {expected}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape that would do, and why.
        expected: String,
        /// Its shape.
        got: Vec<usize>,
    },
}

/// The first few names of many.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 6;
    match names.len() {
        0 => "none".into(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{}, … ({n} in all)", names[..SHOWN].join(", ")),
    }
}

/// What something other than a regular file is.
fn kind(of: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if of.is_fifo() {
            return "a pipe";
        }
        if of.is_char_device() || of.is_block_device() {
            return "a device";
        }
        if of.is_socket() {
            return "a socket";
        }
    }
    if of.is_dir() { "a folder" } else { "something else" }
}

/// Bytes of the header's length, which is what a file starts with.
const LENGTH_BYTES: u64 = 8;
/// The format's own limit on a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

#[derive(Deserialize)]
struct Header {
    /// Free text, by the format; read so that it is not taken for a tensor.
    #[serde(rename = "__metadata__")]
    _metadata: Option<HashMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

/// An open safetensors file whose header has been checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// Where the bytes that `data_offsets` count from begin.
    data: u64,
    tensors: HashMap<String, TensorInfo>,
}

impl TensorFile {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`FileError::NotAFile`], and those of [`TensorFile::read`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, FileError> {
        let path = path.into();
        let io = |reason| FileError::Io { path: path.clone(), action: "read", reason };
        // Asked first: to open a pipe is to wait for somebody who writes to it.
        let of = std::fs::metadata(&path).map_err(io)?.file_type();
        if !of.is_file() {
            return Err(FileError::NotAFile { path, kind: kind(of) });
        }
        let file = File::open(&path).map_err(io)?;
        Self::read(file, path)
    }

    /// Checks the header of a file that is open; `path` is its name in messages.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Header`], and [`FileError::Extent`] for a tensor that does not
    /// lie within the file.
    pub fn read(mut file: File, path: impl Into<PathBuf>) -> Result<Self, FileError> {
        let path = path.into();
        let io = |reason| FileError::Io { path: path.clone(), action: "read", reason };
        let header = |reason: String| FileError::Header { path: path.clone(), reason };

        let length = file.metadata().map_err(io)?.len();
        file.rewind().map_err(io)?;
        let mut size = [0; LENGTH_BYTES as usize];
        if length < LENGTH_BYTES {
            return Err(header(format!("{length} bytes, expected at least {LENGTH_BYTES}")));
        }
        file.read_exact(&mut size).map_err(io)?;
        let size = u64::from_le_bytes(size);
        let limit = MAX_HEADER_BYTES.min(length - LENGTH_BYTES);
        if size > limit {
            return Err(header(format!("its header claims {size} bytes, expected at most {limit}")));
        }
        let mut text = vec![0; size as usize];
        file.read_exact(&mut text).map_err(io)?;
        let Header { tensors, .. } = serde_json::from_slice(&text).map_err(|e| header(e.to_string()))?;

        let data = LENGTH_BYTES + size;
        for (tensor, info) in &tensors {
            let (start, end) = info.data_offsets;
            let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
            let fits = start <= end
                && end as u64 <= length - data
                && bits.is_some_and(|bits| (end - start).checked_mul(8) == Some(bits));
            if !fits {
                return Err(FileError::Extent {
                    path,
                    tensor: tensor.clone(),
                    start,
                    end,
                    available: length - data,
                    expected: match bits {
                        Some(bits) => bits.div_ceil(8).to_string(),
                        None => format!("a countable number ({:?} of {})", info.shape, info.dtype),
                    },
                });
            }
        }
        Ok(TensorFile { path, file, data, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// True when there is a tensor of this name.
    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// Type of a tensor.
    ///
    /// # Errors
    /// [`FileError::Missing`].
    pub fn dtype(&self, tensor: &str) -> Result<Dtype, FileError> {
        Ok(self.info(tensor)?.dtype)
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// [`FileError::Missing`].
    pub fn shape(&self, tensor: &str) -> Result<&[usize], FileError> {
        Ok(&self.info(tensor)?.shape)
    }

    /// Shape of a tensor of two dimensions; `names` says what they are, for the message.
    ///
    /// # Errors
    /// [`FileError::Missing`], [`FileError::Shape`].
    pub fn matrix(&self, tensor: &str, names: &'static str) -> Result<[usize; 2], FileError> {
        let shape = self.shape(tensor)?;
        shape.try_into().map_err(|_| self.shape_error(tensor, names.into()))
    }

    /// Refuses a tensor of another shape; `names` says what the dimensions are, for the message.
    ///
    /// # Errors
    /// [`FileError::Missing`], [`FileError::Shape`].
    pub fn expect_shape(&self, tensor: &str, shape: &[usize], names: &'static str) -> Result<(), FileError> {
        if self.shape(tensor)? == shape {
            return Ok(());
        }
        Err(self.shape_error(tensor, format!("{shape:?} = {names}")))
    }

    /// A tensor of F32, F16 or BF16, widened (exactly) to f32.
    ///
    /// # Errors
    /// [`FileError::Missing`], [`FileError::DType`], [`FileError::Io`].
    pub fn floats(&self, tensor: &str) -> Result<Vec<f32>, FileError> {
        let widen: fn(&[u8]) -> f32 = match self.dtype(tensor)? {
            Dtype::F32 => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dtype::F16 => |b| f16::from_le_bytes([b[0], b[1]]).to_f32(),
            Dtype::BF16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            got => return Err(self.dtype_error(tensor, "F32, F16 or BF16", got)),
        };
        let element = self.dtype(tensor)?.bitsize() / 8;
        Ok(self.bytes(tensor)?.chunks_exact(element).map(widen).collect())
    }

    /// A tensor of I32.
    ///
    /// # Errors
    /// [`FileError::Missing`], [`FileError::DType`], [`FileError::Io`].
    pub fn ints(&self, tensor: &str) -> Result<Vec<i32>, FileError> {
        match self.dtype(tensor)? {
            Dtype::I32 => {}
            got => return Err(self.dtype_error(tensor, "I32", got)),
        }
        let bytes = self.bytes(tensor)?;
        Ok(bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// The error for a tensor of another shape than `expected`.
    pub(crate) fn shape_error(&self, tensor: &str, expected: String) -> FileError {
        let got = self.tensors.get(tensor).map(|info| info.shape.clone()).unwrap_or_default();
        FileError::Shape { path: self.path.clone(), tensor: tensor.into(), expected, got }
    }

    /// The error for a tensor of another type than `expected`.
    pub fn dtype_error(&self, tensor: &str, expected: &'static str, got: Dtype) -> FileError {
        FileError::DType { path: self.path.clone(), tensor: tensor.into(), expected, got }
    }

    fn info(&self, tensor: &str) -> Result<&TensorInfo, FileError> {
        self.tensors.get(tensor).ok_or_else(|| FileError::Missing {
            path: self.path.clone(),
            tensor: tensor.into(),
            holds: self.names().into_iter().map(Into::into).collect(),
        })
    }

    fn bytes(&self, tensor: &str) -> Result<Vec<u8>, FileError> {
        let (start, end) = self.info(tensor)?.data_offsets;
        let mut bytes = vec![0; end - start];
        let read = (&self.file)
            .seek(SeekFrom::Start(self.data + start as u64))
            .and_then(|_| (&self.file).read_exact(&mut bytes));
        match read {
            Ok(()) => Ok(bytes),
            Err(reason) => Err(FileError::Io { path: self.path.clone(), action: "read", reason }),
        }
    }
}
