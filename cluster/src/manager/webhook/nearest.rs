//! Names that somebody may have meant.

/// Most names that are offered.
const OFFERED: usize = 3;

/// The names that are nearest to one that does not exist, the nearest first.
#[must_use]
pub fn nearest<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let tolerated = ((wanted.chars().count() + 1) / 3).max(1);
    let mut near: Vec<_> = names
        .into_iter()
        .map(|name| {
            let distance =
                if name.starts_with(wanted) || name.ends_with(wanted) { 1 } else { distance(wanted, name) };
            (distance, name)
        })
        .filter(|(distance, _)| *distance <= tolerated)
        .collect();
    near.sort_unstable();
    near.dedup();
    near.into_iter().take(OFFERED).map(|(_, name)| name).collect()
}

/// How many characters have to be put in, taken out, changed, or swapped with their neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<_>, Vec<_>) = (a.chars().collect(), b.chars().collect());
    let mut before = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut least = (last[j] + usize::from(x != y)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                let two_ago: &Vec<usize> = &before;
                least = least.min(two_ago[j - 1] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{distance, nearest};

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "abc", 3), ("web", "web", 0), ("wbe", "web", 1), ("cart", "carts", 1), ("abc", "xyz", 3)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn only_what_is_near_is_offered() {
        let names = ["web", "webhook", "worker", "api", "wep"];
        assert_eq!(nearest("wbe", names), ["web"]);
        assert_eq!(nearest("worked", names), ["worker"]);
        assert_eq!(nearest("web", ["web-frontend", "db"]), ["web-frontend"]);
        assert!(nearest("payments", names).is_empty());
    }
}
