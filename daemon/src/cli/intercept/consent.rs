//! What is asked before anything is changed. What is said is the manager's.

use tpd_api::exit::ExitCode;
use tpd_api::intercept::{RESTARTED, WorkloadKind};
use tpd_api::local::InterceptRequest;

use crate::failure::Failure;

/// Who is there to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Person {
    /// Somebody at a terminal.
    Present,
    /// Somebody who has said yes to everything beforehand.
    Agreed,
    /// A program.
    Absent,
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may be done at once.
    Go,
    /// It may be done if the person says so.
    Ask {
        /// Whether that allows pods to be replaced, too, where that is felt.
        replace: bool,
    },
    /// It may not be done.
    Refuse(Failure),
}

/// What is previewed: whoever is there can say yes to what is felt, too, and is told of that.
pub(super) fn proposal(request: &InterceptRequest, person: Person) -> InterceptRequest {
    let offered = is_felt(request.workload.kind) && person == Person::Present;
    InterceptRequest { replace_pods: request.replace_pods || offered, ..request.clone() }
}

/// How to go on after these notes on the proposal.
pub(super) fn consider(request: &InterceptRequest, notes: &[String], person: Person) -> Verdict {
    let nobody = || notes.contains(&request.workload.without_agents());
    match person {
        Person::Present if notes.is_empty() => Verdict::Go,
        Person::Present => Verdict::Ask { replace: notes.iter().any(|note| note.contains(RESTARTED)) },
        _ if is_felt(request.workload.kind) && !request.replace_pods && nobody() => {
            Verdict::Refuse(unreplaced(request))
        }
        _ => Verdict::Go,
    }
}

/// Whether pods of this kind are gone before their successors are there.
fn is_felt(kind: WorkloadKind) -> bool {
    kind != WorkloadKind::Deployment
}

fn unreplaced(request: &InterceptRequest) -> Failure {
    let failure = Failure::new(ExitCode::NoAgent, request.workload.without_agents());
    match request.workload.kind {
        WorkloadKind::Pod => failure
            .because("a pod that nothing owns cannot be replaced")
            .help("label its namespace or the pod tpd.dev/inject=enabled, and make it anew"),
        _ => failure
            .because("they get one by being restarted, and their service is interrupted meanwhile")
            .help("allow it with: --replace-pods"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::example;

    const EVERYBODY: [Person; 3] = [Person::Present, Person::Agreed, Person::Absent];

    fn of(kind: WorkloadKind, replace_pods: bool) -> InterceptRequest {
        let mut request = InterceptRequest { replace_pods, ..example("web", &["http"]) };
        request.workload.kind = kind;
        request
    }

    #[test]
    fn whoever_is_there_is_asked_where_there_is_something_to_say() {
        let request = of(WorkloadKind::Deployment, false);
        let notes =
            ["1 pod without an agent (web-0) will be replaced, each once its successor is ready".into()];
        assert_eq!(consider(&request, &notes, Person::Present), Verdict::Ask { replace: false });
        for person in [Person::Agreed, Person::Absent] {
            assert_eq!(consider(&request, &notes, person), Verdict::Go);
        }
        for person in EVERYBODY {
            assert_eq!(consider(&request, &[], person), Verdict::Go);
            assert_eq!(proposal(&request, person), request);
        }
    }

    #[test]
    fn what_is_felt_is_offered_to_whoever_is_there() {
        for kind in [WorkloadKind::StatefulSet, WorkloadKind::DaemonSet, WorkloadKind::ReplicaSet] {
            let request = of(kind, false);
            assert!(proposal(&request, Person::Present).replace_pods);
            assert!(!proposal(&request, Person::Agreed).replace_pods);
            assert!(proposal(&of(kind, true), Person::Absent).replace_pods);
            let restarted =
                ["1 pod without an agent (web-0) will be restarted one by one; each is gone".into()];
            assert_eq!(consider(&request, &restarted, Person::Present), Verdict::Ask { replace: true });
            let takes_all = ["this takes all traffic to port http".into()];
            assert_eq!(
                consider(&request, &takes_all, Person::Present),
                Verdict::Ask { replace: false },
                "there was nothing to agree to"
            );
        }
    }

    #[test]
    fn an_intercept_that_no_pod_would_have_is_not_made() {
        for (kind, help) in [
            (WorkloadKind::StatefulSet, "allow it with: --replace-pods"),
            (WorkloadKind::Pod, "label its namespace or the pod tpd.dev/inject=enabled, and make it anew"),
        ] {
            let request = of(kind, false);
            let only = "1 pod without an agent (web-0) will take no part: only with --replace-pods";
            let notes = [request.workload.without_agents(), only.to_owned()];
            for person in [Person::Agreed, Person::Absent] {
                let Verdict::Refuse(failure) = consider(&request, &notes, person) else { panic!() };
                assert_eq!((failure.code, failure.help.as_deref()), (ExitCode::NoAgent, Some(help)));
                assert_eq!(failure.error, notes[0]);
                assert_eq!(consider(&request, &notes[1..], person), Verdict::Go, "others take part");
                assert_eq!(consider(&of(kind, true), &notes, person), Verdict::Go);
            }
        }
        // Those get agents once they are restarted, if there is an intercept by then.
        let recreated = of(WorkloadKind::Deployment, false);
        let notes = [recreated.workload.without_agents()];
        assert_eq!(consider(&recreated, &notes, Person::Absent), Verdict::Go);
    }
}
