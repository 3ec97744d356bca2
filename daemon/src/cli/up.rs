//! `tpd up`: connect, in the background unless told otherwise.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tpd_api::exit::ExitCode;
use tpd_api::local::{LOG, PathKind, Phase, Request, Status};

use super::ClusterArgs;
use crate::daemon::report::{Event, Reporter};
use crate::daemon::{self, Start, log};
use crate::failure::Failure;
use crate::invoker::Invoker;
use crate::kube::config;
use crate::progress::Progress;
use crate::{local, output};

/// Another `tpd up` for the same cluster may be under way; it has this long.
const OTHER_TIMEOUT: Duration = Duration::from_secs(30);

/// Connects this machine to the cluster's network and DNS
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Up {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Namespace whose services resolve by their bare names [default: the context's]
    #[arg(short, long)]
    namespace: Option<String>,
    /// Which way to the manager to use
    #[arg(long, value_enum, default_value_t)]
    path: PathArg,
    /// Network that stays with this machine, though the cluster uses it (may be repeated)
    #[arg(long, value_name = "CIDR")]
    exclude: Vec<IpNet>,
    /// Network that goes to the cluster, though this machine uses it (may be repeated)
    #[arg(long, value_name = "CIDR")]
    prefer_cluster: Vec<IpNet>,
    /// Stay in the foreground until interrupted
    #[arg(long)]
    foreground: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum PathArg {
    /// The best that answers.
    #[default]
    Auto,
    /// A stream through the API server's proxy.
    Proxy,
    /// A stream through the API server's port-forward.
    Forward,
    /// UDP, straight to the manager.
    Udp,
}

impl PathArg {
    fn only(self) -> Option<PathKind> {
        match self {
            Self::Auto => None,
            Self::Proxy => Some(PathKind::Proxy),
            Self::Forward => Some(PathKind::Forward),
            Self::Udp => Some(PathKind::Udp),
        }
    }
}

impl Up {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let began_ms = daemon::now_ms();
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::new(
                ExitCode::Privilege,
                "tpd up needs root: it makes a network device and sets routes and DNS",
            )
            .help(
                "run it with sudo; your own kubeconfig and credentials are used all the same: sudo tpd up",
            ));
        }
        let invoker = Invoker::detect();
        let files = config::files(&invoker, self.cluster.kubeconfig.as_deref())?;
        let target = config::load(&files, self.cluster.context.as_deref()).await?;
        let request = self.request(target);
        if let Some(status) = local::status().await?
            && is_up(status, &request).await?
        {
            output::text(&format!("already connected to context {}\n", request.context));
            return Ok(ExitCode::Ok);
        }
        let start = Start { request, files, invoker, began_ms };
        if self.foreground { foreground(start).await } else { background(&start) }
    }

    fn request(&self, target: config::Target) -> Request {
        let sorted = |networks: &[IpNet]| {
            let mut networks: Vec<_> = networks.iter().map(IpNet::trunc).collect();
            networks.sort_unstable();
            networks.dedup();
            networks
        };
        Request {
            context: target.context,
            server: target.server,
            namespace: self.namespace.clone().unwrap_or(target.namespace),
            manager_namespace: self.cluster.manager_namespace.clone(),
            path: self.path.only(),
            exclude: sorted(&self.exclude),
            prefer_cluster: sorted(&self.prefer_cluster),
        }
    }
}

/// A daemon runs: it is what was asked for, or it is in the way, or it is just leaving.
async fn is_up(mut status: Status, wanted: &Request) -> Result<bool, Failure> {
    let deadline = Instant::now() + OTHER_TIMEOUT;
    loop {
        match status.phase {
            Phase::Disconnecting => {}
            _ if status.request != *wanted => return Err(busy(&status.request)),
            Phase::Connected => return Ok(true),
            Phase::Connecting | Phase::Reconnecting => {}
        }
        if Instant::now() > deadline {
            return Err(Failure::new(
                ExitCode::Timeout,
                "another tpd up is under way, and is not getting through",
            )
            .because(status.problem.unwrap_or_else(|| "it does not say why".into()))
            .help("see tpd status and tpd logs; give it up with: tpd down"));
        }
        sleep(Duration::from_millis(20)).await;
        match local::status().await? {
            Some(newer) => status = newer,
            None => return Ok(false),
        }
    }
}

fn busy(other: &Request) -> Failure {
    let error =
        format!("already connected, to context {:?} with namespace {:?}", other.context, other.namespace);
    Failure::new(ExitCode::Busy, error)
        .because("this call asks for something else, and one connection at a time is possible")
        .help("disconnect first: tpd down")
}

async fn foreground(start: Start) -> Result<ExitCode, Failure> {
    log::start(Path::new(LOG), &start.invoker).map_err(|error| {
        Failure::new(ExitCode::Failure, format!("{LOG} cannot be written")).caused_by(&error)
    })?;
    let leftovers = daemon::run(start, Reporter::person(), CancellationToken::new()).await?;
    super::down::say(&leftovers);
    Ok(ExitCode::Ok)
}

/// Starts the daemon, shows how it gets on, and leaves it alone once it is connected.
fn background(start: &Start) -> Result<ExitCode, Failure> {
    let mut daemon = spawn(start)
        .map_err(|error| Failure::new(ExitCode::Failure, "the daemon cannot be started").caused_by(&error))?;
    let mut progress = Progress::new();
    let lines = BufReader::new(daemon.stdout.take().expect("standard output is piped")).lines();
    for line in lines.map_while(Result::ok) {
        match serde_json::from_str(&line) {
            Ok(Event::Step { text }) => progress.step(&text),
            Ok(Event::Connected { status }) => {
                drop(progress);
                output::text(&summary(&status));
                return Ok(ExitCode::Ok);
            }
            Ok(Event::Failed { failure }) => {
                drop(progress);
                // It has undone everything; once it is gone another may start.
                let _ = daemon.wait();
                return Err(failure);
            }
            Err(_) => progress.note(&line),
        }
    }
    let ended = daemon.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
    Err(Failure::new(ExitCode::Failure, "the daemon ended without saying why")
        .because(ended)
        .help("see: tpd logs"))
}

fn spawn(start: &Start) -> std::io::Result<Child> {
    let log: File = log::open(Path::new(LOG), (start.invoker.uid, start.invoker.gid))?;
    let mut daemon = Command::new(std::env::current_exe()?)
        .arg("daemon")
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(start.invoker.proxy_variables())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let mut stdin = daemon.stdin.take().expect("standard input is piped");
    stdin.write_all(&serde_json::to_vec(start)?)?;
    Ok(daemon)
}

/// What a person wants to know who has just connected.
pub(crate) fn summary(status: &Status) -> String {
    let mut text = format!("connected to context {}", status.request.context);
    if let Some(user) = &status.user {
        text += &format!(" as {user}");
    }
    if let Some(ready) = status.ready_ms {
        text += &format!(" in {:.2} s", Duration::from_millis(ready).as_secs_f64());
    }
    text += &format!("\n  namespace  {}\n", status.request.namespace);
    if let Some(path) = status.paths.iter().find(|path| path.active) {
        text += &format!(
            "  path       {} to {} ({})\n",
            super::status::kind(path.kind),
            path.target,
            path.reason
        );
    }
    let networks: Vec<_> = status.networks.iter().map(ToString::to_string).collect();
    text += &format!("  networks   {}\n", networks.join(", "));
    for excluded in &status.excluded {
        text += &format!("  left out   {} ({})\n", excluded.network, excluded.reason);
    }
    for intercept in &status.intercepts {
        let request = &intercept.request;
        let name = request.name.as_deref().unwrap_or_default();
        text += &format!("  resumed    intercept {}/{name} of {}\n", request.namespace, request.workload);
    }
    if let Some(dns) = &status.dns {
        text += &format!("  DNS        {} by way of {}\n", dns.zone, dns.method);
    }
    text
}
