//! Ctrl-C, and requests to end.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::stop::{without_number, Stop};

/// A write past the limit of `ulimit -f` fails ("File too large") instead of ending the program. By a
/// handler that does nothing: what is ignored would stay ignored in the next `qemu-img`.
pub(crate) fn outlive_the_file_size_limit() {
    if ignored() & (1 << (SIGXFSZ - 1)) == 0 {
        // Without it the signal ends the program, which an image survives as it does a kill.
        let _ = flag::register(SIGXFSZ, Arc::default());
    }
}

/// The signal that has asked the program to end, if one has.
#[derive(Clone)]
pub(crate) struct Asked(Arc<AtomicUsize>);

impl Asked {
    /// From here on Ctrl-C, a hangup and a request to terminate are noted, and work ends where
    /// that is good. The second one ends the program at once. What the caller of the program has
    /// ignored (nohup, a background job) stays ignored.
    pub(crate) fn watch() -> Result<Asked, Stop> {
        let (asked, again) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let watch = |signal: i32| -> io::Result<()> {
            // In this order: the first signal finds `again` false, and sets it.
            flag::register_conditional_default(signal, Arc::clone(&again))?;
            flag::register(signal, Arc::clone(&again))?;
            flag::register_usize(signal, Arc::clone(&asked), signal as usize).map(|_| ())
        };
        let ignored = ignored();
        let mut wanted = [SIGINT, SIGTERM, SIGHUP].into_iter();
        wanted
            .try_for_each(|s| match ignored & (1 << (s - 1)) {
                0 => watch(s),
                _ => Ok(()),
            })
            .map_err(|e| {
                let text = format!("Could not watch for signals: {}", without_number(&e));
                Stop::failed(text)
            })?;
        Ok(Asked(asked))
    }

    /// The number of the signal.
    pub(crate) fn signal(&self) -> Option<u8> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            n => u8::try_from(n).ok(),
        }
    }

    /// Stop now, if asked to; `line` follows the program's name.
    pub(crate) fn check(&self, line: &str) -> Result<(), Stop> {
        match self.signal() {
            Some(_) => Err(self.stop(line)),
            None => Ok(()),
        }
    }

    /// Work was broken off.
    pub(crate) fn stop(&self, line: impl Into<Vec<u8>>) -> Stop {
        Stop::Interrupted(self.signal().unwrap_or(SIGINT as u8), line.into())
    }
}

/// The signals that are ignored, bit 0 for signal 1; none where the system does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok())
        .unwrap_or(0)
}
