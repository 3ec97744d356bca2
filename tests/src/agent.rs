//! The agent in a pod, as the node's processes.

use serde_json::Value;

use crate::Cluster;

/// An agent's processes, by their ids on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// First process of the container.
    pub supervisor: u32,
    /// The one that does the work.
    pub worker: u32,
}

impl Agent {
    /// That of a pod.
    ///
    /// # Errors
    /// What is there, if it is not one supervisor with one worker.
    pub fn of(cluster: &Cluster, namespace: &str, pod: &str) -> Result<Self, String> {
        let pod = cluster.object(&format!("pod {pod} -n {namespace}"));
        let uid = pod["metadata"]["uid"].as_str().ok_or("the pod has no UID")?;
        let script = format!(
            "for p in $(pgrep -x tpd-agent); do grep -q {uid} /proc/$p/cgroup && echo $p $(ps -o ppid= -p $p); done; true"
        );
        let run = cluster.node(&script);
        let processes: Vec<(u32, u32)> = run
            .out()
            .lines()
            .filter_map(|line| {
                let (pid, parent) = line.split_once(' ')?;
                Some((pid.parse().ok()?, parent.trim().parse().ok()?))
            })
            .collect();
        let worker = processes.iter().find(|(_, parent)| processes.iter().any(|(pid, _)| pid == parent));
        match (worker, processes.len()) {
            (Some(&(worker, supervisor)), 2) => Ok(Self { supervisor, worker }),
            _ => Err(format!("the agent's processes and their parents are {processes:?}")),
        }
    }

    /// Sends the worker a signal.
    pub fn signal_worker(&self, cluster: &Cluster, signal: &str) {
        cluster.node(&format!("kill -{signal} {}", self.worker)).ok();
    }

    /// Sends both processes a signal, the supervisor first.
    pub fn signal(&self, cluster: &Cluster, signal: &str) {
        cluster.node(&format!("kill -{signal} {} {}", self.supervisor, self.worker)).ok();
    }

    /// Breaks its connections to managers, and lets it make new ones: the pod's own network namespace resets them for a moment.
    pub fn break_control(&self, cluster: &Cluster) {
        let table = format!(
            "table inet tpd-test-control {{ chain output {{ type filter hook output priority -10; \
             tcp dport {} reject with tcp reset; }}; }}",
            tpd_api::STREAM_PORT
        );
        cluster
            .node(&format!(
                "nsenter -t {} -n sh -c \"nft '{table}'; sleep 0.6; nft delete table inet tpd-test-control\"",
                self.worker
            ))
            .ok();
    }

    /// Ends the whole container as the kernel does when it has run out of memory.
    pub fn kill_container(&self, cluster: &Cluster) {
        self.signal(cluster, "KILL");
    }
}

/// A container's memory limit, just above what it uses: the kernel ends something in it as soon as it needs more. The limit is as it
/// was when this is dropped.
#[derive(Debug)]
pub struct Squeeze {
    cluster: &'static Cluster,
    directory: String,
    file: &'static str,
    before: String,
}

impl Squeeze {
    /// Limits the agent's container.
    ///
    /// # Panics
    /// If its control group cannot be found or limited.
    #[must_use]
    #[track_caller]
    pub fn on(cluster: &'static Cluster, agent: &Agent) -> Self {
        let own = format!("/proc/{}/cgroup", agent.worker);
        let script = format!(
            "v1=/sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' {own}); \
             v2=/sys/fs/cgroup$(sed -n 's/^0:://p' {own}); if [ -e $v2/memory.max ]; then echo $v2; else echo $v1; fi"
        );
        let directory = cluster.node(&script).ok().out().to_owned();
        let is_v2 = cluster.node(&format!("test -e {directory}/memory.max")).code == Some(0);
        let (file, usage) = if is_v2 {
            ("memory.max", "memory.current")
        } else {
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
        };
        let before = cluster.node(&format!("cat {directory}/{file}")).ok().out().to_owned();
        let squeeze = Self { cluster, directory, file, before };
        squeeze.limit(&format!("$(( $(cat {}/{usage}) + 65536 ))", squeeze.directory));
        squeeze
    }

    /// How often the kernel has ended something there for want of memory.
    ///
    /// # Panics
    /// If it does not say.
    #[must_use]
    #[track_caller]
    pub fn kills(&self) -> u64 {
        let script = format!(
            "cd {}; cat memory.oom_control memory.events 2>/dev/null | sed -n 's/^oom_kill //p'",
            self.directory
        );
        self.cluster.node(&script).ok().out().parse().expect("a number")
    }

    /// Ends it, and says how often the kernel has ended something there in the meantime.
    #[must_use]
    #[track_caller]
    pub fn lift(self) -> u64 {
        self.limit(&self.before);
        self.kills()
    }

    fn limit(&self, bytes: &str) {
        self.cluster.node(&format!("echo {bytes} > {}/{}", self.directory, self.file)).ok();
    }
}

impl Drop for Squeeze {
    fn drop(&mut self) {
        // The container may be another by now, with its own limit.
        let _ = self.cluster.node(&format!(
            "test ! -e {0}/{1} || echo {2} > {0}/{1}",
            self.directory, self.file, self.before
        ));
    }
}

/// The containers of a pod by the names that matter to tpd: the app's, and whether an agent is among the others.
pub(crate) fn has_agent(pod: &Value) -> bool {
    let containers = pod["spec"]["initContainers"].as_array();
    containers.is_some_and(|all| all.iter().any(|one| one["name"] == tpd_api::inject::AGENT))
}
