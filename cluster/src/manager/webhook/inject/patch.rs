//! JSON Patch (RFC 6902), as far as injection needs it.

use serde_json::{Value, json};

/// The operations of one patch, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Patch(Vec<Value>);

impl Patch {
    /// Adds a value, before what stands at that place of a list.
    pub fn add(&mut self, path: impl Into<String>, value: impl Into<Value>) {
        self.0.push(json!({ "op": "add", "path": path.into(), "value": value.into() }));
    }

    /// Replaces a value.
    pub fn replace(&mut self, path: impl Into<String>, value: impl Into<Value>) {
        self.0.push(json!({ "op": "replace", "path": path.into(), "value": value.into() }));
    }

    /// Removes a value.
    pub fn remove(&mut self, path: impl Into<String>) {
        self.0.push(json!({ "op": "remove", "path": path.into() }));
    }

    /// Appends another patch.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// How large it is, bytes of JSON.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.iter().map(|operation| operation.to_string().len()).sum()
    }

    /// The patch as it is sent.
    #[must_use]
    pub fn into_value(self) -> Value {
        self.0.into()
    }
}

/// A key as a part of a path.
#[must_use]
pub fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
