//! Which snapshots of an image are meant.

use std::os::unix::ffi::OsStrExt;

use qcow2_snapshot::{printable, Image, OpenFlags, Snapshot};

use crate::cli::Request;
use crate::stop::{explained, Stop};
use crate::target::{not_opened, Opened, Target};

/// How an operand says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// By its ID, else its name, else as a pattern.
    Any,
    Id,
    Name,
}

/// What the options say.
pub(crate) struct Choice<'a> {
    /// None: all.
    pub(crate) operands: Vec<&'a [u8]>,
    pub(crate) by: By,
    pub(crate) keep_last: usize,
    /// Dates before this one.
    pub(crate) before: Option<u64>,
}

impl Choice<'_> {
    /// The places in the list, in its order.
    pub(crate) fn of(&self, list: &[Snapshot]) -> Result<Vec<usize>, Stop> {
        let mut places = Vec::new();
        for operand in &self.operands {
            let found = self.matching(list, operand);
            if found.is_empty() {
                let text = format!("No snapshot is '{}'", printable(operand));
                return Err(Stop::failed(text));
            }
            places.extend(found);
        }
        if self.operands.is_empty() {
            places.extend(0..list.len());
        }
        places.sort_unstable();
        places.dedup();
        let date = |i: &usize| list.get(*i).map_or((0, 0), |s| (s.date_sec, s.date_nsec));
        // Of the same moment the one further behind is newer.
        let mut by_age = places.clone();
        by_age.sort_by_key(|i| (date(i), *i));
        by_age.truncate(by_age.len().saturating_sub(self.keep_last));
        by_age.sort_unstable();
        let old = |i: &usize| self.before.is_none_or(|b| u64::from(date(i).0) < b);
        places.retain(|i| by_age.binary_search(i).is_ok() && old(i));
        Ok(places)
    }

    fn matching(&self, list: &[Snapshot], operand: &[u8]) -> Vec<usize> {
        let all = |is: &dyn Fn(&Snapshot) -> bool| -> Vec<usize> {
            let numbered = list.iter().enumerate();
            numbered.filter(|(_, s)| is(s)).map(|(i, _)| i).collect()
        };
        let pattern = operand.iter().any(|b| matches!(b, b'*' | b'?'));
        match self.by {
            By::Id => all(&|s| s.id == operand),
            By::Name => all(&|s| s.name == operand || pattern && fits(operand, &s.name)),
            By::Any => match find(list, operand) {
                Some(one) => vec![one],
                None if pattern => all(&|s| fits(operand, &s.name)),
                None => Vec::new(),
            },
        }
    }
}

/// By its ID, else the first with this name.
pub(crate) fn find(list: &[Snapshot], wanted: &[u8]) -> Option<usize> {
    let by_id = list.iter().position(|s| s.id == wanted);
    by_id.or_else(|| list.iter().position(|s| s.name == wanted))
}

/// Does a name fit a pattern, in which `*` stands for anything and `?` for one byte?
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    // Where to go on when the last `*` has to take one byte more.
    let (mut p, mut n, mut retry) = (0, 0, None);
    while let Some(byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || c == byte => (p, n) = (p + 1, n + 1),
            _ => match retry {
                Some((star, at)) => {
                    retry = Some((star, at + 1));
                    (p, n) = (star + 1, at + 1);
                }
                None => return false,
            },
        }
    }
    let rest = pattern.get(p..).unwrap_or_default();
    rest.iter().all(|b| *b == b'*')
}

/// Seconds in an age like "30d".
pub(crate) fn age(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err("an age is a number and s, m, h, d or w: 12h, 30d".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "no number".to_owned())?;
    Ok(number.saturating_mul(unit))
}

/// Open the image of a subcommand.
pub(crate) fn open(request: &Request, flags: OpenFlags) -> Result<Image, Stop> {
    match Target::of(request)?.open(request.file, flags)? {
        Opened::Image(image) => Ok(*image),
        Opened::Other { .. } => {
            let line = not_opened(request.file, "Image is not in qcow2 format");
            Err(Stop::Failed(vec![line]))
        }
    }
}

/// The snapshots of an image.
pub(crate) fn list(image: &mut Image) -> Result<Vec<Snapshot>, Stop> {
    image
        .snapshot_list()
        .map(<[Snapshot]>::to_vec)
        .map_err(|e| {
            let sentence = e.to_string();
            let line = format!("Could not list the snapshots: {sentence}");
            Stop::Failed(explained(&e, &sentence, line.into()))
        })
}

/// The operands that choose snapshots.
pub(crate) fn operands(m: &clap::ArgMatches) -> Vec<&[u8]> {
    let given = m.get_many::<std::ffi::OsString>("SNAPSHOT");
    given.into_iter().flatten().map(|o| o.as_bytes()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, name, wanted) in [
            ("auto-*", "auto-1", true),
            ("auto-*", "auto-", true),
            ("auto-*", "my auto-1", false),
            ("*-?", "a-b-c", true),
            ("*-?", "a-bc", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("**", "", true),
            ("?", "", false),
            ("a", "ab", false),
        ] {
            assert_eq!(
                fits(pattern.as_bytes(), name.as_bytes()),
                wanted,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn ages_have_units() {
        assert_eq!((age("30d"), age("2w")), (Ok(2_592_000), Ok(1_209_600)));
        assert!(["30", "d", "-1d", "1y", ""].iter().all(|t| age(t).is_err()));
        assert_eq!(age("99999999999999999w"), Ok(u64::MAX));
    }
}
