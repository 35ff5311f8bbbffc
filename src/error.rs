//! The library's error type: a message, a kind, and the tensor, layer, file or flag that the error concerns.

use std::fmt::Display;

/// Kind of an [`Error`], for callers to match on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting or flag is out of range or contradicts another.
    Usage,
    /// A file could not be read or written.
    Io,
    /// A file's content is malformed: truncated, hostile, or not what its header claims.
    Format,
    /// A tensor is missing or has another shape than the configuration says.
    Tensor,
    /// A model type, quantisation or feature is not supported by this build.
    Unsupported,
    /// A weight or an input is NaN or infinite.
    NotFinite,
    /// The tokenizer is missing or fails.
    Tokenizer,
    /// The hub is unreachable or refuses the request.
    Hub,
    /// The text does not fit the context length.
    Context,
    /// The device has too little memory.
    Memory,
    /// The caller cancelled.
    Cancelled,
    /// A quality gate was missed.
    Quality,
    /// candle or the driver failed.
    Backend,
}

/// An error message with the tensor, layer, file or flag that it concerns.
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
    /// Creates an error of `kind` about `context` (a tensor, layer, file or flag).
    pub fn new(kind: ErrorKind, context: impl Display, message: impl Display) -> Self {
        Self { kind, context: context.to_string(), message: message.to_string() }
    }

    /// Creates a [`ErrorKind::Usage`] error about the flag or setting `context`.
    pub fn usage(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Usage, context, message)
    }

    /// Creates a [`ErrorKind::Format`] error about the file `context`.
    pub fn format(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Format, context, message)
    }

    /// Creates a [`ErrorKind::Tensor`] error about the tensor or file `context`.
    pub fn tensor(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Tensor, context, message)
    }

    /// Creates a [`ErrorKind::Unsupported`] error about the file, tensor or flag `context`.
    pub fn unsupported(context: impl Display, message: impl Display) -> Self {
        Self::new(ErrorKind::Unsupported, context, message)
    }

    /// Creates a [`ErrorKind::Io`] error about the file at `path`.
    pub fn io(path: impl AsRef<std::path::Path>, error: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, path.as_ref().display(), error)
    }

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Prefixes the context with `place`.
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
    /// Converts candle's error at `place`; running out of GPU memory becomes [`ErrorKind::Memory`].
    fn below(place: impl Display, error: &candle_core::Error) -> Self {
        let text = plain(error);
        match text.contains("OUT_OF_MEMORY") || text.contains("ALLOC_FAILED") {
            true => Self::new(ErrorKind::Memory, place, "out of GPU memory"),
            false => Self::new(ErrorKind::Backend, place, text),
        }
    }
}

/// Returns candle's message on one line: with `RUST_BACKTRACE` set, its `Display` includes a backtrace.
pub(crate) fn plain(error: &candle_core::Error) -> String {
    use candle_core::Error as Candle;
    match error {
        Candle::WithBacktrace { inner, .. } | Candle::WithPath { inner, .. } => plain(inner),
        Candle::Context { inner, context } => format!("{context}: {}", plain(inner)),
        other => other.to_string().lines().next().unwrap_or_default().into(),
    }
}

/// Converts errors of candle and `std::io`, adding the place that they concern.
pub trait At<T> {
    /// Converts the error to an [`Error`] with context `place`.
    ///
    /// # Errors
    /// The converted error.
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
