//! Who the API server thinks we are: the owner of our sessions has to be exactly that.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::PostParams;
use kube::{Api, Client};
use tpd_api::exit::ExitCode;

use super::errors::{Call, bounded};
use crate::failure::Failure;

/// Asks the API server for the user's name. Every user may ask that (`system:basic-user`).
pub(crate) async fn whoami(
    client: Client,
    server: &str,
    namespace: &str,
    limit: Duration,
) -> Result<String, Failure> {
    let call = Call { doing: "ask who you are (SelfSubjectReview)", server, namespace };
    let reviews: Api<SelfSubjectReview> = Api::all(client);
    let review =
        bounded(call, limit, reviews.create(&PostParams::default(), &SelfSubjectReview::default())).await?;
    review
        .status
        .and_then(|status| status.user_info)
        .and_then(|user| user.username)
        .filter(|name| !name.is_empty())
        .ok_or_else(|| {
            Failure::new(ExitCode::Unauthenticated, "the API server did not say who you are")
                .help("check it with: kubectl auth whoami")
        })
}
