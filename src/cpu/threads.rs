//! One set of threads for everything: tasks are numbers, and each thread has a range of them; whoever is done takes what others have
//! left.
//!
//! Tasks are rows or images in order, from operation to operation, so a thread finds in its caches what it wrote in the operation
//! before.
//!
//! Nothing is allocated to run something, and a thread that has just worked looks out for more for a moment before it sleeps,
//! which is what the dozens of small operations of a forward pass need.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crate::{Error, Result};

/// What a thread is given: its own number, below the number of threads, and a task's number.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How often an idle thread looks before it sleeps: some tens of microseconds.
const PATIENCE: u32 = 2_000;

/// The lowest bit of the state: a job can be joined. Above it, how many threads have joined it, and from [`NEXT`] on the job's
/// number.
const OPEN: u64 = 1;
const JOINED: u64 = 2;
const NEXT: u64 = 1 << 16;

struct Shared {
    state: AtomicU64,
    job: Mutex<Option<Job>>,
    /// The next task of each thread's range.
    next: Vec<Next>,
    sleepers: Mutex<Sleepers>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

/// On a cache line of its own, and the one that the processor fetches with it.
#[derive(Default)]
#[repr(align(128))]
struct Next(AtomicUsize);

#[derive(Default)]
struct Sleepers {
    asleep: usize,
    stop: bool,
}

#[derive(Clone, Copy)]
struct Job {
    work: *const Work<'static>,
    tasks: usize,
}

// SAFETY: the work is `Sync`, and `Threads::run` keeps it alive until nobody runs it any more.
unsafe impl Send for Job {}

/// The calling thread and its helpers.
pub(super) struct Threads {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held while a job runs: a second caller meanwhile works alone.
    busy: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Threads {
    /// `count` threads, the calling one among them.
    pub(super) fn new(count: usize) -> Result<Self> {
        if count == 0 || count as u64 >= NEXT / JOINED {
            let what = format!("{count} threads: ask for at least 1 and fewer than {}", NEXT / JOINED);
            return Err(Error::argument("threads", what));
        }
        let mut threads = Self::prepared(count);
        for number in 1..count {
            let shared = Arc::clone(&threads.shared);
            let helper = std::thread::Builder::new().name(format!("foveate-{number}"));
            let helper = helper
                .spawn(move || shared.help(number))
                .map_err(|e| Error::argument("threads", format!("cannot start {count} threads: {e}")))?;
            threads.helpers.push(helper);
        }
        Ok(threads)
    }

    /// The calling thread and no other.
    pub(super) fn alone() -> Self {
        Self::prepared(1)
    }

    /// The calling thread, and places for others.
    fn prepared(count: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: Mutex::new(None),
            next: (0..count).map(|_| Next::default()).collect(),
            sleepers: Mutex::default(),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        Self { shared, helpers: Vec::new(), busy: Mutex::new(()) }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `work(thread, task)` for every task below `tasks`, each once, in no particular order.
    pub(super) fn run(&self, tasks: usize, work: impl Fn(usize, usize) + Sync) {
        let alone = self.helpers.is_empty() || tasks <= 1;
        let turn = if alone { None } else { self.busy.try_lock().ok() };
        if turn.is_none() {
            return (0..tasks).for_each(|task| work(0, task));
        }
        let work: &Work<'_> = &work;
        #[expect(clippy::transmute_ptr_to_ptr, reason = "a cast may not lengthen a lifetime")]
        // SAFETY: only the lifetime changes; `Finish` waits for everyone who joined before this function returns.
        let work = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let shared = &*self.shared;
        for (thread, Next(next)) in shared.next.iter().enumerate() {
            next.store(shared.first(thread, tasks), Ordering::Relaxed);
        }
        *lock(&shared.job) = Some(Job { work, tasks });
        shared.state.fetch_add(NEXT | OPEN, Ordering::SeqCst);
        if lock(&shared.sleepers).asleep > 0 {
            shared.wake.notify_all();
        }
        let finish = Finish(shared);
        shared.take_tasks(0, Job { work, tasks });
        drop(finish);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Closes the job to those who have not joined, and waits for the others.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut looks = 0_u32;
        while state.load(Ordering::Acquire) % NEXT >= JOINED {
            looks += 1;
            // Whoever is missing may need this processor.
            if looks.is_multiple_of(256) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        *lock(&self.0.job) = None;
    }
}

impl Shared {
    /// The first task of a thread's range.
    fn first(&self, thread: usize, tasks: usize) -> usize {
        let (each, larger) = (tasks / self.next.len(), tasks % self.next.len());
        each * thread + larger.min(thread)
    }

    fn take_tasks(&self, thread: usize, job: Job) {
        // SAFETY: this thread runs the job or has joined it: `Threads::run` waits before the work goes out of scope.
        let work = unsafe { &*job.work };
        let result = catch_unwind(AssertUnwindSafe(|| {
            // Its own range first.
            let count = self.next.len();
            for whose in (thread..count).chain(0..thread) {
                let (Next(next), end) = (&self.next[whose], self.first(whose + 1, job.tasks));
                loop {
                    let task = next.fetch_add(1, Ordering::Relaxed);
                    if task >= end {
                        break;
                    }
                    work(thread, task);
                }
            }
        }));
        if let Err(panic) = result {
            // The others need not go on.
            self.next.iter().for_each(|Next(next)| next.store(usize::MAX / 2, Ordering::Relaxed));
            *lock(&self.panic) = Some(panic);
        }
    }

    /// The life of a helper.
    fn help(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let state = self.wait_for_job(seen);
            let Some(state) = state else { return };
            seen = state / NEXT;
            let joined = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
                (now & OPEN != 0 && now / NEXT == seen).then_some(now + JOINED)
            });
            if joined.is_err() {
                continue;
            }
            let job = *lock(&self.job);
            if let Some(job) = job {
                self.take_tasks(thread, job);
            }
            self.state.fetch_sub(JOINED, Ordering::SeqCst);
        }
    }

    /// The state once there is a job that can be joined and is not number `seen`; `None` to stop.
    fn wait_for_job(&self, seen: u64) -> Option<u64> {
        let news = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state / NEXT != seen).then_some(state)
        };
        for _ in 0..PATIENCE {
            if let Some(state) = news() {
                return Some(state);
            }
            std::hint::spin_loop();
        }
        let mut sleepers = lock(&self.sleepers);
        loop {
            if sleepers.stop {
                return None;
            }
            if let Some(state) = news() {
                return Some(state);
            }
            sleepers.asleep += 1;
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
            sleepers.asleep -= 1;
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.sleepers).stop = true;
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper cannot have panicked: it catches what tasks throw.
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for count in [1, 2, 5] {
            let threads = Threads::new(count).unwrap();
            for tasks in [0, 1, 2, 7, 1000] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.run(tasks, |thread, task| {
                    assert!(thread < count);
                    runs[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "{tasks} with {count}");
            }
        }
    }

    #[test]
    fn callers_at_the_same_time_do_not_wait_for_each_other() {
        let threads = Threads::new(3).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        threads.run(5, |_, task| {
                            total.fetch_add(task, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 10);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_threads_live_on() {
        let threads = Threads::new(3).unwrap();
        let thrown = catch_unwind(AssertUnwindSafe(|| threads.run(50, |_, task| assert!(task != 20))));
        assert!(thrown.is_err());
        let count = AtomicUsize::new(0);
        threads.run(50, |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 50);
        assert!(Threads::new(0).is_err());
    }
}
