//! Handlers of SIGINT, SIGTERM and SIGHUP: remove temporary files and exit with 128 plus the signal's number.

use super::temporary::end_process;
use std::sync::atomic::{AtomicBool, Ordering};

const INTERRUPT: i32 = 2;

/// Whether the first SIGINT ends the generated text instead of the process.
static DECODING: AtomicBool = AtomicBool::new(false);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Marks the start of decode: from then on the first SIGINT makes [`interrupted`] return true, and the second ends the
/// process.
pub fn decoding() {
    DECODING.store(true, Ordering::Relaxed);
}

/// Whether a SIGINT has asked to end the generated text.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Installs the signal handlers; called once per process.
pub fn listen() {
    // Fails only where a handler is already installed; that one stays in force.
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

/// Whether the process was started with `signal` ignored, as nohup does; true where the system does not report it.
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
