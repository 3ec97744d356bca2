//! Which events are new, and which repeat one that is there: as the events of Kubernetes' own controllers, those are counted.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::{About, Entry};

/// How long after the last of its kind an event is one more of them. Kubernetes' controllers have it so.
const WINDOW: SignedDuration = SignedDuration::from_mins(10);

/// How many events of one kind about one object are told with all they say; the others are summed up. As many as Kubernetes'
/// controllers tell.
const MOST_ALIKE: usize = 10;

/// How often a repetition is written. What comes in between is counted with the next.
const REPEAT: SignedDuration = SignedDuration::from_secs(10);

/// Most objects and kinds that are remembered: two megabytes. An event of what is forgotten is a new one.
const MOST_GROUPS: usize = 1024;

/// What is said in place of all the others.
pub(super) const SUMMED_UP: &str =
    "More of the same: see the events of its pods, and the intercepts of its namespace";

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The event.
    pub entry: Entry,
    /// Name of its object.
    pub name: String,
    /// How often it was said by now. If more than once, the object is there.
    pub count: i32,
    /// When it was said.
    pub at: Timestamp,
}

/// The events of late, by what they are about and their reason.
#[derive(Debug, Default)]
pub struct Series(BTreeMap<(About, &'static str), Group>);

#[derive(Debug)]
struct Group {
    last: Timestamp,
    told: Vec<Told>,
}

#[derive(Debug)]
struct Told {
    hash: u64,
    name: String,
    count: i32,
    written: Timestamp,
}

impl Series {
    /// Takes in an event, and tells what is to be written for it.
    pub fn take(&mut self, mut entry: Entry, at: Timestamp) -> Option<Write> {
        let key = (entry.about.clone(), entry.reason);
        self.make_room(&key, at);
        let group = self.0.entry(key).or_insert_with(|| Group { last: at, told: Vec::new() });
        group.last = at;
        let is_known = group.told.iter().any(|told| told.hash == hash(&entry.note));
        if !is_known && group.told.len() >= MOST_ALIKE {
            (entry.note, entry.related) = (SUMMED_UP.to_owned(), None);
        }
        let hash = hash(&entry.note);
        let Some(told) = group.told.iter_mut().find(|told| told.hash == hash) else {
            let name = name(&entry.about.name, at);
            group.told.push(Told { hash, name: name.clone(), count: 1, written: at });
            return Some(Write { entry, name, count: 1, at });
        };
        told.count = told.count.saturating_add(1);
        if at.duration_since(told.written) < REPEAT {
            return None;
        }
        told.written = at;
        Some(Write { entry, name: told.name.clone(), count: told.count, at })
    }

    fn make_room(&mut self, key: &(About, &'static str), at: Timestamp) {
        self.0.retain(|_, group| at.duration_since(group.last) < WINDOW);
        if self.0.len() >= MOST_GROUPS && !self.0.contains_key(key) {
            let oldest = self.0.iter().min_by_key(|(_, group)| group.last).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
    }
}

fn hash(note: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    note.hash(&mut hasher);
    hasher.finish()
}

/// Name of an event: its object's and a time that no other event of it has, as everybody names them. Names have 253 characters at
/// most, times 17 with the dot.
fn name(object: &str, at: Timestamp) -> String {
    let object = object.get(..230).unwrap_or(object).trim_end_matches(['-', '.']);
    format!("{object}.{:x}", at.as_nanosecond())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::super::super::samples::at;
    use super::super::{About, Entry, Kind};
    use super::{MOST_GROUPS, SUMMED_UP, Series, name};

    fn entry(object: &str, note: &str) -> Entry {
        let about =
            About { kind: Kind::Pod, namespace: "shop".into(), name: object.into(), uid: Some("u".into()) };
        Entry { related: None, about, is_warning: false, reason: "PodReleased", note: note.into() }
    }

    #[test]
    fn what_is_said_again_is_counted_and_not_written_each_time() {
        let mut series = Series::default();
        let mut say = |second, note| series.take(entry("web-1", note), at(second)).map(|write| write.count);
        assert_eq!(say(0, "one"), Some(1));
        assert_eq!([say(1, "one"), say(9, "one")], [None, None]);
        assert_eq!(say(10, "one"), Some(4));
        assert_eq!(say(11, "another"), Some(1));
        assert_eq!(say(11 + 600, "one"), Some(1), "it is long ago");
    }

    #[test]
    fn a_repetition_has_the_name_of_the_first() {
        let mut series = Series::default();
        let first = series.take(entry("web-1", "one"), at(0)).unwrap();
        let second = series.take(entry("web-1", "one"), at(20)).unwrap();
        assert_eq!((second.name, second.count), (first.name, 2));
        let other = series.take(entry("web-2", "one"), at(20)).unwrap();
        assert_eq!(other.count, 1, "it is about something else");
    }

    #[test]
    fn hundreds_of_pods_are_not_told_one_by_one() {
        let mut series = Series::default();
        let pods = (0..300).map(|pod| entry("web", &format!("pod {pod}")));
        let written: Vec<_> =
            pods.zip(0..).filter_map(|(entry, second)| series.take(entry, at(second))).collect();
        let created: Vec<_> = written.iter().filter(|write| write.count == 1).collect();
        assert_eq!(created.len(), 11);
        assert_eq!(created[10].entry.note, SUMMED_UP);
        let last = written.last().unwrap();
        assert_eq!((&last.name, last.entry.note.as_str()), (&created[10].name, SUMMED_UP));
        assert!(last.count > 280, "{last:?}");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut series = Series::default();
        for (pod, millisecond) in (0..2 * MOST_GROUPS).zip(0..) {
            let at = Timestamp::from_millisecond(millisecond).unwrap();
            let write = series.take(entry(&format!("web-{pod}"), "one"), at);
            assert_eq!(write.unwrap().count, 1);
        }
        assert_eq!(series.0.len(), MOST_GROUPS);
    }

    #[test]
    fn names_are_names() {
        let long = name(&"a-".repeat(126), at(i64::from(u32::MAX)));
        assert!(long.len() <= 253 && !long.contains("-."), "{long}");
        assert_eq!(name("web", at(1)), "web.3b9aca00");
    }
}
