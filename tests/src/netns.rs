//! Working inside another network namespace.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::{panic, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Runs `work` on a thread that lives in the network namespace `name` (of `ip netns`). Its sockets are that namespace's;
/// files and processes stay the machine's.
///
/// # Panics
/// If the namespace is not there, or `work` panics.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let path = format!("/run/netns/{name}");
            let namespace = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .unwrap_or_else(|error| panic!("cannot enter {path}: {error}"));
            work()
        });
        worker.join()
    });
    result.unwrap_or_else(|cause| panic::resume_unwind(cause))
}
