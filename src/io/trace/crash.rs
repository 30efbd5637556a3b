//! From a log to the images that a power cut could leave.
//!
//! More than a third of this long file is its tests.

use std::collections::HashSet;
use std::ops::Range;

use super::{Event, SECTOR};
use crate::io::memory::{resize_bytes, write_bytes, zero_bytes};

/// How much of an event reaches the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Apply {
    /// All of it.
    Full,
    /// Nothing.
    Skip,
    /// The sectors that are `true`: the first is the one that holds the first byte of the event.
    /// Sectors beyond the vector are not applied. A truncate has no sectors and is applied.
    Torn(Vec<bool>),
}

/// The image that is left when `subset(i)` of event `i` reached the disk.
///
/// # Panics
/// When an event of the log does not fit into memory.
pub fn image_after(initial: &[u8], events: &[Event], subset: impl Fn(usize) -> Apply) -> Vec<u8> {
    let mut image = initial.to_vec();
    for (i, event) in events.iter().enumerate() {
        apply(&mut image, event, &subset(i));
    }
    image
}

fn apply(image: &mut Vec<u8>, event: &Event, how: &Apply) {
    let whole = |image: &mut Vec<u8>| match event {
        Event::Write { offset, data, .. } => write_bytes(image, *offset, data),
        Event::Truncate { length } => resize_bytes(image, *length),
        Event::Discard { offset, bytes } => {
            zero_bytes(image, *offset, *bytes);
            Ok(())
        }
        Event::Barrier => Ok(()),
    };
    let result = match (how, event) {
        (Apply::Skip, _) => Ok(()),
        (Apply::Torn(sectors), Event::Write { offset, data, .. }) => {
            pieces(*offset, data.len() as u64, sectors).try_for_each(|(at, bytes)| {
                let start = (at - offset) as usize;
                let part = data.get(start..start + bytes as usize);
                write_bytes(image, at, part.unwrap_or_default())
            })
        }
        (Apply::Torn(sectors), Event::Discard { offset, bytes }) => {
            pieces(*offset, *bytes, sectors).for_each(|(at, n)| zero_bytes(image, at, n));
            Ok(())
        }
        (Apply::Full | Apply::Torn(_), _) => whole(image),
    };
    if let Err(e) = result {
        panic!("{event}: {e}");
    }
}

/// The parts (offset, length) of a range that lie in the chosen sectors.
fn pieces(offset: u64, bytes: u64, sectors: &[bool]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let end = offset.saturating_add(bytes);
    let first = offset / SECTOR;
    (first..).zip(sectors).filter_map(move |(sector, &lands)| {
        let from = offset.max(sector.saturating_mul(SECTOR));
        let to = end.min((sector + 1).saturating_mul(SECTOR));
        (lands && from < to).then_some((from, to.saturating_sub(from)))
    })
}

/// An image that a power cut could leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashImage {
    /// Where the cut was, for the message of a failing test.
    pub what: String,
    /// All events below this index are on the disk in full.
    pub stable: usize,
    /// Nothing of the events from this index on is.
    pub issued: usize,
    /// The image.
    pub bytes: Vec<u8>,
}

/// The events between barriers, without the barriers. Empty groups are left out, but for the
/// one that follows a barrier at the end of the log, where everything is stable.
pub fn groups(events: &[Event]) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let mut start = 0;
    for (i, event) in events.iter().enumerate() {
        if *event == Event::Barrier {
            if start < i {
                groups.push(start..i);
            }
            start = i + 1;
        }
    }
    groups.push(start..events.len());
    groups
}

/// The images after the first 0, 1, 2 ... events in full: a disk that keeps the order of all
/// writes.
///
/// # Panics
/// As [`image_after`].
pub fn prefixes<'a>(initial: &[u8], events: &'a [Event]) -> impl Iterator<Item = CrashImage> + 'a {
    let mut image = initial.to_vec();
    let mut stable = 0;
    let first = CrashImage {
        what: format!("nothing of {} events", events.len()),
        stable: 0,
        issued: 0,
        bytes: image.clone(),
    };
    let rest = events.iter().enumerate().map(move |(i, event)| {
        if *event == Event::Barrier {
            stable = i + 1;
        }
        apply(&mut image, event, &Apply::Full);
        CrashImage {
            what: format!("events 0..={i} of {}, the last a {event}", events.len()),
            stable,
            issued: i + 1,
            bytes: image.clone(),
        }
    });
    std::iter::once(first).chain(rest)
}

/// How many cuts [`crash_images`] makes of each group of events between two barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashPlan {
    /// Groups of at most this many events are cut in every possible way (`2^n` subsets).
    pub exhaustive: usize,
    /// In larger groups: at this many events, evenly spread over the group, cut before it, leave
    /// out only it, and apply only it.
    pub singles: usize,
    /// Random subsets; every other one tears the writes in it, too.
    pub random: usize,
    /// For the random subsets.
    pub seed: u64,
    /// For each write of several sectors: at this many sectors, evenly spread over the write,
    /// tear it into a prefix, a suffix, and all but that sector.
    pub torn: usize,
}

impl Default for CrashPlan {
    /// Every single event, a moderate number of the rest.
    fn default() -> CrashPlan {
        CrashPlan {
            exhaustive: 4,
            singles: usize::MAX,
            random: 16,
            seed: 1,
            torn: 16,
        }
    }
}

/// What happens to the events of a group around the one that is torn.
#[derive(Clone, Copy, Debug)]
enum Others {
    All,
    Earlier,
    None,
}

/// One way to cut a group. Indices count from the beginning of the group.
#[derive(Clone, Debug)]
enum Cut {
    Prefix(usize),
    Missing(usize),
    Alone(usize),
    Subset(Vec<bool>),
    RandomTorn(u64),
    Torn {
        event: usize,
        sectors: Vec<bool>,
        how: String,
        others: Others,
    },
}

impl Cut {
    fn apply(&self, i: usize, event: &Event) -> Apply {
        let lands = match self {
            Cut::Prefix(n) => i < *n,
            Cut::Missing(n) => i != *n,
            Cut::Alone(n) => i == *n,
            Cut::Subset(lands) => lands.get(i).copied().unwrap_or(false),
            Cut::RandomTorn(seed) => {
                let mut rng = SplitMix64::new(*seed);
                let mut rng = SplitMix64::new(rng.next_u64().wrapping_add(i as u64));
                return match (rng.below(4), event.sectors()) {
                    (0, _) => Apply::Skip,
                    (2.., n @ 2..) => Apply::Torn(random_subset(rng.next_u64(), n)),
                    _ => Apply::Full,
                };
            }
            Cut::Torn {
                event,
                sectors,
                others,
                ..
            } => match others {
                _ if i == *event => return Apply::Torn(sectors.clone()),
                Others::All => true,
                Others::Earlier => i < *event,
                Others::None => false,
            },
        };
        if lands {
            Apply::Full
        } else {
            Apply::Skip
        }
    }

    /// In words; `start` is the index in the log of the group's first event.
    fn describe(&self, group: &[Event], start: usize) -> String {
        let name = |i: usize| match group.get(i) {
            Some(event) => format!("event {} ({event})", start + i),
            None => format!("event {}", start + i),
        };
        match self {
            Cut::Prefix(0) => "none of them".into(),
            Cut::Prefix(n) if *n == group.len() => "all of them".into(),
            Cut::Prefix(n) => format!("those before {}", name(*n)),
            Cut::Missing(n) => format!("all but {}", name(*n)),
            Cut::Alone(n) => format!("only {}", name(*n)),
            Cut::Subset(lands) => {
                let lands: Vec<String> = (start..)
                    .zip(lands)
                    .filter(|(_, lands)| **lands)
                    .map(|(i, _)| i.to_string())
                    .collect();
                format!("only events {}", lands.join(" "))
            }
            Cut::RandomTorn(seed) => format!("a random part of each, seed {seed:#x}"),
            Cut::Torn {
                event, how, others, ..
            } => {
                let others = match others {
                    Others::All => "all others in full",
                    Others::Earlier => "earlier ones in full",
                    Others::None => "nothing else",
                };
                format!("{how} of {}, {others}", name(*event))
            }
        }
    }
}

/// At most `max` of the numbers in `0..n`, evenly spread, with the first and the last.
fn spread(n: usize, max: usize) -> Vec<usize> {
    if n <= max {
        return (0..n).collect();
    }
    match max {
        0 => Vec::new(),
        1 => vec![0],
        _ => (0..max).map(|i| i * (n - 1) / (max - 1)).collect(),
    }
}

fn cuts(group: &[Event], plan: &CrashPlan, start: usize) -> Vec<Cut> {
    let n = group.len();
    let mut cuts = vec![Cut::Prefix(0)];
    let at = spread(n, plan.singles);
    cuts.extend(at.iter().filter(|&&i| i > 0).map(|&i| Cut::Prefix(i)));
    if n > 0 {
        cuts.push(Cut::Prefix(n));
    }
    cuts.extend(at.iter().map(|&i| Cut::Missing(i)));
    cuts.extend(at.iter().map(|&i| Cut::Alone(i)));
    if n <= plan.exhaustive.min(20) {
        cuts.extend(
            (0..1u32 << n).map(|set| Cut::Subset((0..n).map(|i| set >> i & 1 == 1).collect())),
        );
    }
    // Each group has random cuts of its own, which do not depend on the groups before it.
    let mut rng = SplitMix64::new(plan.seed ^ (start as u64) << 32);
    for i in 0..plan.random {
        let seed = rng.next_u64();
        cuts.push(if i % 2 == 0 {
            Cut::Subset(random_subset(seed, n))
        } else {
            Cut::RandomTorn(seed)
        });
    }
    for (event, sectors) in group.iter().map(Event::sectors).enumerate() {
        for (how, sectors) in tears(sectors, plan.torn) {
            for others in [Others::All, Others::Earlier, Others::None] {
                cuts.push(Cut::Torn {
                    event,
                    sectors: sectors.clone(),
                    how: how.clone(),
                    others,
                });
            }
        }
    }
    cuts
}

/// The ways to tear an event of `n` sectors.
fn tears(n: usize, max: usize) -> Vec<(String, Vec<bool>)> {
    let mut tears = Vec::new();
    // Before each sector but the first.
    for at in spread(n.saturating_sub(1), max) {
        let at = at + 1;
        tears.push((
            format!("the first {at} of {n} sectors"),
            (0..n).map(|i| i < at).collect(),
        ));
        let left = n - at;
        tears.push((
            format!("the last {left} of {n} sectors"),
            (0..n).map(|i| i >= at).collect(),
        ));
    }
    // Without the first or the last sector it is one of the above.
    for at in spread(n.saturating_sub(2), max) {
        let at = at + 1;
        let how = format!("all but sector {at} of {n} sectors");
        tears.push((how, (0..n).map(|i| i != at).collect()));
    }
    tears
}

/// The images that a power cut could leave anywhere in this log.
///
/// For each group of events between two barriers: all earlier groups in full and, of this one,
/// what `plan` says. No image comes twice for the same group. They are made one at a time.
///
/// # Panics
/// As [`image_after`].
pub fn crash_images<'a>(
    initial: &[u8],
    events: &'a [Event],
    plan: &CrashPlan,
) -> impl Iterator<Item = CrashImage> + 'a {
    let plan = *plan;
    let mut base = initial.to_vec();
    let mut applied = 0;
    groups(events).into_iter().flat_map(move |range| {
        for event in events.iter().take(range.start).skip(applied) {
            apply(&mut base, event, &Apply::Full);
        }
        applied = range.start;
        let base = base.clone();
        let group = events.get(range.clone()).unwrap_or_default();
        let mut seen = HashSet::new();
        let cuts = cuts(group, &plan, range.start);
        cuts.into_iter().filter_map(move |cut| {
            let bytes = image_after(&base, group, |i| match group.get(i) {
                Some(event) => cut.apply(i, event),
                None => Apply::Skip,
            });
            seen.insert(digest(&bytes, 0)).then(|| CrashImage {
                what: format!(
                    "cut in events {}..{} of {}: {}",
                    range.start,
                    range.end,
                    events.len(),
                    cut.describe(group, range.start)
                ),
                stable: range.start,
                issued: range.end,
                bytes,
            })
        })
    })
}

/// 64 bits that differ when the data differ (not against an adversary): four words at a time, for judging
/// hundreds of thousands of images is mostly this.
#[must_use]
pub fn digest(data: &[u8], seed: u64) -> u64 {
    let mix = |h: u64, w: u64| (h ^ w).wrapping_mul(0x2127_599b_f432_5c37).rotate_left(29);
    let word = |b: &[u8]| b.iter().fold(0, |w, b| w << 8 | u64::from(*b));
    let start = seed ^ 0x9e37_79b9_7f4a_7c15 ^ data.len() as u64;
    let mut lanes = [start, start ^ 1, start ^ 2, start ^ 3];
    let blocks = data.chunks_exact(32);
    let rest = blocks.remainder();
    for block in blocks {
        for (lane, b) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            *lane = mix(*lane, b.try_into().map_or(0, u64::from_ne_bytes));
        }
    }
    let all = rest.chunks(7).fold(start, |h, b| mix(h, word(b) + 1));
    let all = lanes.iter().fold(all, |h, lane| mix(h, *lane));
    let all = (all ^ (all >> 32)).wrapping_mul(0x94d0_49bb_1331_11eb);
    all ^ (all >> 29)
}

/// `n` random bits.
pub fn random_subset(seed: u64, n: usize) -> Vec<bool> {
    let mut rng = SplitMix64::new(seed);
    (0..n).map(|_| rng.below(2) == 1).collect()
}

/// A small random generator (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators"), so that a seed means the same cuts for ever.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Start from a seed; any is as good as any other.
    pub fn new(seed: u64) -> SplitMix64 {
        SplitMix64(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 for an `n` of 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // The high half of a 128-bit product: no division, and no bias worth the name.
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, data: &[u8]) -> Event {
        Event::Write {
            label: "data",
            offset,
            data: data.to_vec(),
        }
    }

    #[test]
    fn tearing_follows_absolute_sectors() {
        let events = [write(500, &[1; 600])];
        let image =
            |sectors: &[bool]| image_after(&[0; 2048], &events, |_| Apply::Torn(sectors.to_vec()));
        let ones =
            |image: &[u8]| -> Vec<usize> { (0..image.len()).filter(|&i| image[i] == 1).collect() };
        assert_eq!(events[0].sectors(), 3);
        assert_eq!(
            ones(&image(&[true, false, false])),
            (500..512).collect::<Vec<_>>()
        );
        assert_eq!(
            ones(&image(&[false, true])),
            (512..1024).collect::<Vec<_>>()
        );
        assert_eq!(
            ones(&image(&[false, false, true, true])),
            (1024..1100).collect::<Vec<_>>()
        );
        assert_eq!(ones(&image(&[])), Vec::<usize>::new());
        assert_eq!(
            image(&[true; 3]),
            image_after(&[0; 2048], &events, |_| Apply::Full)
        );
    }

    #[test]
    fn a_torn_discard_zeroes_only_its_sectors() {
        let events = [Event::Discard {
            offset: 512,
            bytes: 1024,
        }];
        let image = image_after(&[1; 2048], &events, |_| Apply::Torn(vec![false, true]));
        assert_eq!(image, [[1; 512], [1; 512], [0; 512], [1; 512]].concat());
    }

    #[test]
    fn a_torn_write_past_the_end_extends_to_its_last_sector() {
        let events = [write(0, &[1; 1536])];
        let image = image_after(&[], &events, |_| Apply::Torn(vec![false, true, false]));
        assert_eq!(image, [[0; 512], [1; 512]].concat());
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn groups_are_what_barriers_leave() {
        let w = || write(0, &[1]);
        let b = || Event::Barrier;
        assert_eq!(groups(&[]), [0..0]);
        assert_eq!(groups(&[w()]), [0..1]);
        assert_eq!(groups(&[w(), b()]), [0..1, 2..2]);
        assert_eq!(groups(&[b(), b(), w(), w(), b(), b(), w()]), [2..4, 6..7]);
    }

    #[test]
    fn prefixes_come_in_order_with_what_is_stable() {
        let events = [write(0, &[1]), Event::Barrier, write(1, &[2])];
        let got: Vec<_> = prefixes(&[0, 0], &events)
            .map(|c| (c.stable, c.issued, c.bytes))
            .collect();
        assert_eq!(
            got,
            [
                (0, 0, vec![0, 0]),
                (0, 1, vec![1, 0]),
                (2, 2, vec![1, 0]),
                (2, 3, vec![1, 2]),
            ]
        );
    }

    /// Three groups; event `i` writes `i + 1` into byte `i` of every sector that it covers.
    fn log() -> Vec<Event> {
        let marks = |i: usize, sectors: u64| -> Vec<Event> {
            // As separate writes they could not be torn, so: one write of whole sectors.
            let mut data = vec![0; sectors as usize * 512];
            for sector in data.chunks_mut(512) {
                sector[i] = i as u8 + 1;
            }
            vec![write(i as u64 * 4096, &data)]
        };
        let mut events = Vec::new();
        for (i, sectors) in [(0, 1), (1, 2), (3, 4), (4, 1), (5, 8), (7, 1)] {
            while events.len() < i {
                events.push(Event::Barrier);
            }
            events.extend(marks(i, sectors));
        }
        events
    }

    #[test]
    fn no_crash_image_breaks_a_barrier_and_none_comes_twice() {
        let events = log();
        let plan = CrashPlan::default();
        let images: Vec<_> = crash_images(&[0; 40960], &events, &plan).collect();
        let mut seen = HashSet::new();
        for image in &images {
            assert!(
                seen.insert((image.stable, image.bytes.clone())),
                "{}",
                image.what
            );
            for (i, event) in events.iter().enumerate() {
                let Event::Write { offset, data, .. } = event else {
                    continue;
                };
                let at = *offset as usize;
                let there = &image.bytes[at..at + data.len()];
                if i < image.stable {
                    assert_eq!(there, data, "{}", image.what);
                }
                if i >= image.issued {
                    assert!(there.iter().all(|&b| b == 0), "{}", image.what);
                }
            }
        }
        let stable: HashSet<usize> = images.iter().map(|i| i.stable).collect();
        assert_eq!(stable, [0, 3, 7].into());
    }

    #[test]
    fn small_groups_are_cut_in_every_way_and_large_ones_at_every_event() {
        let bits = |image: &CrashImage| -> u32 {
            (0..8)
                .filter(|&i| image.bytes[i * 512] == 1)
                .map(|i| 1 << i)
                .sum()
        };
        let group =
            |n: usize| -> Vec<Event> { (0..n).map(|i| write(i as u64 * 512, &[1])).collect() };
        let sets = |n: usize, plan: &CrashPlan| -> HashSet<u32> {
            crash_images(&[0; 4096], &group(n), plan)
                .map(|i| bits(&i))
                .collect()
        };
        let plan = CrashPlan {
            random: 0,
            ..CrashPlan::default()
        };
        assert_eq!(sets(4, &plan), (0..16).collect());
        // 0..=7 prefixes (with all), all but one, only one; some of them are the same.
        let mut expected: HashSet<u32> = (0..=7).map(|n| (1 << n) - 1).collect();
        expected.extend((0..7).flat_map(|i| [127 ^ (1 << i), 1 << i]));
        assert_eq!(sets(7, &plan), expected);
        let random = CrashPlan {
            random: 400,
            ..plan
        };
        assert!(sets(7, &random).len() > 100);
    }

    #[test]
    fn writes_of_several_sectors_are_torn_everywhere_within_the_bound() {
        let events = [write(0, &[1; 8 * 512]), write(8192, &[1])];
        let sets = |torn: usize| -> HashSet<Vec<bool>> {
            let plan = CrashPlan {
                torn,
                random: 0,
                ..CrashPlan::default()
            };
            crash_images(&[0; 16384], &events, &plan)
                .map(|image| (0..8).map(|i| image.bytes[i * 512] == 1).collect())
                .collect()
        };
        // none, all, 7 prefixes, 7 suffixes, 6 with an inner sector missing
        assert_eq!(sets(16).len(), 22);
        assert_eq!(sets(0).len(), 2);
        assert_eq!(sets(2).len(), 2 + 2 + 2 + 2);
    }

    #[test]
    fn the_same_seed_makes_the_same_images() {
        let events = log();
        let images = |seed| -> Vec<CrashImage> {
            let plan = CrashPlan {
                seed,
                ..CrashPlan::default()
            };
            crash_images(&[0; 40960], &events, &plan).collect()
        };
        assert_eq!(images(7), images(7));
        assert_ne!(images(7), images(8));
    }

    #[test]
    fn descriptions_name_the_cut() {
        let events = [write(0, &[1; 1024]), write(2048, &[1]), Event::Barrier];
        let plan = CrashPlan {
            random: 0,
            exhaustive: 0,
            ..CrashPlan::default()
        };
        let texts: Vec<String> = crash_images(&[], &events, &plan).map(|c| c.what).collect();
        let event0 = "event 0 (write of data at 0x0+0x400)";
        let event1 = "event 1 (write of data at 0x800+0x1)";
        let group = |text: &str| format!("cut in events 0..2 of 3: {text}");
        assert_eq!(
            texts,
            [
                group("none of them"),
                group(&format!("those before {event1}")),
                group("all of them"),
                group(&format!("all but {event0}")),
                group(&format!(
                    "the first 1 of 2 sectors of {event0}, all others in full"
                )),
                group(&format!(
                    "the first 1 of 2 sectors of {event0}, earlier ones in full"
                )),
                group(&format!(
                    "the last 1 of 2 sectors of {event0}, all others in full"
                )),
                group(&format!(
                    "the last 1 of 2 sectors of {event0}, earlier ones in full"
                )),
                "cut in events 3..3 of 3: none of them".to_owned(),
            ]
        );
    }

    #[test]
    fn the_random_generator_is_splitmix64() {
        let mut rng = SplitMix64::new(0);
        assert_eq!(rng.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(rng.next_u64(), 0x6e78_9e6a_a1b9_65f4);
        assert!((0..1000).all(|_| rng.below(7) < 7));
        assert_eq!(rng.below(0), 0);
        let ones = random_subset(3, 1000).iter().filter(|&&b| b).count();
        assert!((400..600).contains(&ones), "{ones}");
    }

    #[test]
    fn numbers_are_spread_with_both_ends() {
        assert_eq!(spread(5, 9), [0, 1, 2, 3, 4]);
        assert_eq!(spread(100, 3), [0, 49, 99]);
        assert_eq!(spread(3, 1), [0]);
        assert_eq!(spread(3, 0), [0; 0]);
        assert_eq!(spread(0, 5), [0; 0]);
    }
}
