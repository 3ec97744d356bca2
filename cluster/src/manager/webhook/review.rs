//! `AdmissionReview` (admission.k8s.io/v1), as far as the webhooks read and write it.

use serde::Deserialize;
use serde_json::{Value, json};

use super::inject::Patch;

/// What the API server asks.
#[derive(Debug, Deserialize)]
pub struct Review {
    /// The question.
    pub request: Request,
}

/// A change that somebody asks for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// To be repeated in the answer.
    pub uid: String,
    /// `CREATE`, `UPDATE` or something else.
    #[serde(default)]
    pub operation: String,
    /// Namespace of the object.
    #[serde(default)]
    pub namespace: String,
    /// The object as it will be.
    #[serde(default)]
    pub object: Value,
    /// The object as it was.
    #[serde(default)]
    pub old_object: Value,
    /// Whether nothing is to come of it.
    #[serde(default)]
    pub dry_run: bool,
}

/// Why something is refused. The codes are HTTP's: the API server hands them on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Status code.
    pub code: u16,
    /// What somebody reads: the object, the cause, and what to do.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The code as the API server spells it.
    fn reason(&self) -> &'static str {
        match self.code {
            403 => "Forbidden",
            404 => "NotFound",
            409 => "Conflict",
            422 => "Invalid",
            503 => "ServiceUnavailable",
            _ => "InternalError",
        }
    }
}

/// Admits, with a change to the object if there is one.
#[must_use]
pub fn allow(uid: &str, patch: Option<Patch>) -> Value {
    let mut response = json!({ "uid": uid, "allowed": true });
    if let Some(patch) = patch {
        response["patchType"] = "JSONPatch".into();
        response["patch"] = base64(patch.into_value().to_string().as_bytes());
    }
    answer(response)
}

/// Admits an object as it is, and has something said to whoever made it.
#[must_use]
pub fn allow_and_warn(uid: &str, warnings: &[String]) -> Value {
    let mut response = json!({ "uid": uid, "allowed": true });
    if !warnings.is_empty() {
        response["warnings"] = json!(warnings);
    }
    answer(response)
}

/// Refuses.
#[must_use]
pub fn deny(uid: &str, refusal: &Refusal) -> Value {
    let status = json!({
        "status": "Failure",
        "code": refusal.code,
        "reason": refusal.reason(),
        "message": refusal.message,
    });
    answer(json!({ "uid": uid, "allowed": false, "status": status }))
}

fn answer(response: Value) -> Value {
    json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response })
}

/// Bytes as JSON has them in Kubernetes.
fn base64(bytes: &[u8]) -> Value {
    json!(k8s_openapi::ByteString(bytes.to_vec()))
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::{Refusal, Review, allow, allow_and_warn, deny};
    use crate::manager::webhook::inject::Patch;

    #[test]
    fn an_answer_repeats_the_uid() {
        let review: Review = from_value(json!({
            "kind": "AdmissionReview", "request": { "uid": "7", "operation": "CREATE", "object": {}, "dryRun": true },
        }))
        .unwrap();
        assert!(review.request.dry_run);
        let mut patch = Patch::default();
        patch.add("/a", 1);
        let answer = allow(&review.request.uid, Some(patch));
        assert_eq!(answer["response"]["uid"], "7");
        assert_eq!(answer["response"]["patch"], "W3sib3AiOiJhZGQiLCJwYXRoIjoiL2EiLCJ2YWx1ZSI6MX1d");
        assert_eq!(allow("8", None)["response"], json!({ "uid": "8", "allowed": true }));
    }

    #[test]
    fn warnings_go_with_a_yes() {
        let answer = allow_and_warn("7", &["pods will be replaced".to_owned()]);
        assert_eq!(
            answer["response"],
            json!({ "uid": "7", "allowed": true, "warnings": ["pods will be replaced"] })
        );
        assert_eq!(allow_and_warn("8", &[]), allow("8", None));
    }

    #[test]
    fn a_refusal_carries_its_code() {
        let answer = deny("9", &Refusal::new(409, "taken"));
        let status = &answer["response"]["status"];
        assert_eq!((&status["code"], &status["reason"]), (&json!(409), &json!("Conflict")));
        assert_eq!(answer["response"]["allowed"], false);
    }
}
