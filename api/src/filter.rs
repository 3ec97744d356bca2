//! Which requests an intercept takes: filters as they are written, and as they are matched.
//!
//! Everything that a filter names must match (AND). Header names compare without regard to case (RFC 9110, 5.1), all else with it.

use regex::bytes::{Regex, RegexBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most conditions of one kind in a filter. Each is looked at for every request.
pub const MAX_CONDITIONS: usize = 16;

/// Longest pattern, bytes.
pub const MAX_PATTERN: usize = 1024;

/// Largest compiled regular expression, bytes, and the most that matching it may keep beside: an agent's memory is budgeted.
const MAX_COMPILED: usize = 256 << 10;

/// Conditions on a request. None at all matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Filter {
    /// Every one of these headers must match.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub headers: Vec<HeaderCondition>,

    /// One of these must match the path, without its query: `/api/v2/users` alone, or `/api/v2/*` with everything below
    /// it. `*` stands for any characters, slashes included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 1024)))]
    pub paths: Vec<String>,

    /// One of these must be the method.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(regex(pattern = r"^[A-Za-z][A-Za-z-]{0,31}$")))]
    pub methods: Vec<String>,

    /// One of these must be the gRPC service, or service and method.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub grpc: Vec<GrpcCondition>,
}

/// A condition on one header. It holds if any value of that header matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderCondition {
    /// Name of the header.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// What its value is compared with.
    #[schemars(length(max = 1024))]
    pub value: String,
    /// How.
    #[serde(default)]
    pub r#match: Match,
}

/// How a value is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Match {
    /// Byte for byte.
    #[default]
    Exact,
    /// It begins with it.
    Prefix,
    /// A regular expression (syntax of the `regex` crate) matches somewhere; `^` and `$` anchor it.
    Regex,
}

/// A gRPC service, and possibly one method of it: the path is `/SERVICE/METHOD`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrpcCondition {
    /// Full name of the service, such as `shop.v1.Cart`.
    #[schemars(length(min = 1, max = 512))]
    pub service: String,
    /// Name of the method; all of them if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub method: Option<String>,
}

/// What is wrong with a filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// A regular expression does not parse, or is too large.
    #[error("header `{header}`: `{pattern}` is no usable regular expression: {why}")]
    Regex {
        /// Header of the condition.
        header: String,
        /// The expression.
        pattern: String,
        /// What the parser says.
        why: String,
    },
    /// A header's name has characters that no header name has (RFC 9110, 5.6.2).
    #[error("`{0}` cannot be the name of a header")]
    HeaderName(String),
    /// A path does not begin with a slash.
    #[error("path `{0}` must begin with / or *")]
    Path(String),
    /// A method has characters that no method has.
    #[error("`{0}` cannot be a method")]
    Method(String),
    /// There are more conditions than are looked at, or one is too long.
    #[error("a filter has at most {MAX_CONDITIONS} conditions of each kind, of {MAX_PATTERN} bytes each")]
    TooLarge,
}

impl Filter {
    /// Whether it matches everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.paths.is_empty() && self.methods.is_empty() && self.grpc.is_empty()
    }

    /// Prepares it for matching.
    ///
    /// # Errors
    /// Fails where a condition makes no sense.
    pub fn compile(&self) -> Result<Matcher, FilterError> {
        let lists = [self.headers.len(), self.paths.len(), self.methods.len(), self.grpc.len()];
        let texts = (self.headers.iter().flat_map(|one| [&one.name, &one.value])).chain(&self.paths);
        if lists.into_iter().max() > Some(MAX_CONDITIONS)
            || texts.into_iter().any(|text| text.len() > MAX_PATTERN)
        {
            return Err(FilterError::TooLarge);
        }
        if let Some(path) = self.paths.iter().find(|path| !path.starts_with(['/', '*'])) {
            return Err(FilterError::Path(path.clone()));
        }
        if let Some(method) = self.methods.iter().find(|method| !is_token(method)) {
            return Err(FilterError::Method(method.clone()));
        }
        Ok(Matcher {
            headers: self.headers.iter().map(HeaderMatcher::new).collect::<Result<_, _>>()?,
            paths: self.paths.iter().map(|path| path.clone().into_bytes()).collect(),
            methods: self.methods.iter().map(|method| method.to_ascii_uppercase().into_bytes()).collect(),
            grpc: self.grpc.clone(),
        })
    }

    /// Whether some request could match both filters, as far as can be told by exact conditions: `false` only if none can.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let exact = |filter: &Self| -> Vec<(String, String)> {
            let exact = filter.headers.iter().filter(|one| one.r#match == Match::Exact);
            exact.map(|one| (one.name.to_ascii_lowercase(), one.value.clone())).collect()
        };
        let theirs = exact(other);
        let contradiction =
            exact(self).iter().any(|(name, value)| theirs.iter().any(|(n, v)| n == name && v != value));
        !contradiction
            && meet(&self.methods, &other.methods, |a, b| a.eq_ignore_ascii_case(b))
            && meet(&self.paths, &other.paths, |a, b| paths_meet(a, b))
            && meet(&self.grpc, &other.grpc, GrpcCondition::meets)
    }
}

/// Whether two lists of alternatives have one in common; no list means any.
fn meet<T>(ours: &[T], theirs: &[T], same: impl Fn(&T, &T) -> bool) -> bool {
    ours.is_empty() || theirs.is_empty() || ours.iter().any(|a| theirs.iter().any(|b| same(a, b)))
}

/// Whether one path can match both patterns, judged by what comes before their first `*`.
fn paths_meet(a: &str, b: &str) -> bool {
    match (a.split_once('*'), b.split_once('*')) {
        (None, None) => a == b,
        (Some(_), None) => wildcard(a.as_bytes(), b.as_bytes()),
        (None, Some(_)) => wildcard(b.as_bytes(), a.as_bytes()),
        (Some((a, _)), Some((b, _))) => a.starts_with(b) || b.starts_with(a),
    }
}

/// A filter, ready to match.
#[derive(Clone, Debug)]
pub struct Matcher {
    headers: Vec<HeaderMatcher>,
    paths: Vec<Vec<u8>>,
    methods: Vec<Vec<u8>>,
    grpc: Vec<GrpcCondition>,
}

#[derive(Clone, Debug)]
struct HeaderMatcher {
    name: String,
    value: ValueMatcher,
}

#[derive(Clone, Debug)]
enum ValueMatcher {
    Exact(Vec<u8>),
    Prefix(Vec<u8>),
    Regex(Regex),
}

impl HeaderMatcher {
    fn new(condition: &HeaderCondition) -> Result<Self, FilterError> {
        if !is_token(&condition.name) {
            return Err(FilterError::HeaderName(condition.name.clone()));
        }
        let value = condition.value.clone();
        let value = match condition.r#match {
            Match::Exact => ValueMatcher::Exact(value.into_bytes()),
            Match::Prefix => ValueMatcher::Prefix(value.into_bytes()),
            Match::Regex => {
                let mut builder = RegexBuilder::new(&value);
                let regex = builder.size_limit(MAX_COMPILED).dfa_size_limit(MAX_COMPILED).build();
                ValueMatcher::Regex(regex.map_err(|error| FilterError::Regex {
                    header: condition.name.clone(),
                    pattern: value,
                    why: error.to_string(),
                })?)
            }
        };
        Ok(Self { name: condition.name.clone(), value })
    }

    fn matches<'a>(&self, headers: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> bool {
        headers
            .into_iter()
            .any(|(name, value)| name.eq_ignore_ascii_case(&self.name) && self.value.matches(value))
    }
}

impl ValueMatcher {
    fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => value == wanted,
            Self::Prefix(wanted) => value.starts_with(wanted),
            Self::Regex(regex) => regex.is_match(value),
        }
    }
}

impl Matcher {
    /// Whether a request matches: its method, its target as it was sent (path and query; an absolute form counts from its
    /// path), and its headers in order.
    #[must_use]
    pub fn matches<'a, H>(&self, method: &[u8], target: &[u8], headers: H) -> bool
    where
        H: IntoIterator<Item = (&'a str, &'a [u8])> + Clone,
    {
        let path = path_of(target);
        (self.methods.is_empty() || self.methods.iter().any(|wanted| method == wanted))
            && (self.paths.is_empty() || self.paths.iter().any(|pattern| wildcard(pattern, path)))
            && (self.grpc.is_empty() || self.grpc.iter().any(|one| one.matches(path)))
            && self.headers.iter().all(|one| one.matches(headers.clone()))
    }
}

impl GrpcCondition {
    /// Whether one call can match both.
    fn meets(&self, other: &Self) -> bool {
        let methods = self.method.as_ref().zip(other.method.as_ref());
        self.service == other.service && methods.is_none_or(|(one, other)| one == other)
    }

    fn matches(&self, path: &[u8]) -> bool {
        let Some(rest) = path.strip_prefix(b"/").and_then(|rest| rest.strip_prefix(self.service.as_bytes()))
        else {
            return false;
        };
        match (rest.strip_prefix(b"/"), &self.method) {
            (Some(method), Some(wanted)) => method == wanted.as_bytes(),
            (Some(method), None) => !method.is_empty(),
            (None, _) => false,
        }
    }
}

/// The path of a request target (RFC 9112, 3.2).
fn path_of(target: &[u8]) -> &[u8] {
    let path = match target.windows(3).position(|three| three == b"://") {
        Some(scheme) if !target.starts_with(b"/") => {
            let authority = &target[scheme + 3..];
            authority
                .iter()
                .position(|byte| matches!(byte, b'/' | b'?'))
                .map_or(&b"/"[..], |at| &authority[at..])
        }
        _ => target,
    };
    let end = path.iter().position(|byte| matches!(byte, b'?' | b'#')).unwrap_or(path.len());
    if end == 0 { b"/" } else { &path[..end] }
}

/// Whether `text` matches a pattern in which `*` stands for any bytes. Takes time in proportion to the product of their
/// lengths at the most.
fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Where the last star stands, and how much of the text it has taken.
    let mut star = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(byte) if *byte == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((place, taken)) = star else { return false };
                star = Some((place, taken + 1));
                at = place + 1;
                seen = taken + 1;
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// Whether a text is a token (RFC 9110, 5.6.2).
fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::{Filter, FilterError, GrpcCondition, HeaderCondition, Match, path_of, wildcard};

    fn header(name: &str, value: &str, r#match: Match) -> HeaderCondition {
        HeaderCondition { name: name.into(), value: value.into(), r#match }
    }

    const HEADERS: [(&str, &[u8]); 3] =
        [("X-Intercept", b"dev"), ("user-agent", b"test-client/2"), ("accept", b"*/*")];

    fn matches(filter: &Filter, method: &str, target: &str) -> bool {
        filter.compile().unwrap().matches(method.as_bytes(), target.as_bytes(), HEADERS)
    }

    #[test]
    fn everything_that_is_named_must_match() {
        let mut filter = Filter {
            headers: vec![
                header("x-intercept", "dev", Match::Exact),
                header("User-Agent", "test-client", Match::Prefix),
                header("accept", r"^\*/", Match::Regex),
            ],
            paths: vec!["/other".into(), "/api/v2/*".into()],
            methods: vec!["get".into()],
            grpc: vec![],
        };
        assert!(matches(&filter, "GET", "/api/v2/users?x=/api/v1"));
        assert!(!matches(&filter, "POST", "/api/v2/users"));
        assert!(!matches(&filter, "GET", "/api/v1/users?/api/v2/"));
        filter.headers[0].value = "Dev".into();
        assert!(!matches(&filter, "GET", "/api/v2/users"));
        filter.headers[0] = header("x-missing", "", Match::Prefix);
        assert!(!matches(&filter, "GET", "/api/v2/users"));
        assert!(matches(&Filter::default(), "BREW", "*"));
    }

    #[test]
    fn wildcards_take_anything() {
        for (pattern, text, expected) in [
            ("/api/v2/*", "/api/v2/", true),
            ("/api/v2/*", "/api/v2/a/b", true),
            ("/api/v2/*", "/api/v2", false),
            ("/api/v2", "/api/v2/", false),
            ("*/health", "/a/b/health", true),
            ("/a/*/c/*", "/a/x/y/c/z", true),
            ("/a/*/c", "/a/x/c/d", false),
            ("*", "", true),
            ("/a**b", "/ab", true),
        ] {
            assert_eq!(wildcard(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn paths_are_found_in_every_form_of_target() {
        for (target, path) in [
            ("/a?b", "/a"),
            ("http://host/a?b", "/a"),
            ("http://host", "/"),
            ("http://host?x", "/"),
            ("/redirect?to=http://x/y", "/redirect"),
            ("*", "*"),
            ("host:443", "host:443"),
        ] {
            assert_eq!(path_of(target.as_bytes()), path.as_bytes(), "{target}");
        }
    }

    #[test]
    fn grpc_is_told_by_its_path() {
        let filter = |method: Option<&str>| Filter {
            grpc: vec![GrpcCondition { service: "shop.v1.Cart".into(), method: method.map(Into::into) }],
            ..Filter::default()
        };
        assert!(matches(&filter(None), "POST", "/shop.v1.Cart/Add"));
        assert!(matches(&filter(Some("Add")), "POST", "/shop.v1.Cart/Add"));
        assert!(!matches(&filter(Some("Add")), "POST", "/shop.v1.Cart/AddAll"));
        assert!(!matches(&filter(None), "POST", "/shop.v1.Cart2/Add"));
        assert!(!matches(&filter(None), "POST", "/shop.v1.Cart"));
    }

    #[test]
    fn nonsense_is_refused() {
        let regex = Filter { headers: vec![header("a", "(", Match::Regex)], ..Filter::default() };
        assert!(matches!(regex.compile(), Err(FilterError::Regex { .. })));
        let huge = Filter { headers: vec![header("a", r"\w{900}{90}", Match::Regex)], ..Filter::default() };
        assert!(matches!(huge.compile(), Err(FilterError::Regex { .. })));
        let name = Filter { headers: vec![header("a b", "", Match::Exact)], ..Filter::default() };
        assert_eq!(name.compile().unwrap_err(), FilterError::HeaderName("a b".into()));
        let path = Filter { paths: vec!["api".into()], ..Filter::default() };
        assert_eq!(path.compile().unwrap_err(), FilterError::Path("api".into()));
        let many = Filter { paths: vec!["/".into(); 17], ..Filter::default() };
        assert_eq!(many.compile().unwrap_err(), FilterError::TooLarge);
    }

    #[test]
    fn filters_that_exclude_each_other_do_not_overlap() {
        let by = |value: &str| Filter {
            headers: vec![header("X-User", value, Match::Exact)],
            ..Filter::default()
        };
        let on = |path: &str| Filter { paths: vec![path.into()], ..Filter::default() };
        assert!(!by("alice").overlaps(&by("bob")));
        assert!(by("alice").overlaps(&by("alice")));
        assert!(by("alice").overlaps(&Filter::default()));
        assert!(by("alice").overlaps(&on("/a")));
        assert!(!on("/a/*").overlaps(&on("/b/*")));
        assert!(on("/a/*").overlaps(&on("/a/b/*")));
        assert!(!on("/a").overlaps(&on("/b")));
        let call = |service: &str, method: Option<&str>| Filter {
            grpc: vec![GrpcCondition { service: service.into(), method: method.map(Into::into) }],
            ..Filter::default()
        };
        assert!(!call("Cart", None).overlaps(&call("Pay", None)));
        assert!(!call("Cart", Some("Add")).overlaps(&call("Cart", Some("Clear"))));
        assert!(call("Cart", Some("Add")).overlaps(&call("Cart", None)));
        assert!(call("Cart", None).overlaps(&on("/Cart/*")));
    }
}
