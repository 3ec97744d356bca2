//! Which workload a name alone means: the only one that has it, of whatever kind.

use std::collections::BTreeSet;

use tpd_api::exit::ExitCode;
use tpd_api::intercept::{Workload, WorkloadKind};
use tpd_api::local::InterceptRequest;

use super::consent::{Person, proposal};
use super::parse;
use crate::failure::Failure;
use crate::local;

/// What is said of an intercept before it is made, or why it cannot be.
type Answer = Result<Vec<String>, Failure>;

/// What is said of it where its workload's kind was given.
pub(super) async fn ask(request: &InterceptRequest, person: Person) -> Answer {
    Ok(local::preview(&proposal(request, person)).await?.notes)
}

/// What is said of it where only a name was given; the request gets the kind of the workload that has it.
///
/// Two questions are enough: a manager that knows no workload of one kind names those of every other that are called the same.
pub(super) async fn find(request: &mut InterceptRequest, person: Person) -> Answer {
    let of = |kind| {
        let workload = Workload { kind, name: request.workload.name.clone() };
        InterceptRequest { workload, ..request.clone() }
    };
    let (deployment, stateful) = (of(WorkloadKind::Deployment), of(WorkloadKind::StatefulSet));
    let (first, second) = tokio::join!(ask(&deployment, person), ask(&stateful, person));
    let known: BTreeSet<Workload> =
        [told(&deployment, &first), told(&stateful, &second)].into_iter().flatten().collect();
    if known.len() > 1 {
        return Err(ambiguous(request, &known));
    }
    // Where there is none, what was said of the Deployment has the names that are near.
    let Some(only) = known.into_iter().next() else { return first };
    request.workload = only;
    match request.workload.kind {
        WorkloadKind::Deployment => first,
        WorkloadKind::StatefulSet => second,
        _ => ask(request, person).await,
    }
}

/// The workloads of that name that an answer tells of: the one that it is about, or others in its place.
fn told(request: &InterceptRequest, answer: &Answer) -> Vec<Workload> {
    let workload = &request.workload;
    let Err(failure) = answer else { return vec![workload.clone()] };
    match failure.error.strip_prefix(&workload.absent_from(&request.namespace)) {
        Some(rest) => {
            let others = rest.strip_prefix(", but ").unwrap_or_default().split(" and ");
            others.filter_map(|other| parse::workload(other, None).ok()).collect()
        }
        // What is wrong may be wrong with everything, such as the session.
        None if failure.error.contains(&workload.to_string()) => vec![workload.clone()],
        None => Vec::new(),
    }
}

fn ambiguous(request: &InterceptRequest, known: &BTreeSet<Workload>) -> Failure {
    let names: Vec<_> = known.iter().map(ToString::to_string).collect();
    let (namespace, name) = (&request.namespace, &request.workload.name);
    Failure::new(
        ExitCode::Usage,
        format!("namespace {namespace} has several workloads called {name}; which one?"),
    )
    .because(format!("there are {}", names.join(" and ")))
    .help(format!("say it as in: tpd intercept {}, or with --kind", names[0]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;

    fn of(kind: WorkloadKind) -> InterceptRequest {
        let mut request = example("web", &["http"]);
        request.workload.kind = kind;
        request
    }

    fn names(kind: WorkloadKind, answer: &Answer) -> Vec<String> {
        told(&of(kind), answer).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_answer_tells_of_the_workload_or_of_its_namesakes() {
        let stateful =
            |error: &str| names(WorkloadKind::StatefulSet, &Err(Failure::new(ExitCode::NotFound, error)));
        assert_eq!(names(WorkloadKind::Deployment, &Ok(Vec::new())), ["deployment/web"]);
        let absent = "there is no statefulset/web in namespace shop";
        assert_eq!(stateful(&format!("{absent}, but deployment/web")), ["deployment/web"]);
        assert_eq!(
            stateful(&format!("{absent}, but deployment/web and pod/web")),
            ["deployment/web", "pod/web"]
        );
        for rest in
            ["; did you mean deployment/wab?", "; there are deployment/a, pod/b", ", nor any other workload"]
        {
            assert!(stateful(&format!("{absent}{rest}")).is_empty(), "{rest}");
        }
    }

    #[test]
    fn what_is_wrong_with_one_workload_shows_that_it_is_there() {
        let deployment =
            |error: &str| names(WorkloadKind::Deployment, &Err(Failure::new(ExitCode::NotFound, error)));
        assert_eq!(deployment("deployment/web: it has no port x, but http"), ["deployment/web"]);
        assert!(deployment("there is no session laptop for the traffic to go to").is_empty());
        assert!(deployment("namespaces \"shop\" not found").is_empty());
    }

    #[test]
    fn several_of_one_name_are_all_named() {
        let known = [WorkloadKind::StatefulSet, WorkloadKind::Deployment].map(|kind| of(kind).workload);
        let failure = ambiguous(&of(WorkloadKind::Deployment), &known.into());
        assert_eq!(failure.code, ExitCode::Usage);
        assert_eq!(failure.causes, ["there are deployment/web and statefulset/web"]);
        assert!(failure.help.unwrap().contains("--kind"));
    }
}
