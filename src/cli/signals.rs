//! SIGINT, SIGTERM and SIGHUP: temporary files go, and the exit code says which it was.

use super::temporary::end_process;
use std::sync::atomic::{AtomicBool, Ordering};

const INTERRUPT: i32 = 2;

/// Whether an interrupt ends the text and not the process.
static DECODING: AtomicBool = AtomicBool::new(false);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Says that tokens are being made: the first interrupt from now on ends the text, which the caller finds out by [`interrupted`];
/// the second ends the process.
pub fn decoding() {
    DECODING.store(true, Ordering::Relaxed);
}

/// Whether the text is to end.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Begins to listen; once per process.
pub fn listen() {
    // Fails only where another handler is set: then that one decides.
    let _ = on_signal(|signal| {
        let gently = signal == INTERRUPT && DECODING.load(Ordering::Relaxed);
        if !gently || INTERRUPTED.swap(true, Ordering::Relaxed) {
            end_process(128 + signal);
        }
    });
}

#[cfg(unix)]
fn on_signal(handle: impl Fn(i32) + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let hang_up = (!ignored(SIGHUP)).then_some(SIGHUP);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM].into_iter().chain(hang_up))?;
    std::thread::Builder::new().name("signals".into()).spawn(move || signals.forever().for_each(handle)).map(drop)
}

/// Whether the process was started with `signal` ignored, as by nohup; where the system does not tell, it may have been.
#[cfg(unix)]
fn ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).map(str::trim);
    mask.and_then(|m| u64::from_str_radix(m, 16).ok()).is_none_or(|m| m >> (signal - 1) & 1 == 1)
}

#[cfg(not(unix))]
fn on_signal(handle: impl Fn(i32) + Send + 'static) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(move || handle(INTERRUPT))
}
