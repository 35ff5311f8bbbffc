//! A checkpoint's origin and, for patches, its content hash.

use crate::error::{At, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Origin of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum Identity {
    /// A hub repository at a commit.
    Hub {
        /// `owner/name`, or `owner/name/file.gguf`.
        id: String,
        /// Commit hash.
        revision: String,
    },
    /// A directory in Hugging Face's layout.
    Directory {
        /// Absolute path.
        path: PathBuf,
        /// SHA-256 of the configuration and the weight files; `None` until [`Identity::hashed`] computes it.
        #[serde(skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
    },
    /// A GGUF file.
    File {
        /// Absolute path.
        path: PathBuf,
        /// SHA-256 of the file (all parts of a split file); `None` until [`Identity::hashed`] computes it.
        #[serde(skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
    },
}

impl Identity {
    pub(super) fn directory(path: &Path) -> Self {
        Self::Directory { path: absolute(path), sha256: None }
    }

    pub(super) fn file(path: &Path) -> Self {
        Self::File { path: absolute(path), sha256: None }
    }

    /// Returns the hub id or path, for messages.
    pub fn place(&self) -> String {
        match self {
            Self::Hub { id, .. } => id.clone(),
            Self::Directory { path, .. } | Self::File { path, .. } => path.display().to_string(),
        }
    }

    /// Returns a copy with the path replaced by `reference`, the path as the user wrote it, for reports read on other
    /// machines.
    pub fn as_given(&self, reference: &str) -> Self {
        let mut out = self.clone();
        if let Self::Directory { path, .. } | Self::File { path, .. } = &mut out {
            *path = reference.into();
        }
        out
    }

    /// Returns the argument that makes `Checkpoint::open` open it again.
    pub fn reference(&self) -> String {
        self.place()
    }

    /// Returns whether both name the same content: the same commit of a repository, or equal hashes.
    pub fn same_content(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Directory { sha256: a, .. }, Self::Directory { sha256: b, .. })
            | (Self::File { sha256: a, .. }, Self::File { sha256: b, .. }) => a.is_some() && a == b,
            _ => self == other,
        }
    }

    /// Returns a copy with the content hash of `files` filled in; a hub identity, which has its commit, is unchanged.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hashed(&self, files: &[PathBuf], progress: super::OnProgress) -> Result<Self> {
        let mut out = self.clone();
        if let Self::Directory { sha256, .. } | Self::File { sha256, .. } = &mut out {
            *sha256 = Some(content_hash(files, progress)?);
        }
        Ok(out)
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.into())
}

fn content_hash(files: &[PathBuf], progress: super::OnProgress) -> Result<String> {
    let total = files.iter().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum();
    let (mut hash, mut done) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let mut file = std::fs::File::open(path).at(path.display())?;
        loop {
            let n = file.read(&mut buffer).at(path.display())?;
            if n == 0 {
                break;
            }
            hash.update(&buffer[..n]);
            done += n as u64;
            progress("hash", done, total);
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
