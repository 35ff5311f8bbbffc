//! Hub repositories through hf-hub: the usual cache and its variables, a revision, and no network when offline.

use super::{Identity, OnProgress, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::HFClient;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What of a repository is needed. `original/` holds other formats of the same weights.
const WANTED: &[&str] = &["*.json", "*.safetensors", "*.jinja"];
const UNWANTED: &[&str] = &["original/*", "onnx/*", "*/*"];

/// Downloads (or finds in the cache) `model`: `owner/name`, or `owner/name/file.gguf`.
pub fn fetch(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<(PathBuf, Identity)> {
    let parts: Vec<&str> = model.split('/').collect();
    let (owner, name, file) = match parts[..] {
        [owner, name] => (owner, name, None),
        [owner, name, file] if file.ends_with(".gguf") => (owner, name, Some(file.to_string())),
        _ => {
            let message = "is neither a file, a directory nor a hub id (owner/name, or owner/name/file.gguf)";
            return Err(Error::new(ErrorKind::Io, model, message));
        }
    };
    // hf-hub ignores HF_HUB_OFFLINE; transformers and its users do not.
    let offline = options.offline
        || std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| matches!(v.as_str(), "1" | "true" | "ON" | "YES"));
    let fail = |e: String| {
        let hint = match offline {
            true => "offline, so only the cache was searched",
            false => "to use files at hand, give --model a directory or a .gguf file",
        };
        Error::new(ErrorKind::Hub, model, format!("{e} ({hint})"))
    };
    let client = HFClient::builder().retry_max_attempts(2).build_sync().map_err(|e| fail(e.to_string()))?;
    let repo = client.model(owner, name);
    let meter = Arc::new(Meter::default());
    let revision = options.revision.clone().unwrap_or_else(|| "main".into());
    let download = || {
        let owned = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let meter = hf_hub::progress::Progress::from(meter.clone());
        match file {
            Some(file) => {
                repo.download_file().filename(file).revision(revision).local_files_only(offline).progress(meter).send()
            }
            None => repo
                .snapshot_download()
                .allow_patterns(owned(WANTED))
                .ignore_patterns(owned(UNWANTED))
                .revision(revision)
                .local_files_only(offline)
                .progress(meter)
                .send(),
        }
    };
    // The handler must own what it touches, our callback is borrowed: it is fed from this thread.
    let path = std::thread::scope(|scope| {
        let worker = scope.spawn(download);
        while !worker.is_finished() {
            std::thread::sleep(Duration::from_millis(50));
            let (done, total) = (meter.done.load(Ordering::Relaxed), meter.total.load(Ordering::Relaxed));
            if total > 0 {
                progress("download", done, total);
            }
        }
        worker.join()
    });
    let path = path.map_err(|_| fail("the download panicked".into()))?.map_err(|e| fail(e.to_string()))?;
    let commit = commit_of(&path).unwrap_or_default();
    Ok((path, Identity::Hub { id: model.into(), revision: commit }))
}

/// The commit in `.../snapshots/<commit>/...`.
fn commit_of(path: &Path) -> Option<String> {
    let mut parts = path.components().map(|c| c.as_os_str().to_string_lossy().into_owned());
    parts.find(|p| p == "snapshots")?;
    parts.next()
}

/// Bytes seen and expected, over all files.
#[derive(Default)]
struct Meter {
    done: AtomicU64,
    total: AtomicU64,
    files: Mutex<HashMap<String, u64>>,
}

impl ProgressHandler for Meter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => self.total.store(*total_bytes, Ordering::Relaxed),
            DownloadEvent::Progress { files } => {
                if let Ok(mut seen) = self.files.lock() {
                    seen.extend(files.iter().map(|f| (f.filename.clone(), f.bytes_completed)));
                    self.done.store(seen.values().sum(), Ordering::Relaxed);
                }
            }
            // Xet transfers report totals only.
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                self.done.fetch_max(*bytes_completed, Ordering::Relaxed);
            }
            DownloadEvent::Complete => {}
        }
    }
}
