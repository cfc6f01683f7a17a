//! Progress on stderr, for work that takes longer than a second, where someone is looking.

use std::{
    io::IsTerminal,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::failure::complain;

/// Work shorter than this is not worth a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that appears when the work takes long.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Dropped when the work is done, which ends the waiting thread.
    done: Option<Sender<()>>,
}

impl Progress {
    /// `total` things to do.
    pub(crate) fn bar(total: usize, what: &'static str) -> Self {
        Self::new(ProgressBar::new(total as u64), "{bar:32} {pos}/{len} {msg}, {eta} left", what)
    }

    /// Work of unknown length.
    pub(crate) fn spinner(what: &'static str) -> Self {
        Self::new(ProgressBar::new_spinner(), "{spinner} {msg}, {elapsed}", what)
    }

    fn new(bar: ProgressBar, template: &str, what: &'static str) -> Self {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        if !std::io::stderr().is_terminal() {
            return Self { bar, done: None };
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        let (done, wait) = channel::<()>();
        let shown = bar.clone();
        thread::spawn(move || {
            if wait.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(Duration::from_millis(200));
            }
        });
        Self { bar, done: Some(done) }
    }

    /// So many more are done.
    pub(crate) fn advance(&self, count: usize) {
        self.bar.inc(count as u64);
    }

    /// Prints an error line without tearing the bar.
    pub(crate) fn complain(&self, what: &str) {
        self.bar.suspend(|| complain(what));
    }

    /// Does something that prints, without tearing the bar.
    pub(crate) fn aside<R>(&self, print: impl FnOnce() -> R) -> R {
        self.bar.suspend(print)
    }

    /// Takes the bar away; so does dropping it.
    pub(crate) fn finish(self) {
        drop(self);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done.take();
        self.bar.finish_and_clear();
    }
}
