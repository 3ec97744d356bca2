//! `tpd list`: who intercepts what.

use serde::Serialize;
use tpd_api::exit::ExitCode;
use tpd_api::intercept::{InterceptStatus, State};
use tpd_api::local::{Intercept, Other};

use super::OutputArgs;
use super::describe::{filter, table};
use crate::failure::Failure;
use crate::local;
use crate::output::{self, Format};

/// Lists intercepts: this machine's, and those of others as far as you may see them
#[derive(Clone, Debug, clap::Args)]
pub(super) struct List {
    /// Namespace to look in for those of others [default: the connected one]
    #[arg(short, long, conflicts_with = "all_namespaces", value_parser = super::label)]
    namespace: Option<String>,
    /// Look in every namespace
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What there is.
#[derive(Serialize)]
struct There {
    own: Vec<Intercept>,
    others: Vec<Other>,
    /// Why those of others are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl List {
    pub(super) fn format(&self) -> Format {
        self.output.output
    }

    pub(super) async fn run(&self) -> Result<ExitCode, Failure> {
        let status = local::status().await?.ok_or_else(local::not_connected)?;
        let namespace = self.namespace.clone().unwrap_or(status.request.namespace);
        let looked = local::others((!self.all_namespaces).then_some(&*namespace)).await;
        let there = There {
            own: status.intercepts,
            problem: looked.as_ref().err().map(ToString::to_string),
            others: looked.unwrap_or_default(),
        };
        match self.format() {
            Format::Json => output::json(&there),
            Format::Human => {
                output::text(&there.render());
                there.problem.iter().for_each(|problem| {
                    output::note(&format!("intercepts of others are not shown: {problem}"));
                    if self.all_namespaces {
                        output::note("one namespace is looked into with: tpd list -n NAMESPACE");
                    }
                });
            }
        }
        Ok(ExitCode::Ok)
    }
}

impl There {
    fn render(&self) -> String {
        if self.own.is_empty() && self.others.is_empty() {
            return "there are no intercepts\n".into();
        }
        let head = ["NAMESPACE", "WORKLOAD", "OWNER", "STATE", "PODS", "NAME", "TRAFFIC"].map(str::to_owned);
        let own = self
            .own
            .iter()
            .map(|one| row(&as_other(one), if one.over { "Over" } else { state(&one.status) }));
        let others = self.others.iter().map(|one| row(one, state(&one.status)));
        table(&std::iter::once(head.to_vec()).chain(own).chain(others).collect::<Vec<_>>())
    }
}

/// An own one as others see it, but for its owner.
fn as_other(own: &Intercept) -> Other {
    Other {
        namespace: own.request.namespace.clone(),
        name: own.request.name.clone().unwrap_or_default(),
        owner: "you, here".into(),
        workload: own.request.workload.clone(),
        filter: own.request.filter.clone(),
        mode: own.request.mode,
        status: own.status.clone(),
    }
}

fn row(one: &Other, state: &str) -> Vec<String> {
    let counts = one.status.as_ref().map(|status| status.counts).unwrap_or_default();
    vec![
        one.namespace.clone(),
        one.workload.to_string(),
        one.owner.clone(),
        state.into(),
        format!("{}/{}", counts.acknowledged, counts.ready),
        one.name.clone(),
        filter(&one.filter, one.mode),
    ]
}

/// Where it stands, as the resource has it.
pub(super) fn state(status: &Option<InterceptStatus>) -> &'static str {
    match status.as_ref().map(|status| status.state) {
        None => "Pending",
        Some(State::NoAgent) => "NoAgent",
        Some(State::Waiting) => "Waiting",
        Some(State::Active) => "Active",
    }
}

#[cfg(test)]
mod tests {
    use tpd_api::filter::Filter;
    use tpd_api::intercept::{Counts, Mode};

    use super::*;
    use crate::intercept::example;

    #[test]
    fn own_and_others_stand_in_one_table() {
        let mut request = example("web", &["http"]);
        request.name = Some("web-ann-1".into());
        let counts = Counts { pods: 3, ready: 3, agents: 3, acknowledged: 2, leaving: 0 };
        let active = Some(InterceptStatus { state: State::Active, counts, ..InterceptStatus::default() });
        let own = Intercept {
            request,
            status: active,
            current: true,
            silent: Vec::new(),
            over: false,
            problem: None,
        };
        let filter = Filter { paths: vec!["/api/*".into()], ..Filter::default() };
        let other = Other {
            owner: "bob".into(),
            name: "web-bob-1".into(),
            status: None,
            filter,
            mode: Mode::Wiretap,
            ..as_other(&own)
        };
        let there = There { own: vec![own], others: vec![other], problem: None };
        assert_eq!(
            there.render(),
            "\
NAMESPACE   WORKLOAD         OWNER       STATE     PODS   NAME        TRAFFIC
shop        deployment/web   you, here   Active    2/3    web-ann-1   all traffic
shop        deployment/web   bob         Pending   0/0    web-bob-1   a copy of requests with path /api/*
"
        );
        let none = There { own: Vec::new(), others: Vec::new(), problem: None };
        assert_eq!(none.render(), "there are no intercepts\n");
    }
}
