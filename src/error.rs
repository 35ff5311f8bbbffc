//! The one error type of the library: what went wrong, and which tensor, layer, file or flag is at fault.

use std::fmt::Display;

/// What class of failure this is. Callers match on it; people read [`Error`]'s message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting or flag is out of range or contradicts another.
    Usage,
    /// A file could not be read or written.
    Io,
    /// A file's content is malformed: truncated, hostile, or not what its header claims.
    Format,
    /// A tensor is absent or has another shape than the configuration promises.
    Tensor,
    /// A model type, quantisation or feature that this build does not know.
    Unsupported,
    /// A weight or an input holds NaN or infinity.
    NotFinite,
    /// No tokenizer where text is needed, or one that fails.
    Tokenizer,
    /// The hub is unreachable or refuses.
    Hub,
    /// The text does not fit the provisioned context.
    Context,
    /// The device has too little memory.
    Memory,
    /// The caller cancelled.
    Cancelled,
    /// A figure that was asked for was missed.
    Quality,
    /// candle failed below us.
    Backend,
}

/// An error with the place it concerns.
///
/// ```
/// let e = bfly::Error::usage("--ctx", "0 is not a context length");
/// assert_eq!(e.to_string(), "--ctx: 0 is not a context length");
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{context}: {message}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    message: String,
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` about `context` (a tensor, layer, file or flag).
    pub fn new(kind: ErrorKind, context: impl Display, message: impl Display) -> Self {
        Self { kind, context: context.to_string(), message: message.to_string() }
    }

    /// A bad flag or setting, named by `context`.
    pub fn usage(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Usage, context, message)
    }

    /// A malformed file, named by `context`.
    pub fn format(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Format, context, message)
    }

    /// A missing or misshapen tensor, named by `context`.
    pub fn tensor(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Tensor, context, message)
    }

    /// Something this build does not know, named by `context`.
    pub fn unsupported(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Unsupported, context, message)
    }

    /// A file that could not be read or written.
    pub fn io(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, path.as_ref().display(), error)
    }

    /// The class of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with `place` named before its context.
    pub fn within(mut self, place: impl Display) -> Self {
        self.context = format!("{place}: {}", self.context);
        self
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::below("candle", &error)
    }
}

impl Error {
    /// candle's error at `place`, with memory that ran out told from other failures.
    fn below(place: impl Display, error: &candle_core::Error) -> Self {
        let text = plain(error);
        match text.contains("OUT_OF_MEMORY") || text.contains("ALLOC_FAILED") {
            true => Self::new(ErrorKind::Memory, place, "out of GPU memory"),
            false => Self::new(ErrorKind::Backend, place, text),
        }
    }
}

/// candle's message on one line: under `RUST_BACKTRACE` its own display carries a backtrace.
pub(crate) fn plain(error: &candle_core::Error) -> String {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace { inner, .. } | Candle::WithPath { inner, .. } => plain(inner),
        Candle::Context { inner, context } => format!("{context}: {}", plain(inner)),
        other => other.to_string().lines().next().unwrap_or_default().into(),
    }
}

/// Names the place where a lower layer's error arose.
pub trait At<T> {
    /// Converts the error, with `place` as its context.
    fn at(self, place: impl Display) -> Result<T>;
}

impl<T> At<T> for std::result::Result<T, candle_core::Error> {
    fn at(self, place: impl Display) -> Result<T> {
        self.map_err(|e| Error::below(place, &e))
    }
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, place: impl Display) -> Result<T> {
        self.map_err(|e| Error::new(ErrorKind::Io, place, e))
    }
}
