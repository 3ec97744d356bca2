//! A laptop in namespaces of its own, with a cluster and an internet at the other ends of two cables.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write, stderr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const INSIDE: &str = "TPD_RESOLVER_INSIDE";
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `scenario` as root in namespaces of its own, with the files of `layer` over this machine's. Says so and passes where that can't be,
/// except in CI.
pub(crate) fn isolated(test: &str, layer: &str, scenario: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return scenario();
    }
    if !rustix::process::geteuid().is_root() {
        assert!(env::var_os("CI").is_none(), "these tests need root");
        // Past what the test harness captures: a person has to see it.
        let mut terminal = stderr();
        return writeln!(terminal, "skipped: {test} needs root").unwrap();
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    prepare(repository);
    let layer = if layer.is_empty() { PathBuf::new() } else { repository.join(layer) };
    let status = Command::new(repository.join("tests/resolver/isolate.sh"))
        .arg(layer)
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, repository)
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its namespaces");
}

/// Once for all tests of this process, which would otherwise trip over each other.
fn prepare(repository: &Path) {
    static DONE: std::sync::Once = std::sync::Once::new();
    DONE.call_once(|| {
        let status = Command::new(repository.join("tests/resolver/overlay.sh")).status().unwrap();
        assert!(status.success(), "tests/resolver/overlay.sh failed");
    });
}

/// What `tests/resolver/overlay.sh` built.
pub(crate) fn built(program: &str) -> PathBuf {
    Path::new(&env::var_os(INSIDE).unwrap()).join("target").join(program)
}

/// A daemon that has taken over the resolver, its watchdog, and the world around them.
pub(crate) struct Lab {
    world: [Child; 2],
    daemon: Child,
    ready: String,
}

impl Lab {
    pub(crate) fn start(namespaces: &[&str]) -> Self {
        let world = start_world();
        let mut daemon = role("daemon", &namespaces.join(" ")).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(daemon.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut lines = lines.inspect(|line| println!("daemon: {line}"));
        let ready = lines
            .find_map(|line| Some(line.split_once("ready ")?.1.to_owned()))
            .expect("the daemon takes over");
        std::thread::spawn(move || lines.for_each(drop));
        Self { world, daemon, ready }
    }

    pub(crate) fn backend(&self) -> &str {
        self.ready.split(' ').next().unwrap()
    }

    pub(crate) fn milliseconds(&self) -> u64 {
        self.ready.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Ends the daemon as `tpd down` does.
    pub(crate) fn stop(&mut self) {
        run(&format!("kill -TERM {}", self.daemon.id()));
        assert!(self.daemon.wait().unwrap().success(), "the daemon gives the resolver back");
    }

    /// The same, where that may not succeed.
    pub(crate) fn ends(&mut self) {
        run(&format!("kill -TERM {}", self.daemon.id()));
        let began = Instant::now();
        while self.daemon.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < PATIENCE, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    pub(crate) fn suspend(&self) {
        run(&format!("kill -STOP {}", self.daemon.id()));
    }

    /// Ends the daemon and its watchdog at once.
    pub(crate) fn cut_power(mut self) {
        let watchdog = self.ready.split(' ').nth(2).unwrap();
        run(&format!("kill -9 {watchdog} {}", self.daemon.id()));
        self.daemon.wait().unwrap();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Whichever has ended already is no matter: everything ends with the namespaces.
        for child in self.world.iter_mut().chain([&mut self.daemon]) {
            let _ = (child.kill(), child.wait());
        }
        let _ = Command::new("sh")
            .args(["-c", "ip link del wan0; ip link del tpd0"])
            .stderr(Stdio::null())
            .status();
    }
}

/// The far ends of both cables: an internet with two name servers, and the gateway into a cluster.
fn start_world() -> [Child; 2] {
    let holder = Command::new("unshare").args(["--net", "sleep", "infinity"]).spawn().unwrap();
    let id = holder.id();
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    wait_until("the world has a network of its own", || {
        fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|namespace| namespace != own)
    });
    run(&format!(
        "ip link add wan0 type veth peer name wan1 netns {id}
         ip link add tpd0 type veth peer name tpd1 netns {id}
         ip addr add 192.0.2.2/24 dev wan0; ip link set wan0 up
         ip addr add 100.127.0.5/16 dev tpd0; ip link set tpd0 up
         ip route add 198.51.100.0/24 dev wan0
         {world} ip addr add 192.0.2.53/24 dev wan1
         {world} ip addr add 198.51.100.54/24 dev wan1
         {world} ip link set wan1 up
         {world} ip addr add 100.127.0.1/16 dev tpd1
         {world} ip link set tpd1 up",
        world = format_args!("nsenter -t {id} -n")
    ));
    let world = role("world", &id.to_string()).stdout(Stdio::null()).spawn().unwrap();
    if Path::new("/run/systemd/resolve").exists() {
        run("resolvectl dns wan0 192.0.2.53; resolvectl domain wan0 '~.'; resolvectl default-route wan0 yes");
    }
    wait_until("the internet answers", || {
        !output("dig +short +time=1 +tries=1 @192.0.2.53 example.com").is_empty()
    });
    wait_until("the cluster answers", || {
        !output("dig +short +time=1 +tries=1 @100.127.0.1 web.shop.svc.cluster.local").is_empty()
    });
    [holder, world]
}

/// systemd-resolved as a distribution sets it up, without systemd.
pub(crate) fn start_resolved() {
    run("mkdir -p /run/dbus /run/systemd/resolve && chown systemd-resolve: /run/systemd/resolve
         pidof dbus-daemon >/dev/null || dbus-daemon --system --nopidfile --fork
         { /usr/lib/systemd/systemd-resolved 2>&1 | sed 's/^/resolved: /'; } >/dev/null &
         ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf");
    wait_until("systemd-resolved runs", || {
        Path::new("/run/systemd/resolve/stub-resolv.conf").exists()
            && Command::new("resolvectl")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap()
                .success()
    });
    if Path::new("/sys/class/net/wan0").exists() {
        run("resolvectl dns wan0 192.0.2.53; resolvectl domain wan0 '~.'; resolvectl default-route wan0 yes");
    }
}

/// This executable in another part. The world takes the process whose network is its own.
pub(crate) fn role(name: &str, arguments: &str) -> Command {
    let executable = env::current_exe().unwrap();
    let mut command = match name {
        "world" => {
            let mut command = Command::new("nsenter");
            command.args(["-t", arguments, "-n"]).arg(executable);
            command
        }
        _ => Command::new(executable),
    };
    command.args(["--exact", "role", "--nocapture", "--test-threads=1"]);
    command.env("TPD_RESOLVER_ROLE", name).env("TPD_RESOLVER_ARGUMENTS", arguments);
    command
}

pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn run(script: &str) {
    let mut shell = Command::new("sh").arg("-e").stdin(Stdio::piped()).spawn().unwrap();
    shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(shell.wait().unwrap().success(), "failed: {script}");
}

pub(crate) fn output(script: &str) -> String {
    let output = Command::new("sh").args(["-c", script]).stderr(Stdio::null()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
