//! The rules of the module's page, asked of the steps themselves; and the steps in words.

use super::steps::{Pass, Step, What, Write};
#[cfg(test)]
use crate::image::replay::walk::Marked;

/// The first rule that the steps break.
pub(crate) fn broken_rule(steps: &[Step]) -> Option<&'static str> {
    let broken = |rule: &'static str, kept: bool| (!kept).then_some(rule);
    let (mut published, mut done, mut unstable, mut meant) = (false, false, false, false);
    for step in steps {
        let problem = match step {
            Step::Stream(Pass::Raise(_)) => {
                broken("counts go up before anything is published", !published)
            }
            Step::Stream(Pass::Clear(_)) => {
                broken("COPIED is cleared before anything is published", !published)
            }
            Step::Stream(Pass::Lower(..)) => {
                broken("counts go down when the verb has taken effect", done)
            }
            Step::Stream(Pass::Set(_)) => {
                broken("COPIED is set when the verb has taken effect", done)
            }
            Step::Punch(..) | Step::Discard(..) | Step::Cut(_) => broken(
                "nothing is thrown away before the verb has taken effect",
                done,
            ),
            Step::Publish(_) if unstable => Some("what is published is stable before"),
            Step::Publish(writes) => {
                let means = writes.iter().any(changes_meaning);
                let again = means && (meant || done);
                meant |= means;
                broken("what the image means changes once", !again)
            }
            Step::Entries(_) if unstable => Some("what entries name is stable before"),
            Step::Done => broken("a verb takes effect once", !done),
            Step::Write(_) | Step::Try(..) | Step::Fill(..) if meant && !done => {
                Some("the decisive publish is all that is between two states")
            }
            _ => None,
        };
        if problem.is_some() {
            return problem;
        }
        match step {
            Step::Publish(_) => published = true,
            Step::Barrier | Step::Entries(_) => unstable = false,
            Step::Done => done = true,
            Step::Begin(..) | Step::End => {}
            _ => unstable = true,
        }
    }
    broken("a verb takes effect", done).or(broken("success is stable", !unstable))
}

/// Does a write switch the disk size or the snapshot table?
fn changes_meaning(write: &Write) -> bool {
    let What::Bytes(bytes) = &write.what else {
        return false; // an L1 table
    };
    let (first, end) = (write.at, write.at + bytes.len() as u64);
    let covers = |a: u64, b: u64| first < b && a < end;
    covers(24, 32) || covers(60, 72)
}

/// The steps, one a line.
#[cfg(test)]
pub(crate) fn text(steps: &[Step]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for step in steps {
        let _ = match step {
            Step::Begin(stage, work) => writeln!(out, "{stage:?}, {work} clusters"),
            Step::End => writeln!(out, "end"),
            Step::Write(w) => writeln!(out, "  write {w}"),
            Step::Try(w, _) => writeln!(out, "  try {w}"),
            Step::Fill(at, bytes) => writeln!(out, "  fill holes {at:#x}+{bytes:#x}"),
            Step::GiveBack(t) => writeln!(out, "  give back {:#x}", t.offset),
            Step::Truncate(length) => writeln!(out, "  file {length:#x}"),
            Step::Barrier => writeln!(out, "  B"),
            Step::Publish(writes) | Step::Entries(writes) => {
                let entries = matches!(step, Step::Entries(_));
                let word = if entries { "enter" } else { "PUBLISH" };
                let each = writes
                    .iter()
                    .try_for_each(|w| writeln!(out, "  {word} {w}"));
                each.and_then(|()| writeln!(out, "  B"))
            }
            Step::Done => writeln!(out, "  DONE"),
            Step::Stream(pass) => writeln!(out, "  {pass}"),
            Step::Punch(ranges, _) => writeln!(out, "  punch what became free, and {ranges:x?}"),
            Step::Discard(at, bytes) => writeln!(out, "  punch {at:#x}+{bytes:#x}"),
            Step::Grow(length) => writeln!(out, "  file at least {length:#x}"),
            Step::Cut(length) => writeln!(out, "  file at most {length:#x}"),
        };
    }
    out
}

#[cfg(test)]
impl std::fmt::Display for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {:#x}", self.label, self.at)?;
        match &self.what {
            What::Bytes(bytes) => write!(f, "+{:#x}", bytes.len()),
            What::Words(_, when, bytes) => write!(f, "+{:#x} ({when:?})", bytes.len()),
            What::Block(index) => write!(f, " (block {index})"),
            What::Table { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let offsets = |marked: &[Marked]| marked.iter().map(|m| m.offset).collect::<Vec<_>>();
        match self {
            Pass::Raise(blocks) => write!(f, "counts up, refcount blocks {blocks:?}"),
            Pass::Lower(blocks, _) => write!(f, "counts down, refcount blocks {blocks:?}"),
            Pass::Clear(tables) => write!(f, "COPIED cleared, L2 tables {:x?}", offsets(tables)),
            Pass::Set(tables) => write!(f, "COPIED set, L2 tables {:x?}", offsets(tables)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps by their names; `header60` publishes what begins there.
    fn steps(names: &str) -> Vec<Step> {
        let write = |label, at, bytes| Write {
            label,
            at,
            what: What::Bytes(vec![0; bytes]),
        };
        let step = |name| match name {
            "data" => Step::Write(write("snapshot table", 4096, 8)),
            "up" => Step::Stream(Pass::Raise(vec![0])),
            "down" => Step::Stream(Pass::Lower(vec![0], 0..0)),
            "clear" => Step::Stream(Pass::Clear(vec![])),
            "set" => Step::Stream(Pass::Set(vec![])),
            "header24" => Step::Publish(vec![write("header", 24, 8)]),
            "header40" => Step::Publish(vec![write("header", 40, 12)]),
            "header60" => Step::Publish(vec![write("header", 60, 12)]),
            "enter" => Step::Entries(vec![]),
            "punch" => Step::Punch(vec![], 0),
            "done" => Step::Done,
            _ => Step::Barrier,
        };
        names.split(' ').map(step).collect()
    }

    /// A rule, and steps that break it; without one, steps that break none.
    const CASES: &str = "\
        : data up B header60 done down B
        : data up B header40 data B header24 done down B
        counts go up before anything is published: data B header60 up B done B
        COPIED is cleared before anything is published: data B header60 clear B done B
        counts go down when the verb has taken effect: down B header60 done B
        COPIED is set when the verb has taken effect: set B header60 done B
        what is published is stable before: data header60 done B
        what entries name is stable before: header60 done data enter
        what the image means changes once: data B header24 header60 done B
        the decisive publish is all that is between two states: header24 data B header40 done
        nothing is thrown away before the verb has taken effect: punch B header60 done
        a verb takes effect once: data B header60 done done B
        a verb takes effect: data B
        success is stable: data B header60 done down";

    #[test]
    fn each_rule_is_noticed_when_it_is_broken() {
        for case in CASES.lines() {
            let (rule, names) = case.trim().split_once(':').unwrap_or_default();
            let broken = broken_rule(&steps(names.trim()));
            assert_eq!(broken.unwrap_or(""), rule, "{names}");
        }
    }
}
