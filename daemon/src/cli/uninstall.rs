//! `tpd uninstall`: everything of tpd out of a cluster.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use kube::Api;
use kube::api::ListParams;
use tpd_api::exit::ExitCode;
use tpd_api::install::{INTERCEPT_ROLE, Options};
use tpd_api::session::{ClientSession, Phase};

use super::{ClusterArgs, agrees, install};
use crate::failure::Failure;
use crate::install::Site;
use crate::kube::errors::{Call, bounded};
use crate::output;
use crate::progress::Progress;

const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Removes everything of tpd from a cluster: manager, roles and their bindings, sessions, resource definitions
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Uninstall {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Do not ask, also when people are connected
    #[arg(short, long)]
    yes: bool,
}

impl Uninstall {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let site = install::site(&self.cluster).await?;
        site.check_whereabouts().await?;
        let options = Options { namespace: site.namespace.clone(), ..Options::default() };
        if !site.is_installed(&options).await? {
            output::note(&format!(
                "no manager in namespace {}; removing what else there may be",
                site.namespace
            ));
        }
        let people = connected(&site).await?;
        if !people.is_empty() && !self.yes {
            confirm(&people)?;
        }
        let mut progress = Progress::new();
        let bindings = site.bindings().await?;
        site.unbind(&bindings, &mut progress).await?;
        site.delete(&options, &mut progress).await?;
        let settled = site.settle_released(&mut progress).await?;
        drop(progress);
        if settled.given_back > 0 {
            output::note(&format!(
                "{} being replaced just now, and given back to the ReplicaSet",
                match settled.given_back {
                    1 => "1 pod was".to_owned(),
                    many => format!("{many} pods were"),
                }
            ));
        }
        if !settled.left.is_empty() {
            output::note(&format!(
                "pods that were being replaced serve on, and are nobody's, as their ReplicaSet is gone; once their Deployment has \
                 enough others, delete them with:\n  {}",
                settled.left.join("\n  ")
            ));
        }
        if !bindings.foreign.is_empty() {
            output::note(&format!(
                "other people's bindings to the ClusterRole {INTERCEPT_ROLE} lead nowhere now; remove them with:\n  {}",
                bindings.foreign.join("\n  ")
            ));
        }
        output::text(&format!("uninstalled from namespace {}\n", site.namespace));
        Ok(ExitCode::Ok)
    }
}

/// Whoever is connected, as `owner on host`.
async fn connected(site: &Site) -> Result<Vec<String>, Failure> {
    let call = Call { doing: "list ClientSessions", server: &site.server, namespace: &site.namespace };
    let sessions: Api<ClientSession> = Api::namespaced(site.client.clone(), &site.namespace);
    let sessions = match bounded(call, CALL_TIMEOUT, sessions.list(&ListParams::default())).await {
        Ok(sessions) => sessions.items,
        // The definition of ClientSession is gone already, and so are they.
        Err(failure) if failure.code == ExitCode::NotInstalled => Vec::new(),
        Err(failure) => return Err(failure),
    };
    let ready =
        sessions.into_iter().filter(|s| s.status.as_ref().is_some_and(|status| status.phase == Phase::Ready));
    Ok(ready.map(|session| format!("{} on {}", session.spec.owner, session.spec.host)).collect())
}

fn confirm(people: &[String]) -> Result<(), Failure> {
    let refused = Failure::new(ExitCode::Busy, format!("{} would be disconnected", people.join(", ")))
        .help("nothing was changed; say so with --yes if that is meant");
    if !io::stdin().is_terminal() {
        return Err(refused);
    }
    output::note(&format!("this disconnects {}. Go on? [y/N]", people.join(", ")));
    if agrees(io::stdin().lock()) { Ok(()) } else { Err(refused) }
}
