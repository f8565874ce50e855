//! The threads that scrub.
//!
//! They are started when a pool is built: VMM threads often run under a seccomp filter that forbids new ones later.

/// A fixed set of threads, or the calling thread alone.
#[derive(Debug)]
pub(crate) struct Workers {
    #[cfg(feature = "rayon")]
    pool: Option<rayon::ThreadPool>,
}

/// Why the threads could not be started.
pub(crate) type StartError = Box<dyn std::error::Error + Send + Sync>;

impl Workers {
    /// No threads of its own: the caller does the work.
    pub(crate) fn caller() -> Self {
        Self {
            #[cfg(feature = "rayon")]
            pool: None,
        }
    }

    /// Starts `threads` threads; with one, or without the `rayon` feature, the caller does the work.
    pub(crate) fn start(threads: usize) -> Result<Self, StartError> {
        #[cfg(feature = "rayon")]
        if threads > 1 {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("vm-scrub-{index}"))
                .build()?;
            return Ok(Self { pool: Some(pool) });
        }
        let _ = threads;
        Ok(Self::caller())
    }

    /// How many threads work at the same time.
    pub(crate) fn threads(&self) -> usize {
        #[cfg(feature = "rayon")]
        if let Some(pool) = &self.pool {
            return pool.current_num_threads();
        }
        1
    }

    /// The results of `one` for each number below `count`, in order. Where there is only one it is the caller who works.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn map<T: Send>(
        &self,
        count: usize,
        one: impl Fn(usize) -> T + Send + Sync,
    ) -> Vec<T> {
        #[cfg(feature = "rayon")]
        if let Some(pool) = &self.pool
            && count > 1
        {
            use rayon::prelude::*;
            return pool.install(|| (0..count).into_par_iter().map(one).collect());
        }
        (0..count).map(one).collect()
    }

    /// Every thread calls `work` once; returns when all have.
    pub(crate) fn all(&self, work: impl Fn() + Sync) {
        #[cfg(feature = "rayon")]
        if let Some(pool) = &self.pool {
            pool.broadcast(|_| work());
            return;
        }
        work();
    }
}
