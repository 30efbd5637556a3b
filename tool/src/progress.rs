//! Signs of life on a terminal, and nowhere else.

use std::io::IsTerminal;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A verb that is done before this is not worth a spinner.
const PATIENCE: Duration = Duration::from_millis(400);
const TICK: Duration = Duration::from_millis(100);

/// Is somebody looking?
fn watched(quiet: bool) -> bool {
    !quiet && std::io::stderr().is_terminal()
}

/// Turns while a verb takes long. The library says nothing of how far it is.
pub(crate) struct Spinner(Option<(Sender<()>, JoinHandle<()>)>);

impl Spinner {
    pub(crate) fn new(what: &'static str, quiet: bool) -> Spinner {
        if !watched(quiet) {
            return Spinner(None);
        }
        let (done, wait) = channel::<()>();
        let turn = std::thread::Builder::new().spawn(move || {
            if wait.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let bar = ProgressBar::new_spinner().with_message(what);
            bar.enable_steady_tick(TICK);
            // Ends when the other side is dropped.
            let _ = wait.recv();
            bar.finish_and_clear();
        });
        // No thread, no spinner.
        Spinner(turn.ok().map(|thread| (done, thread)))
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.0.take() {
            drop(done);
            let _ = thread.join();
        }
    }
}

/// A bar for so many bytes.
pub(crate) fn bytes(total: u64, quiet: bool) -> ProgressBar {
    if !watched(quiet) {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    let form = "{bar:40.cyan/blue} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    match ProgressStyle::with_template(form) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
