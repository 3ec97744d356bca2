//! Which sessions are served, and under which addresses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use k8s_openapi::jiff::Timestamp;
use tpd_api::overlay::DualAddress;
use tpd_api::session::MAX_LANES;
use tpd_netstack::key::PublicKey;

use super::pool::Pool;

/// A ClientSession as far as this decision needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Name of the ClientSession.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its owner.
    pub owner: String,
    /// Host name of the laptop.
    pub host: String,
    /// When it was created.
    pub created: Timestamp,
    /// Its public keys as they were sent.
    pub keys: Vec<String>,
    /// The addresses it has been given already.
    pub address: Option<DualAddress>,
}

/// What the manager answers to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has these addresses.
    Ready(DualAddress),
    /// It is not served.
    Rejected(Rejection),
}

/// Why a session is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// A public key is not one, or is the manager's.
    InvalidKey(String),
    /// There are too many keys, or none.
    KeyCount(usize),
    /// A public key is another session's.
    DuplicateKey {
        /// The key.
        key: PublicKey,
        /// Name of the session that has it.
        other: String,
    },
    /// The owner has as many sessions as one may have.
    TooManySessions {
        /// That many.
        limit: usize,
    },
    /// Every overlay address is taken.
    PoolExhausted {
        /// How many there are.
        capacity: u32,
    },
}

impl Rejection {
    /// One word for the condition's `reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidKey(_) | Self::KeyCount(_) => "InvalidKey",
            Self::DuplicateKey { .. } => "DuplicateKey",
            Self::TooManySessions { .. } => "TooManySessions",
            Self::PoolExhausted { .. } => "PoolExhausted",
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidKey(key) => write!(f, "`{key}` cannot be a laptop's WireGuard public key"),
            Self::KeyCount(count) => write!(f, "{count} public keys; a session brings 1 to {MAX_LANES}"),
            Self::DuplicateKey { key, other } => {
                write!(f, "public key {key} belongs to session {other}; generate another")
            }
            Self::TooManySessions { limit } => {
                write!(
                    f,
                    "the owner has {limit} sessions already; delete one, or wait until an idle one expires"
                )
            }
            Self::PoolExhausted { capacity } => {
                write!(f, "all {capacity} overlay addresses are taken; install with a larger pool")
            }
        }
    }
}

/// What a session must fit.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The overlay's addresses.
    pub pool: Pool,
    /// The manager's own key.
    pub manager: PublicKey,
    /// Most sessions of one owner.
    pub sessions_per_owner: usize,
}

impl Rules {
    /// Decides every session at once, by name. Sessions that have an address go before those that have none, and older
    /// ones before younger, so a newcomer never takes anything from one that is being served.
    #[must_use]
    pub fn settle<'a>(&self, requests: impl IntoIterator<Item = &'a Request>) -> BTreeMap<String, Verdict> {
        let mut requests: Vec<_> = requests.into_iter().collect();
        requests.sort_by_key(|request| (self.held(request).is_none(), request.created, &request.uid));

        let (accepted, mut verdicts) = self.admit(&requests);
        let mut taken = BTreeSet::new();
        let (kept, homeless): (Vec<_>, Vec<_>) = accepted
            .into_iter()
            .partition(|request| self.held(request).is_some_and(|host| taken.insert(host)));
        for request in kept {
            let address = request.address.expect("a host number is held by an address");
            verdicts.insert(request.name.clone(), Verdict::Ready(address));
        }
        for request in homeless {
            verdicts.insert(request.name.clone(), self.assign(request, &mut taken));
        }
        verdicts
    }

    /// Those whose keys and number are in order, and the verdicts on the others.
    fn admit<'a>(&self, requests: &[&'a Request]) -> (Vec<&'a Request>, BTreeMap<String, Verdict>) {
        let mut accepted = Vec::new();
        let mut rejected = BTreeMap::new();
        let mut keys = HashMap::new();
        let mut owners: HashMap<&str, usize> = HashMap::new();
        for &request in requests {
            let count = owners.entry(&request.owner).or_default();
            let verdict = if *count >= self.sessions_per_owner {
                Err(Rejection::TooManySessions { limit: self.sessions_per_owner })
            } else {
                self.keys(request, &keys)
            };
            match verdict {
                Ok(own) => {
                    *count += 1;
                    keys.extend(own.into_iter().map(|key| (key, &*request.name)));
                    accepted.push(request);
                }
                Err(rejection) => {
                    rejected.insert(request.name.clone(), Verdict::Rejected(rejection));
                }
            }
        }
        (accepted, rejected)
    }

    fn keys(
        &self,
        request: &Request,
        others: &HashMap<PublicKey, &str>,
    ) -> Result<Vec<PublicKey>, Rejection> {
        if request.keys.is_empty() || request.keys.len() > MAX_LANES {
            return Err(Rejection::KeyCount(request.keys.len()));
        }
        let mut own = Vec::with_capacity(request.keys.len());
        for text in &request.keys {
            let key = text.parse().map_err(|_| Rejection::InvalidKey(text.clone()))?;
            if key == self.manager {
                return Err(Rejection::InvalidKey(text.clone()));
            }
            let other = others.get(&key).copied().or_else(|| own.contains(&key).then_some(&*request.name));
            if let Some(other) = other {
                return Err(Rejection::DuplicateKey { key, other: other.to_owned() });
            }
            own.push(key);
        }
        Ok(own)
    }

    fn held(&self, request: &Request) -> Option<u32> {
        self.pool.host(request.address?)
    }

    fn assign(&self, request: &Request, taken: &mut BTreeSet<u32>) -> Verdict {
        let identity = format!("{}@{}", request.owner, request.host);
        match self.pool.choose(&identity, taken) {
            Some(host) => {
                taken.insert(host);
                Verdict::Ready(self.pool.address(host))
            }
            None => Verdict::Rejected(Rejection::PoolExhausted { capacity: self.pool.capacity() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use k8s_openapi::jiff::Timestamp;
    use tpd_api::overlay::DualAddress;
    use tpd_netstack::key::PublicKey;

    use super::{Pool, Rejection, Request, Rules, Verdict};

    fn rules() -> Rules {
        let pool = Pool::new("10.9.8.0/24".parse().unwrap(), "fd09::/64".parse().unwrap());
        Rules { pool, manager: PublicKey([255; 32]), sessions_per_owner: 300 }
    }

    /// A session of second `age` with its own key.
    fn request(name: &str, age: u8) -> Request {
        Request {
            name: name.into(),
            uid: format!("uid-{name}"),
            owner: "alice".into(),
            host: "laptop".into(),
            created: Timestamp::from_second(i64::from(age)).unwrap(),
            keys: vec![PublicKey([age; 32]).to_string()],
            address: None,
        }
    }

    fn address(verdicts: &BTreeMap<String, Verdict>, name: &str) -> DualAddress {
        match &verdicts[name] {
            Verdict::Ready(address) => *address,
            Verdict::Rejected(rejection) => panic!("{name}: {rejection}"),
        }
    }

    fn rejection<'a>(verdicts: &'a BTreeMap<String, Verdict>, name: &str) -> &'a Rejection {
        match &verdicts[name] {
            Verdict::Ready(address) => panic!("{name} has {address:?}"),
            Verdict::Rejected(rejection) => rejection,
        }
    }

    #[test]
    fn sessions_of_one_laptop_do_not_collide() {
        let verdicts = rules().settle(&[request("a", 1), request("b", 2), request("c", 3)]);
        let distinct: BTreeSet<_> = ["a", "b", "c"].map(|name| address(&verdicts, name).ipv4).into();
        assert_eq!(distinct.len(), 3);
    }

    #[test]
    fn an_address_once_given_stays() {
        let (rules, mut one) = (rules(), request("one", 9));
        one.address = Some(rules.pool.address(77));
        // An older newcomer that would have chosen the same address finds another.
        let mut requests = vec![one];
        requests.extend((1..5).map(|n| request(&format!("n{n}"), n)));
        let verdicts = rules.settle(&requests);
        assert_eq!(address(&verdicts, "one"), rules.pool.address(77));
    }

    #[test]
    fn a_session_that_comes_back_finds_its_address() {
        let rules = rules();
        let first = address(&rules.settle(&[request("first", 1)]), "first");
        assert_eq!(address(&rules.settle(&[request("second", 9)]), "second"), first);
    }

    #[test]
    fn of_two_with_one_address_the_older_keeps_it() {
        let rules = rules();
        let (mut old, mut young) = (request("old", 1), request("young", 2));
        old.address = Some(rules.pool.address(5));
        young.address = old.address;
        let verdicts = rules.settle(&[young, old]);
        assert_eq!(address(&verdicts, "old"), rules.pool.address(5));
        assert_ne!(address(&verdicts, "young"), rules.pool.address(5));
    }

    #[test]
    fn an_address_of_another_pool_is_replaced() {
        let (rules, mut request) = (rules(), request("a", 1));
        request.address =
            Some(DualAddress { ipv4: "10.0.0.7".parse().unwrap(), ipv6: "fd00::7".parse().unwrap() });
        let verdicts = rules.settle(&[request]);
        assert!(rules.pool.host(address(&verdicts, "a")).is_some());
    }

    #[test]
    fn a_full_pool_rejects_the_youngest_until_one_leaves() {
        let rules = rules();
        let mut requests: Vec<_> = (1..=254).map(|n| request(&format!("s{n}"), n)).collect();
        let verdicts = rules.settle(&requests);
        assert_eq!(rejection(&verdicts, "s254"), &Rejection::PoolExhausted { capacity: 253 });
        assert_eq!(verdicts.values().filter(|verdict| matches!(verdict, Verdict::Ready(_))).count(), 253);
        for request in &mut requests {
            if let Verdict::Ready(address) = verdicts[&request.name] {
                request.address = Some(address);
            }
        }
        let freed = requests.remove(9).address.unwrap();
        assert_eq!(address(&rules.settle(&requests), "s254"), freed);
    }

    #[test]
    fn a_key_belongs_to_whoever_is_served_with_it() {
        let (rules, mut served, mut squatter) = (rules(), request("served", 9), request("squatter", 1));
        served.address = Some(rules.pool.address(5));
        squatter.keys = served.keys.clone();
        let verdicts = rules.settle(&[served, squatter]);
        let key = PublicKey([9; 32]);
        assert_eq!(
            rejection(&verdicts, "squatter"),
            &Rejection::DuplicateKey { key, other: "served".into() }
        );
    }

    #[test]
    fn keys_that_cannot_be_are_rejected() {
        let twice = vec![PublicKey([1; 32]).to_string(); 2];
        let manager = vec![PublicKey([255; 32]).to_string()];
        let many = (0..17).map(|n| PublicKey([n; 32]).to_string()).collect();
        for (keys, reason) in [
            (vec!["nonsense".to_owned()], "InvalidKey"),
            (vec![], "InvalidKey"),
            (many, "InvalidKey"),
            (manager, "InvalidKey"),
            (twice, "DuplicateKey"),
        ] {
            let verdicts = rules().settle(&[Request { keys: keys.clone(), ..request("a", 1) }]);
            assert_eq!(rejection(&verdicts, "a").reason(), reason, "{keys:?}");
        }
    }

    #[test]
    fn an_owner_has_a_limit_of_its_own() {
        let rules = Rules { sessions_per_owner: 2, ..rules() };
        let bob = Request { owner: "bob".into(), ..request("bob", 4) };
        let verdicts = rules.settle(&[request("a", 1), request("b", 2), request("c", 3), bob]);
        assert_eq!(rejection(&verdicts, "c"), &Rejection::TooManySessions { limit: 2 });
        address(&verdicts, "bob");
    }
}
