//! Who an agent is: the pod that its token is bound to, as the API server says.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tpd_api::agent::AUDIENCE;

/// For the API server to review a token.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reviews at the same time. After a restart of the manager every agent comes at once, and the API server is shared: at ten
/// milliseconds each, a thousand agents are back within a second.
const REVIEWS: usize = 16;

/// Longest token that is sent on, bytes. Those of the API server are a fifth of it.
const LONGEST: usize = 8 << 10;

/// A pod, as the API server vouches for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod.
    pub uid: String,
}

/// What came of a token.
#[derive(Debug)]
pub enum Verdict {
    /// It is a pod's.
    Pod(Identity),
    /// It is nobody's: forged, expired, for another audience, or bound to no pod that exists.
    Nobody,
}

/// Asks the API server about tokens.
#[derive(Debug)]
pub struct Reviewer {
    api: Api<TokenReview>,
    turns: Semaphore,
}

impl Reviewer {
    /// One that has asked nothing yet.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { api: Api::all(client), turns: Semaphore::new(REVIEWS) }
    }

    /// Whose token it is.
    ///
    /// # Errors
    /// Fails where the API server does not say.
    pub async fn review(&self, token: &str) -> anyhow::Result<Verdict> {
        if token.is_empty() || token.len() > LONGEST {
            return Ok(Verdict::Nobody);
        }
        let audiences = Some(vec![AUDIENCE.to_owned()]);
        let spec = TokenReviewSpec { audiences, token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = timeout(PATIENCE, async {
            let _turn = self.turns.acquire().await.context("no reviews any more")?;
            self.api.create(&PostParams::default(), &review).await.context("review a token")
        });
        let answer = answer.await.map_err(|_| anyhow!("the API server does not answer"))??;
        Ok(judge(answer))
    }
}

/// An answer without our audience comes from an authenticator that does not know audiences: such a token is anybody's.
fn judge(answer: TokenReview) -> Verdict {
    let status = answer.status.unwrap_or_default();
    let ours = status.audiences.iter().flatten().any(|audience| audience == AUDIENCE);
    if status.authenticated != Some(true) || !ours {
        return Verdict::Nobody;
    }
    status.user.and_then(identity).map_or(Verdict::Nobody, Verdict::Pod)
}

/// The pod of a ServiceAccount's bound token. No other kind of user can have these.
fn identity(user: UserInfo) -> Option<Identity> {
    let name = user.username?;
    let (namespace, _) = name.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    let extra = user.extra?;
    Some(Identity {
        namespace: namespace.to_owned(),
        pod: one(&extra, "authentication.kubernetes.io/pod-name")?,
        uid: one(&extra, "authentication.kubernetes.io/pod-uid")?,
    })
}

fn one(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    extra.get(key)?.first().filter(|value| !value.is_empty()).cloned()
}

/// The token of an `Authorization` header (RFC 6750).
#[must_use]
pub fn bearer(header: Option<&str>) -> Option<&str> {
    let (scheme, token) = header?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("Bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::{Identity, Verdict, bearer, judge};

    fn review(status: Value) -> Verdict {
        judge(from_value(json!({ "spec": {}, "status": status })).unwrap())
    }

    fn user() -> Value {
        json!({
            "username": "system:serviceaccount:shop:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": ["web-1"],
                "authentication.kubernetes.io/pod-uid": ["u1"],
            },
        })
    }

    #[test]
    fn a_bound_token_for_us_names_its_pod() {
        let verdict = review(json!({ "authenticated": true, "audiences": ["tpd-manager"], "user": user() }));
        let Verdict::Pod(found) = verdict else { panic!("{verdict:?}") };
        let expected = Identity { namespace: "shop".into(), pod: "web-1".into(), uid: "u1".into() };
        assert_eq!(found, expected);
    }

    #[test]
    fn every_other_token_is_nobodys() {
        let unbound = json!({ "username": "system:serviceaccount:shop:default" });
        let person = json!({ "username": "alice", "extra": user()["extra"] });
        for status in [
            json!({ "authenticated": false, "audiences": ["tpd-manager"], "user": user() }),
            json!({ "audiences": ["tpd-manager"], "user": user() }),
            json!({ "authenticated": true, "user": user() }),
            json!({ "authenticated": true, "audiences": ["https://kubernetes.default.svc"], "user": user() }),
            json!({ "authenticated": true, "audiences": ["tpd-manager"], "user": unbound }),
            json!({ "authenticated": true, "audiences": ["tpd-manager"], "user": person }),
            json!({ "authenticated": true, "audiences": ["tpd-manager"] }),
            json!({}),
        ] {
            assert!(matches!(review(status.clone()), Verdict::Nobody), "{status}");
        }
    }

    #[test]
    fn the_header_is_read_as_the_standard_has_it() {
        assert_eq!(bearer(Some("Bearer t")), Some("t"));
        assert_eq!(bearer(Some("bearer  t ")), Some("t"));
        for other in [None, Some("Basic t"), Some("Bearer"), Some("")] {
            assert_eq!(bearer(other), None, "{other:?}");
        }
    }
}
