//! Converts panics of dependencies into errors.

use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught, and so must not be printed.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; if it panics, returns the panic's message without printing it.
///
/// State that `f` modified may be incomplete after a panic: the caller must drop it.
pub(crate) fn catch_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                before(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let done = catch_unwind(AssertUnwindSafe(f));
    CAUGHT.set(outer);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let line = text.and_then(|t| t.lines().next()).unwrap_or("no message");
        format!("a library panicked: {line}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(catch_panic(|| 3), Ok(3));
        let message = catch_panic(|| [0][std::hint::black_box(7)]).unwrap_err();
        assert!(message.contains("index out of bounds"), "{message}");
    }
}
