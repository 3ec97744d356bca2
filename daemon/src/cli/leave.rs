//! `tpd leave`: the traffic goes back to the app.

use serde::Serialize;
use tpd_api::exit::ExitCode;
use tpd_api::intercept::Workload;
use tpd_api::local::{Intercept, Other};

use super::OutputArgs;
use crate::failure::Failure;
use crate::local;
use crate::output::{self, Format};

/// Ends intercepts of this machine: the apps serve again
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Leave {
    /// Names of intercepts, or of workloads [default: the only one that there is]
    #[arg(value_name = "NAME|WORKLOAD", conflicts_with = "all")]
    names: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
    /// Only those of this namespace
    #[arg(short, long, value_parser = super::label)]
    namespace: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Serialize)]
struct Left {
    left: Vec<String>,
}

impl Leave {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ExitCode, Failure> {
        let there = local::intercepts().await?;
        let mut left = Vec::new();
        let chosen = match self.choose(&there) {
            Err(failure) if failure.code == ExitCode::NotFound && !self.names.is_empty() => {
                return Err(self.elsewhere(failure).await);
            }
            chosen => chosen?,
        };
        for (namespace, name) in chosen {
            local::leave(&namespace, &name).await?;
            left.push(format!("{namespace}/{name}"));
        }
        match self.format() {
            Format::Json => output::json(&Left { left }),
            Format::Human if left.is_empty() => output::text("there is no intercept\n"),
            Format::Human => left.iter().for_each(|name| output::text(&format!("left {name}\n"))),
        }
        Ok(ExitCode::Ok)
    }

    /// Adds whose they are, where there are such that this machine has not made.
    async fn elsewhere(&self, failure: Failure) -> Failure {
        let namespace = match &self.namespace {
            Some(namespace) => Some(namespace.clone()),
            None => local::status().await.ok().flatten().map(|status| status.request.namespace),
        };
        let Some(namespace) = namespace else { return failure };
        // Who may not see them is told what this machine knows.
        let others = local::others(Some(&namespace)).await.unwrap_or_default();
        explained(failure, &self.names, &others)
    }

    /// Namespace and name of each that is meant.
    fn choose(&self, there: &[Intercept]) -> Result<Vec<(String, String)>, Failure> {
        let in_namespace = |one: &&Intercept| {
            self.namespace.as_ref().is_none_or(|namespace| *namespace == one.request.namespace)
        };
        let there: Vec<&Intercept> = there.iter().filter(in_namespace).collect();
        let chosen = match (&*self.names, &*there) {
            _ if self.all => there.clone(),
            ([], [only]) => vec![*only],
            ([], []) => return Err(Failure::new(ExitCode::NotFound, "there is no intercept to leave")),
            ([], _) => {
                return Err(Failure::new(ExitCode::Usage, "there are several intercepts; which one?")
                    .because(listed(&there))
                    .help("name them, or say --all"));
            }
            (names, _) => {
                let mut chosen: Vec<&Intercept> = Vec::new();
                for wanted in names {
                    let before = chosen.len();
                    chosen.extend(there.iter().filter(|one| is_meant(one, wanted)));
                    if chosen.len() == before {
                        return Err(unknown(wanted, &there));
                    }
                }
                chosen
            }
        };
        let mut keys: Vec<_> = chosen.into_iter().map(key).collect();
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }
}

fn key(intercept: &Intercept) -> (String, String) {
    (intercept.request.namespace.clone(), intercept.request.name.clone().unwrap_or_default())
}

fn is_meant(intercept: &Intercept, wanted: &str) -> bool {
    let (namespace, name) = key(intercept);
    is_called(&namespace, &name, &intercept.request.workload, wanted)
}

fn is_called(namespace: &str, name: &str, workload: &Workload, wanted: &str) -> bool {
    [name.to_owned(), format!("{namespace}/{name}"), workload.name.clone(), workload.to_string()]
        .iter()
        .any(|known| known == wanted)
}

fn explained(failure: Failure, wanted: &[String], others: &[Other]) -> Failure {
    let is_meant = |other: &&Other| {
        wanted.iter().any(|wanted| is_called(&other.namespace, &other.name, &other.workload, wanted))
    };
    let meant: Vec<_> = others.iter().filter(is_meant).collect();
    let Some(first) = meant.first() else { return failure };
    let help = format!(
        "its owner or an administrator ends it with: kubectl -n {} delete intercept {}",
        first.namespace, first.name
    );
    let whose = |other: &&Other| {
        format!("{} of {} is {}'s, and this machine did not make it", other.name, other.workload, other.owner)
    };
    meant.iter().map(whose).fold(failure, Failure::because).help(help)
}

fn unknown(wanted: &str, there: &[&Intercept]) -> Failure {
    let known = if there.is_empty() { "there is none".to_owned() } else { listed(there) };
    Failure::new(ExitCode::NotFound, format!("this machine has no intercept {wanted:?}")).because(known)
}

fn listed(there: &[&Intercept]) -> String {
    let names: Vec<_> =
        there.iter().map(|one| format!("{} of {}", key(one).1, one.request.workload)).collect();
    format!("there are: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;

    fn intercept(workload: &str, name: &str) -> Intercept {
        let mut request = example(workload, &["http"]);
        request.name = Some(name.into());
        Intercept { request, status: None, current: false, silent: Vec::new(), over: false, problem: None }
    }

    fn chosen(names: &[&str], all: bool, there: &[Intercept]) -> Result<Vec<String>, ExitCode> {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let leave = Leave { names, all, namespace: None, output: OutputArgs { output: Format::Human } };
        let keys = leave.choose(there).map_err(|failure| failure.code)?;
        Ok(keys.into_iter().map(|(_, name)| name).collect())
    }

    #[test]
    fn intercepts_are_named_by_themselves_or_by_their_workload() {
        let there = [intercept("web", "web-1"), intercept("web", "web-2"), intercept("api", "api-1")];
        assert_eq!(chosen(&["web"], false, &there).unwrap(), ["web-1", "web-2"]);
        assert_eq!(
            chosen(&["api-1", "deployment/api", "shop/web-2"], false, &there).unwrap(),
            ["api-1", "web-2"]
        );
        assert_eq!(chosen(&[], true, &there).unwrap().len(), 3);
        assert_eq!(chosen(&["db"], false, &there), Err(ExitCode::NotFound));
    }

    #[test]
    fn one_that_was_made_elsewhere_is_its_owners() {
        let other = |workload: &str, name: &str| Other {
            namespace: "shop".into(),
            name: name.into(),
            owner: "bob".into(),
            workload: example(workload, &[]).workload,
            filter: Default::default(),
            mode: Default::default(),
            status: None,
        };
        let others = [other("web", "web-bob"), other("api", "api-bob")];
        let failure =
            |wanted: &str| explained(Failure::new(ExitCode::NotFound, "none"), &[wanted.to_owned()], &others);
        for wanted in ["web-bob", "web", "deployment/web", "shop/web-bob"] {
            let failure = failure(wanted);
            assert_eq!(
                failure.causes,
                ["web-bob of deployment/web is bob's, and this machine did not make it"]
            );
            assert!(failure.help.unwrap().ends_with("kubectl -n shop delete intercept web-bob"));
        }
        assert_eq!(failure("db"), Failure::new(ExitCode::NotFound, "none"));
    }

    #[test]
    fn the_only_one_needs_no_name() {
        assert_eq!(chosen(&[], false, &[intercept("web", "web-1")]).unwrap(), ["web-1"]);
        assert_eq!(chosen(&[], false, &[]), Err(ExitCode::NotFound));
        assert_eq!(chosen(&[], true, &[]), Ok(Vec::new()));
        let two = [intercept("web", "web-1"), intercept("api", "api-1")];
        assert_eq!(chosen(&[], false, &two), Err(ExitCode::Usage));
    }
}
