//! Downloads from the Hugging Face hub through hf-hub, with its standard cache and environment variables, revisions and
//! offline use.

use super::{Identity, OnProgress, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::{HFClient, HFError};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Files to download from a repository; other formats, adapters and images are skipped.
const WANTED: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
];
const UNWANTED: &[&str] = &["*/*"];
/// Time without progress after which a download fails; hf-hub has no timeout of its own.
const STALLED: Duration = Duration::from_secs(60);

/// Downloads `model` (`owner/name`, or `owner/name/path/file.gguf`) or finds it in the cache, and returns its path.
///
/// # Errors
/// `model` is not a hub id; the repository, revision or file does not exist or is refused; the network fails or stalls;
/// offline, the cache lacks a file.
pub fn fetch(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<(PathBuf, Identity)> {
    let mut parts = model.splitn(3, '/');
    let (owner, name, file) = match (parts.next(), parts.next(), parts.next()) {
        (Some(owner), Some(name), None) if !owner.is_empty() && !name.is_empty() => (owner, name, None),
        (Some(owner), Some(name), Some(file)) if file.ends_with(".gguf") => (owner, name, Some(file.to_string())),
        _ => {
            let message = "is neither a file, a directory nor a hub id (owner/name, or owner/name/file.gguf)";
            return Err(Error::new(ErrorKind::Io, model, message));
        }
    };
    let offline = options.offline || offline_by_environment();
    let fail = |why: String| {
        let hint = match offline {
            true => "offline: only the cache was searched",
            false => "for local files give --model a directory or a .gguf file, or --offline if it is in the cache",
        };
        Error::new(ErrorKind::Hub, model, format!("{why} ({hint})"))
    };
    let client = HFClient::builder().retry_max_attempts(2).build_sync();
    let client =
        client.map_err(|e| fail(format!("cannot create a hub client (is HF_ENDPOINT a URL?): {}", chain(&e))))?;
    let repo = client.model(owner, name);
    let meter = Arc::new(Meter::default());
    let revision = options.revision.clone().unwrap_or_else(|| "main".into());
    let (watch, requested) = (meter.clone(), revision.clone());
    // A detached thread that owns everything it uses: it is abandoned if the hub never answers.
    let worker = std::thread::spawn(move || {
        let owned = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let meter = hf_hub::progress::Progress::from(watch);
        match file {
            Some(file) => {
                let fetch = |name: String| {
                    let request = repo.download_file().filename(name).revision(requested.clone());
                    request.local_files_only(offline).progress(meter.clone()).send()
                };
                other_parts(&file).into_iter().try_for_each(|part| fetch(part).map(drop)).and_then(|()| fetch(file))
            }
            None => repo
                .snapshot_download()
                .allow_patterns(owned(WANTED))
                .ignore_patterns(owned(UNWANTED))
                .revision(requested)
                .local_files_only(offline)
                .progress(meter)
                .send(),
        }
    });
    let (mut seen, mut since) = (0, Instant::now());
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(50));
        let (done, total) = (meter.done.load(Ordering::Relaxed), meter.total.load(Ordering::Relaxed));
        if done != seen {
            (seen, since) = (done, Instant::now());
        }
        if since.elapsed() > STALLED {
            return Err(fail(format!("the download stalled: no data for {} s", STALLED.as_secs())));
        }
        if total > 0 {
            progress("download", done.min(total), total);
        }
    }
    let path = worker.join().map_err(|_| fail("the download panicked".into()))?;
    let path = path.map_err(|e| fail(explain(&e, &revision)))?;
    let commit =
        commit_of(&path).ok_or_else(|| fail(format!("{} is not in a snapshot of the hub cache", path.display())))?;
    Ok((path, Identity::Hub { id: model.into(), revision: commit }))
}

/// Returns the repository paths of the other parts if `file` is one part of a split GGUF file.
fn other_parts(file: &str) -> Vec<String> {
    let (folder, name) = file.rsplit_once('/').map_or(("", file), |(f, n)| (&file[..=f.len()], n));
    let parts = super::gguf::part_names(name).unwrap_or_default();
    parts.iter().filter(|p| *p != name).map(|p| format!("{folder}{p}")).collect()
}

/// Whether an environment variable requests offline use; hf-hub ignores these two, huggingface_hub and transformers
/// honour them.
fn offline_by_environment() -> bool {
    let set = |v: String| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|key| std::env::var(key).is_ok_and(set))
}

fn explain(error: &HFError, revision: &str) -> String {
    let text = chain(error);
    if text.contains("Revision not found: main") {
        return format!("not found: no such repository, or it is private and HF_TOKEN is not set ({text})");
    }
    if text.contains("Revision not found") {
        return format!("revision `{revision}` not found ({text})");
    }
    if text.contains("401") || text.contains("403") {
        return format!("access refused; gated models need HF_TOKEN ({text})");
    }
    text
}

/// Formats an error and its causes on one line, without repeats.
fn chain(error: &dyn std::error::Error) -> String {
    let mut parts: Vec<String> = vec![];
    let mut next = Some(error);
    while let Some(e) = next {
        let text = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if !parts.iter().any(|p| p.contains(&text)) {
            parts.push(text);
        }
        next = e.source();
    }
    parts.join(": ")
}

/// Returns the commit in `.../snapshots/<commit>/...`; the last match, since the cache's own path may contain
/// `snapshots` too.
fn commit_of(path: &Path) -> Option<String> {
    let parts: Vec<_> = path.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
    let at = parts.iter().rposition(|p| p == "snapshots")?;
    parts.get(at + 1).cloned()
}

/// Bytes downloaded and expected, summed over all files.
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
            // Sent for the snapshot and again for each of its files.
            DownloadEvent::Start { total_bytes, .. } => {
                self.total.fetch_max(*total_bytes, Ordering::Relaxed);
            }
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
