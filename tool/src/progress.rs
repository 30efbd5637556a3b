//! Signs of life on a terminal, and nowhere else.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qcow2_snapshot::{Image, Stage};

use crate::signals::Asked;

/// A verb that is done before this is not worth a bar.
const PATIENCE: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);

/// Is somebody looking?
fn watched(quiet: bool) -> bool {
    !quiet && std::io::stderr().is_terminal()
}

fn styled(bar: ProgressBar, form: &str) -> ProgressBar {
    match ProgressStyle::with_template(form) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A bar for a verb, once it takes long. It is taken away when this is dropped.
pub(crate) struct VerbBar {
    bar: ProgressBar,
    shown: Option<(Sender<()>, JoinHandle<()>)>,
}

impl VerbBar {
    pub(crate) fn new(what: &'static str, quiet: bool) -> VerbBar {
        let form = "{prefix}, {msg:9} {bar:40.cyan/blue} {percent:>3}% {spinner}";
        let bar = styled(ProgressBar::hidden(), form).with_prefix(what);
        if !watched(quiet) {
            return VerbBar { bar, shown: None };
        }
        // A thread, since the library may wait for the disk before it has said anything.
        let (done, wait) = channel::<()>();
        let shown = bar.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            if wait.recv_timeout(PATIENCE) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            shown.set_draw_target(ProgressDrawTarget::stderr());
            shown.enable_steady_tick(TICK);
            // Ends when the other side is dropped.
            let _ = wait.recv();
            shown.finish_and_clear();
        });
        // No thread, no bar.
        let shown = thread.ok().map(|thread| (done, thread));
        VerbBar { bar, shown }
    }

    /// Follow the next verb on `image`, and cancel it when that is asked for.
    pub(crate) fn follow(&self, image: &mut Image, asked: &Asked) {
        let (bar, asked) = (self.bar.clone(), asked.clone());
        image.set_progress(Some(Box::new(move |stage, done, total| {
            let ends = asked.signal().is_some();
            bar.set_message(match (stage, ends) {
                (Stage::Check, _) => "checking",
                (Stage::Prepare, _) => "writing",
                (Stage::Reclaim, false) => "freeing",
                // It cannot be broken off any more.
                (Stage::Reclaim, true) => "finishing",
            });
            bar.set_length(total);
            bar.set_position(done);
            match ends {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })));
    }

    /// Follow the next of several calls on `image` that look and change nothing.
    pub(crate) fn follow_part(&self, image: &mut Image, nth: u64, of: u64) {
        const PARTS: u64 = 1000;
        let bar = self.bar.clone();
        bar.set_message("reading");
        bar.set_length(of * PARTS);
        image.set_progress(Some(Box::new(move |_, done, total| {
            let share = u128::from(done) * u128::from(PARTS) / u128::from(total.max(1));
            bar.set_position(nth * PARTS + share as u64);
            ControlFlow::Continue(())
        })));
    }
}

impl Drop for VerbBar {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.shown.take() {
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
    let form = "{bar:40.cyan/blue} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    styled(ProgressBar::new(total), form)
}
